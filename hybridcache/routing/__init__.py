"""Which replica a request goes to: routers, fed by the replicas' events, for the laboratory and for
the engine alike."""
