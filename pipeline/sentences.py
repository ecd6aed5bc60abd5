"""What pydantic refuses, in a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import RequestError, shown

if TYPE_CHECKING:  # `ddpm --help` need not wait for it
    from pydantic import ValidationError


@dataclass(frozen=True)
class Mistake:
    """One value that a model refuses; as a string `key=value: rule`."""

    loc: tuple[str, ...]
    """The key's path; empty where the mistake is of the whole."""
    value: Any
    kind: str
    """pydantic's name of the rule, such as `missing`."""
    rule: str
    """What the value should be, or what a validator of ours says, as a part of a sentence."""
    context: dict[str, Any]
    """pydantic's values of the rule."""

    @property
    def key(self) -> str:
        """Dotted."""
        return ".".join(self.loc)

    @property
    def is_ours(self) -> bool:
        """Whether a validator of ours refused it, whose sentence stands by itself."""
        return self.kind == "value_error"

    def __str__(self) -> str:
        return f"{self.key}={shown(self.value)}: {self.rule}" if self.loc else self.rule


def mistakes(error: ValidationError) -> list[Mistake]:
    """All that a model refuses, in the order of its fields."""
    return [
        Mistake(
            tuple(map(str, problem["loc"])),
            problem["input"],
            problem["type"],
            _rule(problem["type"], problem["msg"]),
            problem.get("ctx", {}),
        )
        for problem in error.errors()
    ]


def first_mistake(error: ValidationError) -> Mistake:
    """The first that a model refuses."""
    return mistakes(error)[0]


def validated(model: Any, prefix: str, **values: Any) -> Any:
    """A pydantic model of options.

    Args:
        prefix: what stands before the name of a field, as `--` and `--set ` do; or an option, of
            which the message itself names the value.

    Raises:
        RequestError: a value is wrong.
    """
    from pydantic import ValidationError

    try:
        return model(**values)
    except ValidationError as error:
        mistake = first_mistake(error)
        rule = mistake.rule[0].lower() + mistake.rule[1:]
        is_shown = mistake.loc and not prefix[-1].isalpha()
        value = "" if mistake.is_ours else f" {mistake.value}"  # our sentences name it
        option = f"{prefix}{mistake.key}{value}: " if is_shown else ""
        raise RequestError(option + rule, mistake.key) from error


def _rule(kind: str, message: str) -> str:
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    message = message.removeprefix("Input ")
    return message[0].lower() + message[1:]
