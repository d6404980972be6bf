"""Models: the mathematics on a single device. No file here uses process groups."""
