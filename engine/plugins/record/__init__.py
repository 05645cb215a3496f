"""A recording proxy: passes requests on to a server and writes them as a trace."""
