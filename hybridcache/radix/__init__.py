"""Prefix cache over a radix tree: step plan, allocators, tree, cache, leases, tiers."""
