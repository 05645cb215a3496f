"""An engine in a separate process, and its client in the server."""
