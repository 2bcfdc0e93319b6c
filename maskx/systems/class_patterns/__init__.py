"""Class patterns."""
