"""Running items x methods x budgets, and the file format of results."""
