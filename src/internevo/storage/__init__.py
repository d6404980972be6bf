"""Files: tensors as streams, small JSON."""
