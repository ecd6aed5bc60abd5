"""The gate before an alias: its rules, one turn at a time, and the history of moves."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from pydantic import ValidationError

from pipeline.errors import ModelNotFound, StorageError, UserError
from pipeline.registry import lock
from pipeline.registry.aliases import (
    DECISION_TAG,
    HISTORY_TAG,
    MOST_CHARACTERS,
    Move,
    decide,
    history,
    promote,
    rollback,
)
from pipeline.registry.config import RegistryConfig, Rule
from pipeline.registry.gate import Champion, Decision, Verdict, judge
from pipeline.registry.store import make_client
from pipeline.registry.versions import FIGURES_TAG, ModelReference, read_tag

MEASURED = {"n": 100, "sampling": {"sampler": "ddim", "steps": 50}, "reference": "abc"}


def figure(
    value: float, error: float | None, better: str = "lower", **measured: Any
) -> dict[str, Any]:
    half = None if error is None else 1.959963984540054 * error
    return {
        "value": value,
        "standard_error": error,
        "interval": None if half is None else [value - half, value + half],
        "better": better,
        "measured": MEASURED | measured,
    }


def verdict_of(
    rule: Mapping[str, Any], ours: dict[str, Any], theirs: dict[str, Any] | None = None
) -> Verdict:
    champion = None if theirs is None else Champion("3", {"fd": theirs})
    (verdict,) = judge({"fd": Rule(**rule)}, {"fd": ours}, {}, champion)
    return verdict


# --- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "value", "holds", "why"),
    [
        ({"at_most": 5.0}, 5.0, True, "fd 5 [4.804, 5.196] is at most 5"),
        ({"at_most": 5.0}, 5.3, False, "fd 5.3 [5.104, 5.496] is not at most 5"),
        ({"at_least": 5.0}, 5.0, True, "fd 5 [4.804, 5.196] is at least 5"),
        ({"at_least": 5.5}, 5.3, False, "fd 5.3 [5.104, 5.496] is not at least 5.5"),
    ],
)
def test_a_threshold_holds_of_the_value_itself(
    rule: dict[str, Any], value: float, holds: bool, why: str
) -> None:
    verdict = verdict_of(rule, figure(value, 0.1))
    assert (verdict.holds, verdict.why) == (holds, why)
    assert (verdict.value, verdict.bound) == (value, next(iter(rule.values())))


@pytest.mark.parametrize(
    ("better", "sign"), [("lower", -1.0), ("higher", 1.0)], ids=["lower", "higher"]
)
def test_better_is_beyond_the_interval_of_the_difference(better: str, sign: float) -> None:
    margin = 1.959963984540054 * math.hypot(0.3, 0.4)
    rule = {"better_than_champion": True}
    for beyond, holds in ((1.01, True), (0.99, False), (-1.01, False)):
        ours = figure(5.0 + sign * beyond * margin, 0.3, better)
        verdict = verdict_of(rule, ours, figure(5.0, 0.4, better))
        assert verdict.holds is holds
        assert verdict.margin == pytest.approx(margin)
        assert verdict.bound == 5.0
        assert ("is better than" in verdict.why) is holds
        assert "of version 3 by more than 0.98, the 95 % interval" in verdict.why


def test_a_share_of_all_is_still_uncertain() -> None:
    """All of 20 have no standard error to speak of, but Wilson's interval is [0.84, 1]."""
    everything = figure(1.0, 0.0, "higher") | {"interval": [0.839, 1.0]}
    most = figure(0.9, 0.067, "higher") | {"interval": [0.699, 0.972]}
    verdict = verdict_of({"better_than_champion": True}, everything, most)
    assert not verdict.holds
    assert verdict.margin == pytest.approx(math.hypot(1 - 0.839, 0.972 - 0.9))


def test_without_a_champion_every_figure_is_better_than_it() -> None:
    assert verdict_of({"better_than_champion": True}, figure(9.0, None)).holds


