"""Larvseg."""
