"""Model families: what each has (`table`), how its configuration is read (`hugging_face`), known shapes (`presets`)."""
