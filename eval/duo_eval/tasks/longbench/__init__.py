"""`duo eval longbench`: the 21 tasks of LongBench (arXiv 2308.14508), with lm-eval's definitions."""
