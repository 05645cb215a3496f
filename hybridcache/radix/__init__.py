"""Radix tree: nodes, edges and their items. Independent of pools, policies and models."""
