"""Latent attention over a pool with one row per token: ``reference`` in plain PyTorch, ``fused`` in
Triton."""
