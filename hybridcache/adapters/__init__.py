"""Routers, event streams and the live page: users of the cache's public API."""
