"""What one types: a file for each sub-command of `minipeft`, which parses, calls and prints."""
