"""The socket that is listened on: taken before anything slow is imported or loaded."""

from __future__ import annotations

import socket

from engine.server.config import ServerConfig

BACKLOG = 4096
"""Connections that may wait to be accepted."""
ACCEPTED_AT_ONCE = 8
"""Connections that are accepted before the first of them is looked at; asyncio takes this number,
too, for the backlog."""


def bind(config: ServerConfig) -> socket.socket:
    """A listening socket at the configured address. Taken before the model is loaded: a port that
    is in use is refused at once (ValueError), and a client that comes early waits."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # By name: asyncio sets TCP_NODELAY only on connections whose listener says that it is TCP, and
    # without it every answer on a connection that is kept waits 40 ms for the client's delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"Can not listen on {config.host}:{config.port} ({error.strerror}): choose another "
            "--port or --host."
        ) from error
    return listener
