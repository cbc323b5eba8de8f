"""Training data: haystacks of text, needles, batches."""
