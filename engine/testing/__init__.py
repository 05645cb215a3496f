"""Runner and sampler without a model that verify every read."""
