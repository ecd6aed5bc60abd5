"""What a test of this tier starts, it ends: also when it fails."""

from collections.abc import Iterator

import pytest

from tests.conftest import nothing_left_of


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    with nothing_left_of(request.node.nodeid):
        yield
