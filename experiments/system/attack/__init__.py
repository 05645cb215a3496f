"""Random attacks on cache, engine and server, each with a reference model or client."""
