"""The radix tree: nodes, edges and what hangs on them. Knows no pool, no policy, no model."""
