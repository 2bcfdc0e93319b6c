"""Concept mask."""
