"""What the server may be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Address and manners of the server. ValueError says in one sentence what to change."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    served_model_name: str | None = field(
        default=None, metadata={"help": "name clients use; default: the model directory's name"}
    )
    max_body_mib: float = field(
        default=64.0, metadata={"help": "larger request bodies are refused, MiB"}
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
        if not 0 <= self.drain_s < math.inf:
            raise ValueError(f"--drain-s {self.drain_s:g} must be finite and not negative.")
