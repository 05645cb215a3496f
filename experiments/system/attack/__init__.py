"""The attack on the promises: what is tried against cache, engine, server and files, by models and
clients of its own."""
