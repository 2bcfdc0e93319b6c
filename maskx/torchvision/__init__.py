"""The embedded host: torchvision's detectors with maskx heads, and one training loop.

This is what installing with pip alone gives; no Detectron2 is needed.
"""
