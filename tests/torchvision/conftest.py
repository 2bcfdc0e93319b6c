"""A tiny data set and detectors, shared by what plugs into torchvision and its system."""

from detector_fixtures import make_detector, scenes, split  # noqa: F401 - fixtures
