"""Arguments: checks and defaults."""

import inspect
from collections.abc import Callable
from typing import Any


def check_choice(what: str, value: object, allowed: tuple) -> None:
    """Raise a ValueError that names what is wrong and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def default_of(function: Callable, argument: str) -> Any:
    """Return the default of an argument, for a setting that stands for it elsewhere."""
    return inspect.signature(function).parameters[argument].default
