"""One Ray head, which asks for a token: the commands of this folder join it or submit to it."""

from collections.abc import Iterator

import pytest

from tests.conftest import mark_the_only
from tests.head import TOKEN, Head, started


@pytest.fixture(scope="package")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    mark_the_only(tmp_path_factory, "head")
    with started(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as head:
        yield head
