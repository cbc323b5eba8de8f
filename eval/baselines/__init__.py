"""Ways to hold a context in a given number of bytes: full attention, head patterns, and rules that evict tokens."""
