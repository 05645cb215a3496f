"""Request routers: choose the replica for each request. The simulator and the engine share them."""
