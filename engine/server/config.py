"""Server settings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from engine.config import Settings

API_KEY_VARIABLE = "HYBRIDCACHE_API_KEY"
"""Of the environment."""
MAX_STOPS = 64
"""As many as the engine takes."""
COUNTS = (
    "max_values",
    "max_names",
    "max_prompt_ids",
    "max_detokenize_ids",
    "max_messages",
    "max_parts",
    "max_stops",
    "max_stop_chars",
)
"""The settings that are a number of things."""


ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^\s/?#@A-Z]+")
"""As browsers send it, and compare it: in lower case, with nothing behind the port; ``null`` is a
file's."""


def flag(name: str) -> str:
    """The setting ``name`` as it stands on the command line."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class ServerConfig(Settings):
    """Settings of one server: address, limits and shutdown. Raises ValueError for a bad value.

    ``engine.plugins.server_config`` takes the settings of plugins as keywords too.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    log_requests: bool | None = field(
        default=None,
        metadata={
            "help": "write one line for each request: method, path, status, tokens of the prompt, "
            "of those cached, of the answer, and milliseconds; default: if the log is a terminal"
        },
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="warning", metadata={"help": "least level of messages in the log"}
    )
    served_model_name: str | None = field(
        default=None, metadata={"help": "name clients use; default: the model directory's name"}
    )
    max_body_mib: float = field(
        default=4.0, metadata={"help": "larger request bodies are refused, MiB"}
    )
    body_timeout_s: float = field(
        default=60.0, metadata={"help": "seconds that a request body may take to arrive"}
    )
    header_timeout_s: float = field(
        default=10.0,
        metadata={
            "help": "seconds that the headers of a request may take to arrive, from the beginning "
            "of the connection or the answer before"
        },
    )
    max_connections: int | None = field(
        default=None,
        metadata={
            "help": "connections that may be open at once; at the limit idle ones make room; "
            "default: as many as the system's limit of open files allows (ulimit -n)"
        },
    )
    max_values: int = field(
        default=300_000,
        metadata={
            "help": "values that the JSON of one body may hold, by its commas, where it may hold "
            "token ids"
        },
    )
    max_names: int = field(
        default=65_536,
        metadata={
            "help": "names, lists and objects of one body, by its colons and brackets; of a chat "
            "also values, by its commas, and what its calls were made with"
        },
    )
    max_prompt_ids: int = field(
        default=300_000,
        metadata={
            "help": "token ids that the prompts of one body may hold, and that /tokenize gives"
        },
    )
    max_detokenize_ids: int = field(
        default=262_144, metadata={"help": "token ids that /detokenize takes at once"}
    )
    max_messages: int = field(default=4096, metadata={"help": "messages that one chat may have"})
    max_parts: int = field(
        default=4096,
        metadata={"help": "text parts that the messages of one chat may have together"},
    )
    max_stops: int = field(
        default=MAX_STOPS,
        metadata={"help": "stop strings, and stop token ids, that one request may bring"},
    )
    max_stop_chars: int = field(
        default=1024, metadata={"help": "characters that one stop string may have"}
    )
    default_max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "most tokens of an answer to a chat that names no limit; default: as many as "
            "the context holds"
        },
    )
    special_in_content: bool = field(
        default=False,
        metadata={
            "help": "let special tokens that are written in messages become special tokens; "
            "without it they are text, "
            "and nobody can write another's turn"
        },
    )
    admin_key_file: str | None = field(
        default=None,
        metadata={
            "help": "file with the key that /v1/cache and /reset_prefix_cache then ask for "
            "(Authorization: Bearer KEY); "
            "none: they answer this machine only"
        },
    )
    api_key_file: str | None = field(
        default=None,
        metadata={
            "help": "file with the keys of clients, one per line: each then needs one of them "
            "(Authorization: Bearer KEY, or x-api-key), except on /, /health and /metrics; "
            f"{API_KEY_VARIABLE} may name one more"
        },
    )
    cors_origin: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "origins whose pages may ask this server, as https://host or http://host:port, "
            "or *; none: no other's"
        },
    )
    drain_s: float = field(
        default=30.0,
        metadata={"help": "after SIGTERM, seconds that running requests may take to finish"},
    )

    def __post_init__(self) -> None:
        if not self.host:
            raise ValueError(
                "--host names no address: use 127.0.0.1, or 0.0.0.0 for all that this machine has."
            )
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port} is no port: choose one from 0 to 65535.")
        if not 0 < self.max_body_mib < math.inf:
            raise ValueError(f"--max-body-mib {self.max_body_mib:g} must be finite and above 0.")
        for name in ("body_timeout_s", "header_timeout_s"):
            if not 0 < (seconds := getattr(self, name)) < math.inf:
                raise ValueError(f"{flag(name)} {seconds:g} must be finite and above 0.")
        if self.max_connections is not None and self.max_connections < 1:
            raise ValueError(f"--max-connections {self.max_connections} must be 1 or more.")
        for origin in self.cors_origin:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"--cors-origin {origin!r} is no origin: give it as https://host or "
                    "https://host:port, in lower case, without a path, or * for all."
                )
        if self.default_max_tokens is not None and self.default_max_tokens < 1:
            raise ValueError(f"--default-max-tokens {self.default_max_tokens} must be 1 or more.")
        for name in COUNTS:
            if (count := getattr(self, name)) < 1:
                raise ValueError(f"{flag(name)} {count} must be 1 or more.")
        if self.max_stops > MAX_STOPS:
            raise ValueError(
                f"--max-stops {self.max_stops} is more than the {MAX_STOPS} the engine takes."
            )
        if not 0 <= self.drain_s < math.inf:
            raise ValueError(f"--drain-s {self.drain_s:g} must be finite and not negative.")
        self._keep_used()
