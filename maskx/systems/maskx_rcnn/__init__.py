"""Maskx rcnn."""