@pytest.mark.parametrize(
    ("ours", "theirs", "why"),
    [
        (
            figure(1.0, 0.1, sampling={"sampler": "ddim", "steps": 20}),
            figure(9.0, 0.1),
            "fd of version 3 was measured otherwise (sampling.steps is 20 here and 50 there): "
            "register that version anew",
        ),
        (
            figure(1.0, 0.1, extractor="x"),
            figure(9.0, 0.1),
            "measured otherwise (extractor is x here and None there)",
        ),
        (figure(1.0, None), figure(9.0, 0.1), "fd has no interval, without which a difference"),
        (figure(1.0, 0.1), figure(9.0, None), "fd has no interval"),
    ],
)
def test_figures_that_do_not_compare_say_why(
    ours: dict[str, Any], theirs: dict[str, Any], why: str
) -> None:
    verdict = verdict_of({"better_than_champion": True}, ours, theirs)
    assert not verdict.holds
    assert why in verdict.why


def test_a_champion_without_the_figure_is_no_reason_to_move() -> None:
    rules = {"fd": Rule(better_than_champion=True)}
    (verdict,) = judge(rules, {"fd": figure(1.0, 0.1)}, {}, Champion("3", {}))
    assert not verdict.holds
    assert verdict.why.startswith("version 3 has no figure fd to compare with: register it anew")


