"""The exercises' grader: `python -m minipeft.check METHOD FILE`."""
