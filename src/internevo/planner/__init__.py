"""A run on paper: what it needs, before it has the machines."""
