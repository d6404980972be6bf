"""From folders of tokens to the batches of a step. The global batch is a function of seed, position and data alone."""
