"""Load on a server: a mix of requests, a client that sends them, and the table of what it measured."""
