"""The KV cache: what to make (`spec`), the arrays (`cache`), their writes (`pools`), and folders on disk (`store`)."""
