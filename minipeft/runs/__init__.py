"""One whole run, from what was asked for to a results file."""
