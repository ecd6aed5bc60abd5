"""One Ray head, which asks for a token: the commands of this folder join it or submit to it."""

from collections.abc import Iterator

import pytest

from tests.head import TOKEN, Head, started


@pytest.fixture(scope="package")
def head() -> Iterator[Head]:
    with started(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as head:
        yield head
