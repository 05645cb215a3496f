"""Disaggregation: prefixes computed by one engine are sent to another. Its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from engine.config import (
    ConfigError,
    EngineConfig,
    PluginConfig,
    check_positive_int,
    check_word,
    setting,
)


@dataclass(frozen=True, slots=True)
class DisaggregationConfig(PluginConfig):
    """Role of the engine, and the addresses that it needs."""

    plugin: ClassVar[str] = "disaggregation"
    title: ClassVar[str] = "prefill and decode servers"

    role: Literal["prefill", "decode"] | None = setting(
        None,
        "prefill: compute the prompts of decode engines beside its own; decode: have prompts "
        "computed by prefill engines; none: on its own",
    )
    transfer_at: str | None = setting(
        None,
        "with role prefill: HOST:PORT to listen on for decode engines, in a trusted network",
    )
    prefill: tuple[str, ...] = setting((), "with role decode: HOST:PORT of every prefill engine")
    fetch_above: int = setting(
        256, "with role decode: prompts that lack fewer tokens of what is cached are computed here"
    )
    transfer_timeout_s: float = setting(
        10.0, "with a role: seconds of silence after which the other engine counts as gone"
    )

    def __post_init__(self) -> None:
        check_word("role", self.role, (None, "prefill", "decode"))
        needed = {"prefill": "transfer_at", "decode": "prefill"}
        for role, name in needed.items():
            if (self.role == role) != bool(getattr(self, name)):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"--role {role} and {flag} HOST:PORT go together: give both.")
        check_positive_int("fetch_above", self.fetch_above)
        if not 0 < self.transfer_timeout_s < 1e6:
            raise ConfigError(f"transfer_timeout_s must be above 0, not {self.transfer_timeout_s}.")
        if not isinstance(self.prefill, tuple):
            raise ConfigError("prefill must be a tuple of addresses.")
        _ = self.addresses

    @property
    def is_used(self) -> bool:
        """See ``PluginConfig``."""
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
        """See ``PluginConfig``."""
        if config.prefix_cache == "none":
            raise ConfigError(
                f"--role {self.role} moves prefixes between caches: --prefix-cache none has none."
            )
        if config.uses("tiers"):
            raise ConfigError(
                f"--role {self.role} is served without memory below the device's: leave --host-gib "
                "and --state-dir out."
            )
