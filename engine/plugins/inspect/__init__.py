"""Size of a model's prefixes."""
