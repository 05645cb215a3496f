"""Random attacks on cache, engine, server and files, each with a reference model or client."""
