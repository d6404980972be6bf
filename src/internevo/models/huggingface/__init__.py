"""Hugging Face folders: names of tensors on disk, reading, writing, merging."""
