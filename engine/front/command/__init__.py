"""Command line of the engine: ``engine serve`` and the other verbs, and their screens."""
