"""One service, which the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FAULTS, Workplace, mark_the_only
from tests.service import Service, served


@pytest.fixture(scope="package")
def service(
    tiny: Workplace, failing: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The tiny model, served by two replicas."""
    mark_the_only(tmp_path_factory, "service")
    with served(tiny, "--replicas", "2", **FAULTS, DDPM_FAILING=str(failing)) as running:
        yield running


@pytest.fixture(scope="package")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file: of the processes of `service` whose numbers are in it network calls fail."""
    return tmp_path_factory.mktemp("failing") / "numbers"
