"""Command line of the engine: ``engine serve``, ``engine record`` and others, and their
screens."""
