"""Parallelism: one file per strategy. ``plan.py`` applies the strategies to a model, in order."""
