"""Disaggregation: prefixes computed by one engine are sent to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from engine.config import COUNT, SECONDS, ConfigError, EngineConfig, PluginConfig, check_fields


@dataclass(frozen=True, slots=True)
class DisaggregationConfig(PluginConfig):
    """Role of the engine, and the addresses for it."""

    plugin: ClassVar[str] = "disaggregation"
    title: ClassVar[str] = "prefill and decode servers"

    role: Literal["prefill", "decode"] | None = None
    """prefill: compute the prompts of decode engines in addition to its own; decode: have prompts
    computed by prefill engines; by default neither."""
    transfer_at: str | None = None
    """With role prefill: HOST:PORT to listen on for decode engines, in a trusted network."""
    prefill: tuple[str, ...] = ()
    """With role decode: HOST:PORT of every prefill engine."""
    fetch_above: Annotated[int, COUNT] = 256
    """With role decode: prompts with fewer tokens that are not cached are computed here."""
    transfer_timeout_s: Annotated[float, SECONDS] = 10.0
    """With a role: seconds without a message after which the other engine is considered gone; must
    be longer than a step of the prefill engine."""

    def __post_init__(self) -> None:
        check_fields(self)
        for role, name in (("prefill", "transfer_at"), ("decode", "prefill")):
            if (self.role == role) != bool(getattr(self, name)):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"--role {role} and {flag} HOST:PORT require each other: set both."
                )
        _ = self.addresses

    @property
    def is_used(self) -> bool:
        return self.role is not None

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """(host, port) of the engine itself if it is a prefill engine, and otherwise of all prefill
        engines. Raises ConfigError."""
        found = []
        for text in self.prefill if self.transfer_at is None else (self.transfer_at,):
            host, _, port = text.rpartition(":")
            if not host or not port.isdecimal() or int(port) > 65535:
                raise ConfigError(f"{text!r} is not HOST:PORT, as in 127.0.0.1:7000.")
            found.append((host.strip("[]"), int(port)))
        return tuple(found)

    def check(self, config: EngineConfig) -> None:
        if config.prefix_cache == "none" or config.uses("tiers"):
            raise ConfigError(
                f"--role {self.role} requires a prefix cache without tiers: remove --prefix-cache "
                "none, --host-gib and --state-dir."
            )
