"""Latent attention over a pool of one row per token, read by index: ``reference`` in plain PyTorch,
``fused`` in Triton."""
