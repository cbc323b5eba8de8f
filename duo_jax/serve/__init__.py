"""Serving: device programs over the rows of one paged cache, and what schedules them."""
