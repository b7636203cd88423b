"""A comparison shown: its tables, pictures and page, all of them made from comparison.json alone."""
