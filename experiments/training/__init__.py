"""Training of the built-in model: generated tasks, Python's own sources, an autograd model."""
