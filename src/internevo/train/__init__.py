"""Training: the loop, a step, the optimizer, and what else a run needs."""
