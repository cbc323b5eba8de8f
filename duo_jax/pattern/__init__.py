"""Which heads keep a full cache: patterns, their files, and the published ones."""
