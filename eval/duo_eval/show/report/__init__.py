"""`duo report`: results as one page."""
