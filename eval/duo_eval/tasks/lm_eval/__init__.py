"""lm-evaluation-harness on this library: its tasks, prompts and metrics, this cache and these head patterns."""
