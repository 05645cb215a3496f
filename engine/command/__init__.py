"""The command line: ``engine serve``, ``engine inspect`` and their screens."""
