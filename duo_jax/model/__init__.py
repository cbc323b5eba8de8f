"""The decoder of every family, with its configuration and weights. Knows no cache, no pattern and no files."""
