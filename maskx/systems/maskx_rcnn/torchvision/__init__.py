"""Torchvision."""
