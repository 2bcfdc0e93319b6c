"""Studies: not part of the package."""
