"""Reads raw documents from files."""
