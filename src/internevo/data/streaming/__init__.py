"""Streaming data: raw files that are tokenized while the model trains."""
