"""Checks of arguments."""


def check_choice(what: str, value: object, allowed: tuple) -> None:
    """Raise a ValueError that names what is wrong and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
