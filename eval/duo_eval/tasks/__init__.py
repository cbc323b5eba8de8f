"""Evaluation tasks, a file or folder each."""
