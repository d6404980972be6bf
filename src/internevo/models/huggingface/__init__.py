"""Hugging Face folders: the names of their tensors, and how they are read and written."""
