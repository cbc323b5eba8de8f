"""`duo eval ruler`: the tasks of RULER (arXiv 2404.06654), generated here, with lm-eval's prompts."""
