"""Settings that are a number, or the least and the most of it: `4` or `[1, 4]`."""

from typing import Any

from pydantic import BeforeValidator


def bounds(value: int | list[int]) -> tuple[int, int]:
    """(least, most)"""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def number_or_bounds(limit: int | None = None) -> BeforeValidator:
    """The rule of a field of the type `int | list[int]`: from 1, to `limit` if there is one."""

    def check(value: Any) -> Any:
        ends = value if isinstance(value, list) else [value, value]
        is_sound = len(ends) == 2 and all(type(end) is int for end in ends)
        if not is_sound or not 1 <= ends[0] <= ends[1] <= (limit or ends[1]):
            to = f" to {limit}" if limit else ""
            raise ValueError(f"{value!r} must be a number from 1{to}, or [least, most]")
        return value

    return BeforeValidator(check)
