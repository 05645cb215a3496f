"""Several engines behind one server, on Ray. Each request goes to a replica that has much of
its prompt in the cache."""
