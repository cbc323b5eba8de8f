"""Short tasks whose data comes from a package registry: full attention and head patterns, item by item."""
