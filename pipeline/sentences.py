"""What pydantic finds wrong with a value, as one sentence."""

from typing import Any

from pipeline.errors import RequestError


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
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        shown = name and not prefix[-1].isalpha()
        option = f"{prefix}{name} {problem['input']}: " if shown else ""
        raise RequestError(option + message[0].lower() + message[1:], name) from error
