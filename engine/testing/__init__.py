"""A runner and a sampler without a model, which verify every read."""
