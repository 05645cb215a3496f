"""Endpoints of the server, one subject per file. Dialects import ``chat``, and no other."""
