"""How many replicas a service has, by the work that they report."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from pipeline.serving.config import ServingConfig
from tasks.service.autoscaling import SECONDS_OF_WORK, TARGET_SECONDS, by_work


@pytest.mark.parametrize(
    ("seconds", "replicas"),
    [([], 1), ([0.0, 0.0], 1), ([4.9], 1), ([5.1], 2), ([30.0, 12.0], 9), ([0.0, 10.0], 2)],
)
def test_there_are_as_many_replicas_as_the_work_keeps_busy(
    seconds: list[float], replicas: int
) -> None:
    assert TARGET_SECONDS == 5
    reported = {SECONDS_OF_WORK: dict(enumerate(seconds))}
    assert by_work(SimpleNamespace(aggregated_metrics=reported)) == (replicas, {})


def test_a_replica_that_has_not_reported_yet_has_nothing_to_do() -> None:
    assert by_work(SimpleNamespace(aggregated_metrics=None)) == (1, {})


@pytest.mark.parametrize("replicas", [0, 1001, [1], [2, 1], [0, 2], [1, 2, 3], "2", True])
def test_a_number_of_replicas_that_cannot_be(replicas: object) -> None:
    with pytest.raises(ValidationError):
        ServingConfig(replicas=replicas)  # type: ignore[arg-type]


def test_the_fewest_replicas_are_what_a_cluster_must_have_room_for() -> None:
    assert ServingConfig(replicas=3).min_replicas == 3
    assert ServingConfig(replicas=[2, 5]).min_replicas == 2
    assert ServingConfig(max_rows=7).rows_per_client == 4
    assert ServingConfig(max_rows=7, max_rows_per_client=7).rows_per_client == 7
