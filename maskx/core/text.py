"""Names in messages and in files."""

from collections.abc import Collection

__all__ = ["file_name_of", "listed"]


def listed(names: Collection[str], most: int = 8) -> str:
    """Join the first names for a message, in quotes, and count the others; sets are sorted."""
    ordered = sorted(names) if isinstance(names, set | frozenset) else list(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(f"'{name}'" for name in ordered[:most]) + more


def file_name_of(name: str) -> str:
    """Replace all but letters and digits of a name, so that every file system takes it."""
    return "".join(character if character.isalnum() else "_" for character in name)
