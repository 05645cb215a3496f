"""From a batch of integers to tokens: memory, model, kernels, sampler."""
