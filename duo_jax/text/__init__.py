"""Text in, text out: chat templates, detokenization, `LM`, conversations."""
