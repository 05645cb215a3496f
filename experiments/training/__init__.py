"""What the built-in model is trained on and with: made-up tasks, Python's own sources, an autograd
model."""
