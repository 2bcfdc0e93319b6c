"""Transfernet."""
