"""The base: GPT-2, its files, its vocabulary."""
