"""The tasks, one file each: text to examples, a loss, a metric."""
