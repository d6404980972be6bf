"""Files and folders: safetensors files read and written a few rows at a time, JSON, and folders that are replaced safely."""
