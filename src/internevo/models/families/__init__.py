"""The model families, one file each, and what several of them share: facts only, without PyTorch."""
