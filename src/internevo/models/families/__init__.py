"""The model families, one file each, and what they share. These files describe models and do not import PyTorch."""
