"""An engine in a process of its own, and what a server sees of it."""
