"""Encodes documents to token ids."""
