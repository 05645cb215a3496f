"""Several caches behind one router: who finds most, and how long the first token takes."""
