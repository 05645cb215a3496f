"""Optional parts of an engine. Each imports the core, and ``engine/engine.py`` imports it when the
settings or a request need it."""
