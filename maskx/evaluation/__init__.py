"""Metrics per category split, and figures of predictions. No host."""
