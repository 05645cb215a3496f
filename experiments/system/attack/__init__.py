"""Random attacks on cache, engine, server and files, each with a separate reference model or
client."""
