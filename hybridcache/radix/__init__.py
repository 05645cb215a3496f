"""Prefix cache over a radix tree: tree, cache, leases, tiers."""
