"""Identity of a result: every choice that its figures depend on, except this project's own code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from hybridcache.geometry.times import describe_times
from hybridcache.geometry.units import GIB
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.target import RunConfig


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """One cell of a sweep as plain text and numbers, as in a results file."""

    trace: str
    """As ``open_trace`` takes it, options and seed included."""
    label: str
    """Name in tables and figures. Two cells with one label may differ in other fields; see
    ``names``."""
    model: str
    state_dtype: str
    gib: float | None
    """GiB for KV and states together, or None with two pools."""
    memory: str | None
    """Division of the memory: ``arena``, ``budget`` or ``pools``; None for a peer, which has its
    own."""
    kv_share: float | None
    """Share of ``gib`` for KV, with two pools."""
    num_kv_tokens: int | None
    num_slots: int | None
    policy: str | None
    """Eviction policy; None for a peer."""
    checkpoints: str | None
    """Checkpoint placement; None for a peer."""
    priority_classes: bool | None
    """True if the cache evicts unreachable KV and superseded checkpoints before all other items;
    False if ``policy`` orders them too; None for a peer."""
    baseline: str | None
    page_size: int
    grid: int
    servers: int
    max_running: int | None
    tpot_s: float
    times: str
    """Source of the prefill times."""
    checkpoint_dtype: str = "auto"
    host_gib: float = 0.0
    disk_gib: float = 0.0
    host_bytes_per_s: float | None = None
    """Speed of copies from host memory; None if there is no such tier."""
    disk_bytes_per_s: float | None = None
    """Speed of copies from disk; None if there is no such tier."""


SIZES = ("gib", "num_kv_tokens", "num_slots")
"""Fields that say how much memory there is: the columns of a table."""


def identify(
    config: RunConfig, serving: Serving, trace: str, priority_classes: bool | None
) -> RunIdentity:
    """Return the identity of a run over the trace with the recipe ``trace``.
    ``priority_classes`` is that of the target."""
    geometry, is_ours = config.geometry, config.baseline is None
    return RunIdentity(
        trace=trace,
        label=config.label,
        model=geometry.name,
        state_dtype=geometry.state_dtype,
        gib=None if config.budget_bytes is None else config.budget_bytes / GIB,
        memory=_memory(config),
        kv_share=config.kv_share,
        num_kv_tokens=config.num_kv_tokens or None,
        num_slots=config.num_slots or None,
        policy=str(config.policy) if is_ours else None,
        checkpoints=str(config.checkpoints) if is_ours else None,
        priority_classes=priority_classes,
        baseline=config.baseline,
        page_size=config.page_size,
        grid=config.grid,
        servers=serving.servers,
        max_running=serving.max_running,
        tpot_s=serving.tpot_s,
        times=describe_times(serving.times),
        checkpoint_dtype=geometry.checkpoint_dtype,
        host_gib=config.host_bytes / GIB,
        disk_gib=config.disk_bytes / GIB,
        host_bytes_per_s=config.host_bytes_per_s if config.host_bytes else None,
        disk_bytes_per_s=config.disk_bytes_per_s if config.disk_bytes else None,
    )


def _memory(config: RunConfig) -> str | None:
    if config.baseline is not None:
        return None
    return "pools" if config.budget_bytes is None else config.memory


def without_size(identity: RunIdentity) -> RunIdentity:
    """Return the identity of the same competitor without a memory size."""
    return replace(identity, gib=None, num_kv_tokens=None, num_slots=None)


def names(identities: Iterable[RunIdentity]) -> dict[RunIdentity, str]:
    """Return a name for each competitor: its label, and the differing fields if labels are
    equal."""
    competitors = dict.fromkeys(map(without_size, identities))
    by_label: dict[str, list[RunIdentity]] = {}
    for competitor in competitors:
        by_label.setdefault(competitor.label, []).append(competitor)
    return {each: _name(each, by_label[each.label]) for each in competitors}


def _name(identity: RunIdentity, same: Sequence[RunIdentity]) -> str:
    differing = [
        f"{field.name} {getattr(identity, field.name)}"
        for field in fields(identity)
        if len({getattr(other, field.name) for other in same}) > 1
    ]
    return f"{identity.label} ({', '.join(differing)})" if differing else identity.label
