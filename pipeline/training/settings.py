"""A rule that sections of a config share: a setting that only one choice has needs that choice."""

from collections.abc import Mapping

from pydantic import BaseModel


def check_owners(section: BaseModel, owners: Mapping[str, tuple[str, str]]) -> None:
    """Raise ValueError where a setting is not its default and its owner was not chosen.

    Args:
        owners: setting -> (the key that chooses, the value of it that has the setting).
    """
    for name, (key, owner) in owners.items():
        value, chosen = getattr(section, name), getattr(section, key)
        if value != type(section).model_fields[name].default and chosen != owner:
            raise ValueError(
                f"{name}={value} has no meaning for {key}={chosen}: drop it, or use {key}={owner}"
            )
