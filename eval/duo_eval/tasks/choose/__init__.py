"""`duo choose`: what a pattern loses at a few KV budgets, and the smallest budget within the loss that is allowed."""
