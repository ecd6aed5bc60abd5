"""As in tests/system."""

from tests.system.conftest import nothing_is_left  # noqa: F401
