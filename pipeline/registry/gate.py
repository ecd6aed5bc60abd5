"""The gate before an alias: rules over measured figures, and what they say of a version.

    registry:
      promote_if:
        class_accuracy: {at_least: 0.9}
        fd_cnn_digits: {at_most: 5.0, better_than_champion: true}

A figure is a dict of value, interval ([low, high] that has the true value in 95 % of the cases,
None where it is unknown), better ("lower" or "higher") and `measured`: all that must be equal for
two figures to compare.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.registry.config import Rule

Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Champion:
    """The version that an alias points at, as the gate sees it."""

    version: str
    figures: Figures


@dataclass(frozen=True)
class Verdict:
    """What one rule says of one figure."""

    figure: str
    rule: str
    holds: bool
    why: str
    """A part of a sentence, with the numbers."""
    value: float | None = None
    interval: tuple[float, float] | None = None
    bound: float | None = None
    """Of at_least and at_most; of better_than_champion, the champion's value."""
    margin: float | None = None
    """Of better_than_champion: how much better it must be: see `margin`."""


@dataclass(frozen=True)
class Decision:
    """Whether an alias moves to a version, and why."""

    alias: str
    version: str
    before: str | None
    """The version that the alias pointed at; None if it pointed nowhere."""
    rules: tuple[Verdict, ...]
    at: str
    """When it was taken, ISO 8601 in UTC."""

    @property
    def promoted(self) -> bool:
        """Whether the alias points at the version from then on."""
        return self.before == self.version or all(rule.holds for rule in self.rules)

    @property
    def sentence(self) -> str:
        """For people."""
        failed = "; ".join(rule.why for rule in self.rules if not rule.holds)
        if self.before == self.version:
            stays = f"version {self.version} is {self.alias} already"
            return f"{stays} and stays it, though {failed}" if failed else stays
        if failed:
            stays = f"{self.alias} stays version {self.before}" if self.before else ""
            return f"not promoted: {failed}; {stays or f'there is no {self.alias} yet'}"
        was = f", was version {self.before}" if self.before else ""
        why = "; ".join(rule.why for rule in self.rules)
        return f"{self.alias} is now version {self.version}{was}" + (f": {why}" if why else "")

    def to_json(self) -> str:
        """For a tag."""
        said = {"promoted": self.promoted, "sentence": self.sentence}
        return json.dumps(said | asdict(self), ensure_ascii=False)


def judge(
    rules: Mapping[str, Rule],
    figures: Figures,
    skipped: Mapping[str, str],
    champion: Champion | None,
) -> tuple[Verdict, ...]:
    """What the rules say of a version's figures.

    Args:
        skipped: why figures that could not be measured are missing.
        champion: None if the alias points nowhere, or at the version itself.
    """
    return tuple(
        verdict
        for name, rule in rules.items()
        for verdict in _verdicts(name, rule, figures, skipped, champion)
    )


def _verdicts(
    name: str, rule: Rule, figures: Figures, skipped: Mapping[str, str], champion: Champion | None
) -> Iterator[Verdict]:
    figure = figures.get(name)
    if figure is None:
        there = ", ".join(sorted(figures)) or "none"
        why = skipped.get(name, f"the figures there are: {there}")
        stated = [key for key, value in rule.model_dump().items() if value not in (None, False)]
        yield Verdict(name, ", ".join(stated), False, f"{name} was not measured ({why})")
        return
    value, interval = float(figure["value"]), _interval(figure)
    bounds = (("at_least", rule.at_least, 1), ("at_most", rule.at_most, -1))
    for key, bound, direction in bounds:
        if bound is not None:
            holds = direction * (value - bound) >= 0
            words = ("is " if holds else "is not ") + key.replace("_", " ")
            why = f"{name} {shown(figure)} {words} {bound:g}"
            yield Verdict(name, key, holds, why, value, interval, bound)
    if rule.better_than_champion:
        yield _against(name, figure, champion)


def _against(name: str, figure: Mapping[str, Any], champion: Champion | None) -> Verdict:
    value, interval = float(figure["value"]), _interval(figure)

    def verdict(holds: bool, why: str, *numbers: float) -> Verdict:
        return Verdict(name, "better_than_champion", holds, why, value, interval, *numbers)

    if champion is None:
        return verdict(True, f"{name} {shown(figure)} has no champion to be better than")
    theirs = champion.figures.get(name)
    if theirs is None:
        return verdict(
            False,
            f"version {champion.version} has no figure {name} to compare with: register it anew "
            "from its config, which keeps its number, or promote by hand",
        )
    if different := difference(figure["measured"], theirs["measured"]):
        return verdict(
            False,
            f"{name} of version {champion.version} was measured otherwise ({different}): register "
            "that version anew from its config with the same evaluation, or promote by hand",
        )
    needed = margin(figure, theirs)
    if needed is None:
        return verdict(
            False,
            f"{name} has no interval, without which a difference cannot be told from chance: "
            "measure it on more images",
        )
    gain = value - float(theirs["value"])
    holds = (gain if figure["better"] == "higher" else -gain) > needed
    other = f"{shown(theirs)} of version {champion.version}"
    words = f"is better than {other}" if holds else f"is not better than {other}"
    by = f" by more than {needed:.2g}, the 95 % interval of their difference"
    return verdict(holds, f"{name} {shown(figure)} {words}{by}", float(theirs["value"]), needed)


def margin(figure: Mapping[str, Any], theirs: Mapping[str, Any]) -> float | None:
    """How much better a figure must be, that 95 % of such differences are no chance.

    From the half of each interval that faces the other figure, as in Newcombe (1998), method 10:
    1.96·√(s_1² + s_2²) of figures with normal errors, and still right of shares near 0 and 1.
    """
    mine, other = _interval(figure), _interval(theirs)
    if mine is None or other is None:
        return None
    facing, facing_back = (0, 1) if figure["better"] == "higher" else (1, 0)
    return math.hypot(figure["value"] - mine[facing], theirs["value"] - other[facing_back])


def _interval(figure: Mapping[str, Any]) -> tuple[float, float] | None:
    interval = figure["interval"]
    return None if interval is None else (float(interval[0]), float(interval[1]))


def shown(figure: Mapping[str, Any]) -> str:
    """`5.31 [5.11, 5.51]`: the value and its 95 % interval, if it is known."""
    interval = _interval(figure)
    ends = "" if interval is None else f" [{interval[0]:.4g}, {interval[1]:.4g}]"
    return f"{figure['value']:.4g}{ends}"


def difference(here: Mapping[str, Any], there: Mapping[str, Any], prefix: str = "") -> str:
    """The first key of `measured` whose value differs, with both; "" if none does."""
    for key in sorted({*here, *there}):
        mine, theirs = here.get(key), there.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            if deeper := difference(mine, theirs, f"{prefix}{key}."):
                return deeper
        elif mine != theirs:
            return f"{prefix}{key} is {mine} here and {theirs} there"
    return ""
