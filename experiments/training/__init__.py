"""Training of the built-in model on generated tasks and Python's standard library."""
