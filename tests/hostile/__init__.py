"""Hostile inputs, by kind: each is refused in one short message, or gives the right result."""
