"""Probes: measurements of one step. They measure its collectives, its memory, and its timeline."""
