"""Server settings, and the listening socket, opened before anything slow is imported or loaded."""

from __future__ import annotations

import json
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from engine.config import ABOVE_0, COUNT, MIB_SIZE, SECONDS, ConfigError, Limits, check_fields

if TYPE_CHECKING:  # It imports msgspec, which commands that do not serve do without.
    from engine.errors import JsonObject

API_KEY_VARIABLE = "HYBRIDCACHE_API_KEY"
"""Name of the environment variable with an API key."""
PORT = Limits("a port from 0 to 65535", 0, 65535, is_whole=True)
BODY_MIB = Limits("a finite number of MiB above 0", ABOVE_0)
DRAIN = Limits("a finite number of seconds, 0 or more", 0)
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")
"""An origin as browsers send it: in lower case, up to the port. That of a file is ``null``."""
SWITCH_S = 0.0002
"""Time that a thread waits for the interpreter while another computes in Python."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of one server: address, limits and shutdown. Raises ValueError for a bad value."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, PORT] = 8000
    """Port to listen on; 0 chooses a free one."""
    log_requests: bool | None = None
    """Write one line per request, except for /health and /metrics; it has method, path, status,
    tokens of the prompt, cached tokens, tokens of the answer, and milliseconds; by default if the
    log is a terminal."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Minimum level of messages in the log."""
    log_format: Literal["text", "json"] = "text"
    """Form of the lines of the log; json has one object per line, with the time, and for a request
    also the client's address and a name of its key."""
    served_model_name: tuple[str, ...] = ()
    """Model names for clients, of which answers have the first; with * any name is accepted; by
    default the name of the model directory."""
    chat_template_kwargs: str | None = None
    """Switches of the chat template, such as {"enable_thinking": false}; a JSON object, for
    requests that do not set them."""
    max_body_mib: Annotated[float, BODY_MIB] = 32.0
    """Maximum size of a request body, MiB; without its images, documents and sound an eighth."""
    body_timeout_s: Annotated[float, SECONDS] = 60.0
    """Seconds that a request body may take to arrive."""
    default_max_tokens: Annotated[int | None, COUNT] = None
    """Maximum tokens of an answer to a chat without a limit; by default as many as the context
    permits."""
    images: Literal["text", "refuse"] = "text"
    """Images, documents and sound in a chat, which no model here reads; text replaces each by a
    line of text, so that the session of an agent can go on; refuse answers 400."""
    replay_mib: Annotated[float, MIB_SIZE] = 64.0
    """Memory for sampled tokens of answers, which replace an answer that a client sends back, MiB;
    with 0 such answers are tokenized again."""
    explain_mib: Annotated[float, MIB_SIZE] = 64.0
    """Memory for earlier requests, to explain why a later one missed the cache, MiB."""
    responses_mib: Annotated[float, MIB_SIZE] = 64.0
    """Memory for responses that a later request can continue (/v1/responses), MiB."""
    preserve_thinking: bool = False
    """Keep reasoning in the history as it was sampled; even if the chat template or the client
    drops it; a request can override this with chat_template_kwargs."""
    admin_key_file: str | None = None
    """File with the key for /v1/cache, /reset_prefix_cache and /flush_cache; they then require it
    (Authorization: Bearer KEY); by default only this machine can use them."""
    api_key_file: str | None = None
    """File with the keys of clients, one per line (# begins a comment); each request then needs one
    (Authorization: Bearer KEY, or x-api-key), except on /, /health and /metrics; a name behind a
    key stands for it in the log, the page, /v1/cache and the metrics; HYBRIDCACHE_API_KEY can have
    one more; SIGHUP reads the files of keys again."""
    salt_by_key: bool | None = None
    """Requests with different API keys share no cache entries; as with different salts; after a
    change, earlier entries of --state-dir are not found (default: if there are several keys)."""
    allowed_host: tuple[str, ...] = ()
    """Names by which clients may reach this server, or *; besides those of this machine; by default
    only these, if it listens on a loopback address and requires no key, and else every name."""
    trusted_proxy: tuple[str, ...] = ()
    """Addresses or networks (10.0.0.0/8) of proxies whose X-Forwarded-For is believed; its last
    entry that is none of them is then the client of the log and of the limit for wrong keys; by
    default every client is who connects."""
    cors_origin: tuple[str, ...] = ()
    """Origins of web pages that may use this server, or *; written as https://host or
    http://host:port; by default only the server's own."""
    keep_alive_s: Annotated[float | None, SECONDS] = None
    """Seconds of silence after which a stream sends its headers and a comment, and again after each
    such time, so that clients and proxies do not give up during a long prefill; such headers do not
    have the cached length; by default a stream begins with its first token."""
    idle_timeout_s: Annotated[float, SECONDS] = 75.0
    """Seconds that a connection without a request stays open, as the header Keep-Alive says; longer
    than the pools of clients and proxies keep it."""
    drain_s: Annotated[float, DRAIN] = 30.0
    """After SIGTERM, seconds that running requests may take to finish."""
    replicas: Annotated[int, COUNT] = 1
    """Number of engines on Ray behind one router; with one core each, and one GPU if Ray has
    enough."""
    ray: str | None = None
    """With replicas: address of their Ray cluster (auto: the one that ray start created here); by
    default a new one on this machine."""
    router: str = "checkpoint"
    """With replicas: policy that chooses one: checkpoint, text, least_loaded, or module:Class."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.default_switches is None:
            given = self.chat_template_kwargs
            said = f'a JSON object, as in {{"enable_thinking": false}} (got {given})'
            raise ConfigError(f"--chat-template-kwargs must be {said}.")
        if not all(one.isprintable() and one for one in self.served_model_name):
            raise ConfigError("--served-model-name must be printable names with commas between.")
        if any("/" in one or one.count(":") == 1 for one in self.allowed_host):
            raise ConfigError("--allowed-host must be names, without https:// and a port.")
        for origin in self.cors_origin:
            if not ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--cors-origin {origin!r} is not an origin: write it as https://host or "
                    "https://host:port, in lower case, without a path, or * for all."
                )
        if self.replicas == 1 and (self.ray, self.router) != (None, "checkpoint"):
            raise ConfigError("router and ray need --replicas (2 or more).")

    @property
    def default_switches(self) -> JsonObject | None:
        """``chat_template_kwargs`` as an object, or None if it is none."""
        with suppress(ValueError):
            switches = json.loads(self.chat_template_kwargs or "{}")
            return switches if isinstance(switches, dict) else None
        return None


BACKLOG = 4096
"""Maximum number of connections that wait to be accepted."""
ACCEPTED_AT_ONCE = 8
"""Number of connections that are accepted at a time. asyncio also uses it as the backlog."""


def bind(config: ServerConfig) -> socket.socket:
    """Open a listening socket at the configured address, before the model is loaded: a port in use
    is reported at once (ValueError), and an early client waits."""
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


def local_address(listener: socket.socket) -> str:
    """Return the base address of the API behind ``listener`` for clients on this machine.

    >>> from types import SimpleNamespace
    >>> local_address(SimpleNamespace(getsockname=lambda: ("::", 8000, 0, 0)))
    'http://[::1]:8000/v1'
    """
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # Of all interfaces.
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
