"""Execution of a batch of integers: memory, model, kernels and sampler."""
