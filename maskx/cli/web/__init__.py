"""A local page on which a trained run is tried out."""