def test_a_figure_that_was_not_measured_says_why() -> None:
    rules = {"fd": Rule(at_most=5.0, better_than_champion=True), "kd": Rule(at_most=1.0)}
    verdicts = judge(rules, {"is": figure(1.0, 0.1)}, {"fd": "too few samples"}, None)
    assert [verdict.holds for verdict in verdicts] == [False, False]
    assert verdicts[0].rule == "at_most, better_than_champion"
    assert verdicts[0].why == "fd was not measured (too few samples)"
    assert verdicts[1].why == "kd was not measured (the figures there are: is)"


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({}, "states nothing"),
        ({"better_than_champion": False}, "states nothing"),
        ({"at_least": 2.0, "at_most": 1.0}, "no figure is at_least 2.0 and at_most 1.0"),
        ({"at_most": math.nan}, "finite"),
        ({"at_most": "5"}, "valid number"),
        ({"below": 5}, "Extra inputs"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        RegistryConfig.model_validate({"promote_if": {"fd": rule}})


def test_what_is_shown_of_a_decision() -> None:
    good, bad = (Verdict("fd", "at_most", holds, f"fd is {holds}") for holds in (True, False))

    def said(before: str | None, *rules: Verdict) -> str:
        return Decision("champion", "4", before, rules, "now").sentence

    assert said("3") == "champion is now version 4, was version 3"
    assert said(None, good) == "champion is now version 4: fd is True"
    assert said("3", good, bad) == "not promoted: fd is False; champion stays version 3"
    assert said(None, bad) == "not promoted: fd is False; there is no champion yet"
    assert said("4", good) == "version 4 is champion already"
    assert said("4", bad) == "version 4 is champion already and stays it, though fd is False"


# --- aliases ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def versions(uri: str, request: pytest.FixtureRequest) -> Callable[..., list[ModelReference]]:
    """A model of the test's own, with a version for each figure; versions of nothing."""
    name = request.node.name.partition("[")[0]

    def make(*values: float) -> list[ModelReference]:
        client = make_client(uri)
        client.create_registered_model(name)
        made = []
        for value in values:
            tags = {FIGURES_TAG: json.dumps({"fd": figure(value, 0.1)})}
            version = client.create_model_version(name, source="s3://nowhere/x", tags=tags)
            made.append(ModelReference(name, str(version.version), "", uri))
        return made

    return make


def gate(reference: ModelReference, value: float, **rule: Any) -> Decision:
    rules = {"fd": Rule(**rule)} if rule else {}
    return decide(reference, "champion", rules, {"fd": figure(value, 0.1)}, {})


def champion_of(reference: ModelReference) -> str | None:
    client = MlflowClient(reference.tracking_uri, reference.tracking_uri)
    version = client.get_registered_model(reference.name).aliases.get("champion")
    return None if version is None else str(version)


def moves(reference: ModelReference) -> list[tuple[str | None, str, str]]:
    found = history(reference.name, "champion", reference.tracking_uri)
    return [(move.before, move.after, move.by) for move in found]


def test_the_alias_moves_only_to_what_the_rules_allow(
    versions: Callable[..., list[ModelReference]],
) -> None:
    poor, fair, same, good = versions(9.0, 5.0, 4.9, 3.0)
    assert not gate(poor, 9.0, at_most=6.0).promoted
    assert champion_of(poor) is None
    for reference, value, holder in ((fair, 5.0, "2"), (same, 4.9, "2"), (good, 3.0, "4")):
        decision = gate(reference, value, at_most=6.0, better_than_champion=True)
        assert decision.promoted is (holder == reference.version)
        assert champion_of(poor) == holder
        told = json.loads(str(read_tag(reference, DECISION_TAG)))
        assert told["promoted"] is decision.promoted
        assert told["sentence"] == decision.sentence
        assert [rule["value"] for rule in told["rules"]] == [value, value]
    assert told["before"] == "2"
    assert told["rules"][1]["margin"] == pytest.approx(1.96 * 0.1414, rel=1e-3)
    assert moves(poor) == [(None, "2", "gate"), ("2", "4", "gate")]
    # decided again, as after a change of the rules: it stays, and is no move
    assert gate(good, 3.0, at_most=1.0).promoted
    assert gate(good, 3.0, better_than_champion=True).promoted
    assert (champion_of(good), len(moves(good))) == ("4", 2)


def test_rollback_goes_back_step_by_step(versions: Callable[..., list[ModelReference]]) -> None:
    one, two, three = versions(1.0, 2.0, 3.0)
    uri, name = one.tracking_uri, one.name
    assert history(name, "champion", uri) == []
    with pytest.raises(UserError, match="was at no other version before: it points nowhere"):
        rollback(name, "champion", uri)
    assert promote(one, "champion") is None
    with pytest.raises(UserError, match="at no other version before: it stays version 1, and `ddp"):
        rollback(name, "champion", uri)
    gate(two, 2.0)
    assert promote(three, "champion") == "2"
    assert promote(three, "champion") == "3", "no move"
    for before, after in (("3", "2"), ("2", "1")):
        move = rollback(name, "champion", uri)
        assert (move.before, move.after, champion_of(one)) == (before, after, after)
    with pytest.raises(UserError, match="it stays version 1"):
        rollback(name, "champion", uri)
    promote(three, "champion")
    assert rollback(name, "champion", uri).after == "1", "what was rolled back is not before it"
    assert moves(one) == [
        (None, "1", "promote"),
        ("1", "2", "gate"),
        ("2", "3", "promote"),
        ("3", "2", "rollback"),
        ("2", "1", "rollback"),
        ("1", "3", "promote"),
        ("3", "1", "rollback"),
    ]
    assert history(name, "candidate", uri) == [], "each alias has its own"


def test_a_version_before_that_was_deleted_is_named(
    versions: Callable[..., list[ModelReference]],
) -> None:
    one, two, three = versions(1.0, 2.0, 3.0)
    for reference in (one, two, three):
        promote(reference, "champion")
    client = make_client(one.tracking_uri)
    client.delete_model_version(one.name, "2")
    with pytest.raises(ModelNotFound, match="version 2 of .* is deleted: choose another .*of 1, 3"):
        rollback(one.name, "champion", one.tracking_uri)
    with pytest.raises(ModelNotFound, match="no version 2 of the model"):
        promote(two, "champion")
    with pytest.raises(ModelNotFound, match="no version 2 of the model"):
        gate(two, 1.0)
    assert champion_of(one) == "3"


def test_a_deleted_champion_leaves_room_for_the_next(
    versions: Callable[..., list[ModelReference]],
) -> None:
    one, two, three = versions(1.0, 2.0, 3.0)
    promote(one, "champion")
    promote(two, "champion")
    make_client(one.tracking_uri).delete_model_version(one.name, "2")
    assert champion_of(one) is None
    assert rollback(one.name, "champion", one.tracking_uri).after == "1"
    make_client(one.tracking_uri).delete_model_version(one.name, "1")
    assert gate(three, 9.0, better_than_champion=True).promoted


def test_a_move_by_others_is_gone_back_from_too(
    versions: Callable[..., list[ModelReference]],
) -> None:
    one, two, _ = versions(1.0, 2.0, 3.0)
    promote(one, "champion")
    promote(two, "champion")
    client = make_client(one.tracking_uri)
    client.set_registered_model_alias(one.name, "champion", "3")  # in MLflow's own pages
    assert rollback(one.name, "champion", one.tracking_uri).after == "2"
    client.set_registered_model_alias(one.name, "champion", "1")
    with pytest.raises(UserError, match="it stays version 1"):
        rollback(one.name, "champion", one.tracking_uri)


def test_a_move_that_a_kill_left_undone_is_done_and_recorded_once(
    versions: Callable[..., list[ModelReference]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = versions(1.0, 2.0)
    promote(one, "champion")

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", kill)
        with pytest.raises(Killed):
            gate(two, 2.0)
    assert champion_of(one) == "1"
    assert gate(two, 2.0).promoted
    assert moves(one) == [(None, "1", "promote"), ("1", "2", "gate")]


def test_a_history_keeps_the_newest_moves_that_have_room(
    versions: Callable[..., list[ModelReference]],
) -> None:
    one, two = versions(1.0, 2.0)
    client = make_client(one.tracking_uri)
    entry = vars(Move("2026-01-01T00:00:00+00:00", "1", "2", "promote"))
    key = f"{HISTORY_TAG}.champion"
    client.set_registered_model_tag(one.name, key, json.dumps([entry] * 80))
    promote(one, "champion")
    promote(two, "champion")
    text = client.get_registered_model(one.name).tags[key]
    assert MOST_CHARACTERS - 150 < len(text) <= MOST_CHARACTERS
    assert moves(one)[-2:] == [(None, "1", "promote"), ("1", "2", "promote")]


def test_a_model_that_is_not_there_has_no_aliases(uri: str) -> None:
    for call in (rollback, history):
        with pytest.raises(ModelNotFound, match="there is no model 'nobody' in the registry"):
            call("nobody", "champion", uri)


# --- one at a time ------------------------------------------------------------------------------


class Server:
    """A registered model's tags on a server, its clock, and what others do as time passes."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.now = 0.0
        self.events: list[tuple[float, str | None]] = []
        """When another sets the lock's tag, or deletes it."""

    def get_registered_model(self, name: str) -> "Server":
        return self

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self.tags[key] = value

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        del self.tags[key]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            _, value = self.events.pop(0)
            if value is None:
                self.tags.pop(lock.LOCK_TAG)
            else:
                self.tags[lock.LOCK_TAG] = value


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    monkeypatch.setattr(lock, "time", made)
    yield made
    assert made.events == []


def take_lock(server: Server) -> float:
    """When it was ours."""
    client: Any = server
    with lock.lock_model(client, "http://mlflow", "m"):
        at = server.now
        assert lock.LOCK_TAG in server.tags
    return at


def test_a_lock_on_a_server_waits_until_all_claims_have_come(server: Server) -> None:
    assert take_lock(server) == lock.SETTLE
    assert server.tags == {}


def test_a_lock_on_a_server_waits_for_its_holder(server: Server) -> None:
    server.tags[lock.LOCK_TAG] = "another"
    server.events = [(10.0, None)]
    assert take_lock(server) == 10.0 + lock.SETTLE


def test_of_two_claims_on_a_server_the_last_written_has_the_lock(server: Server) -> None:
    server.events = [(1.0, "another"), (7.0, None)]
    assert take_lock(server) == pytest.approx(7.0 + lock.SETTLE, abs=lock.POLL)


def test_a_lock_that_a_dead_process_left_on_a_server_ends(server: Server) -> None:
    server.tags[lock.LOCK_TAG] = "dead"
    at = take_lock(server)
    assert lock.LEASE < at <= lock.LEASE + lock.SETTLE + 2 * lock.POLL


def test_a_lock_that_was_taken_for_dead_is_not_released_for_its_heir(server: Server) -> None:
    client: Any = server
    with lock.lock_model(client, "http://mlflow", "m"):
        server.tags[lock.LOCK_TAG] = "heir"
    assert server.tags == {lock.LOCK_TAG: "heir"}


def test_a_store_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "no.db").write_bytes(b"this is not a database, but long enough to look at" * 9)
    with pytest.raises(StorageError, match="MLflow at sqlite.* cannot be used"):
        rollback("m", "champion", f"sqlite:///{tmp_path}/no.db")


# --- the stage ----------------------------------------------------------------------------------


class Silent:
    """Progress that nobody sees."""

    def start(self, total: int, unit: str, done: int = 0) -> None: ...

    def update(self, done: int, note: str = "") -> None: ...

    def say(self, sentence: str) -> None: ...
