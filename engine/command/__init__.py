"""Command line of the engine: ``engine serve``, ``engine inspect`` and others, and their
screens."""
