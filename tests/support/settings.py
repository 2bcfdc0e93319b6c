"""Settings of a configuration, written as a table."""

from collections.abc import Mapping
from typing import Any


def pairs(settings: Mapping[str, Any]) -> list[Any]:
    """Return keys and values in turn, as ``merge_from_list`` takes them."""
    return [part for item in settings.items() for part in item]
