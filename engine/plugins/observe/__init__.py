"""The page: a view of a running engine's cache."""
