"""Scores, intervals and comparisons; knows no files or figures."""
