"""From a prompt's tokens to the next ones: inference, samplers, and the loop. Knows no text."""
