"""OpenAI's HTTP interface to an engine: what it accepts, what it answers, and the server."""
