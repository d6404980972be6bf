"""How a model is spread over processes: one file per strategy, applied in the order of ``plan.py``."""
