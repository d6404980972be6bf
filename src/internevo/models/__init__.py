"""Models: single-device mathematics, without process groups or config machinery."""
