"""Several engines behind one server, on Ray Serve: which one a request goes to is decided by what
each can resume."""
