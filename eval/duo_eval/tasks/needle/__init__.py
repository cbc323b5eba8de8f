"""`duo eval needle`: a sentence hidden in a long text, at many lengths and depths, by many methods."""
