"""Converters: not part of the package."""
