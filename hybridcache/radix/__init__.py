"""Prefix cache over a radix tree: allocators, tree, cache, leases, tiers. Independent of models."""
