"""Endpoints of the server, one dialect or subject in each file. They import no other endpoint but
``chat``, which dialects translate to."""
