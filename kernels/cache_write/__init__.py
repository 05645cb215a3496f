"""Writing new keys and values into the KV pool: ``reference`` in plain PyTorch, ``fused`` in
Triton."""
