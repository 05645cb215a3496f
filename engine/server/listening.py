"""The listening socket, opened before anything slow is imported or loaded."""

from __future__ import annotations

import socket

from engine.server.config import ServerConfig

BACKLOG = 4096
"""Maximum number of connections that wait to be accepted."""
ACCEPTED_AT_ONCE = 8
"""Number of connections that are accepted at a time. asyncio also uses it as the backlog."""


def bind(config: ServerConfig) -> socket.socket:
    """Open a listening socket at the configured address.

    It is opened before the model is loaded. So a port in use is reported at once (ValueError), and
    an early client waits.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sets TCP_NODELAY only for a listener with an explicit TCP protocol. Without it every
    # answer on a persistent connection waits 40 ms for the client's delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"Cannot listen on {config.host}:{config.port} ({error.strerror}): choose another "
            "--port or --host."
        ) from error
    return listener
