"""Makes batches from files. The global batch of a step depends only on the seed, the data and the position in the data."""
