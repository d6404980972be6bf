"""A run on paper: what it needs and how long it takes, before it has the machines."""
