"""Ahead-of-time compilation for GPUs that are not present."""
