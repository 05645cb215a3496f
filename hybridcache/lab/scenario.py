"""One experiment of the simulator: trace, model, memory, policies, machine and load.

``simulate``, ``closed_loop``, ``optimum``, the command line and the studies take a scenario. Flags
and their help are made from its fields, and it can be written as TOML.

>>> scenario = Scenario("short?head=20", gib=(1, 2), policy=("lru", "survival"))
>>> print(scenario.to_toml())
trace = "short?head=20"
gib = [1, 2]
policy = ["lru", "survival"]
<BLANKLINE>
"""

# ruff: noqa: RUF009 (``_setting`` calls ``field`` with the metadata of a flag)

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.machinery import PathFinder
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from hybridcache.allocators.moves import DISK, HOST
from hybridcache.command.parser import did_you_mean, or_known
from hybridcache.config import GRID, CacheConfig
from hybridcache.geometry.model import DTYPE_BYTES, ModelGeometry
from hybridcache.geometry.times import MeasuredTimes, Roofline, StepTimes
from hybridcache.geometry.units import format_bytes
from hybridcache.lab.rivals.evictions import ALL_NAMES, LAB_NAMES, make_eviction
from hybridcache.lab.rivals.systems import BASELINES
from hybridcache.lab.traces import open_trace
from hybridcache.lab.traces.arrivals import Starts, parse_starts
from hybridcache.lab.traces.sizes import budget_bytes, shares, sizes, working_set_bytes
from hybridcache.lab.traces.trace import Trace
from hybridcache.policies.admission import KEPT_S
from hybridcache.policies.registry import (
    ADMISSION_NAMES,
    DEFAULT_EVICTION,
    DEFAULT_PLACEMENT,
    PLACEMENT_NAMES,
    AdmissionSpec,
    EvictionSpec,
    PlacementSpec,
    known_names,
    parse_placement,
    split_specs,
)
from hybridcache.policies.user import OwnPolicy, own_policy
from hybridcache.radix.offload import DISK_BYTES_PER_S, PCIE_BYTES_PER_S, Exchange, PrefillTimes
from hybridcache.radix.protocol import PlacementPolicy

ALL = "all"
GIB_SPEC = "2:200:15"
"""Sizes of a replay: 15 from 2 to 200 GiB, logarithmically spaced."""
CLOSED_LOOP_GIB = 16.0

RESULT_FORM = 4
"""Number of the form of results in files. Runs in another form are computed again."""

MEMORIES = {"arena": "arena", "moves": "arena", "budget": "budget", "pools": "budget"}
"""Divisions of the memory between KV and states, and ``CacheConfig.memory`` of each."""

Words = str | Sequence[str]
Policy = EvictionSpec | PlacementSpec
Policies = Policy | Sequence[Policy]
Admissions = AdmissionSpec | Sequence[AdmissionSpec]
Sizes = str | float | Sequence[float]
Settings = dict[str, Any]
"""Values of fields of ``Scenario``, by name."""
_T = TypeVar("_T")


def _setting(
    default: _T,
    help: str,
    group: str,
    *,
    names: Callable[[], Sequence[str]] | None = None,
    least: int | None = None,
    above: int | None = None,
    **flag: object,
) -> _T:
    """Return a field with its help, group of flags, known names, limit, and details of its flag."""
    facts = {"help": help, "group": group, "names": names, "least": least, "above": above}
    return field(default=default, metadata=facts | {"flag": flag})


def seed_list(text: str) -> int | tuple[int, ...]:
    """Return a number of runs, or seeds that were given with commas between."""
    found = tuple(int(one) for one in text.split(",") if one)
    if "," in text:
        return found
    [number] = found
    return number


seed_list.__name__ = "number or list"  # For argparse's error.


MOST_USED, MEMORY, TIERS, LOAD = (
    "most used",
    "memory and machine",
    "host and disk tiers",
    "closed loop",
)
"""Groups of settings. Those of ``TIERS`` and some of ``MEMORY`` concern replays alone, those of
``LOAD`` closed loops alone."""
REPLAY_ONLY = (
    *("priority_classes", "checkpoint_dtype", "servers", "by_request"),
    *("host_gib", "disk_gib", "host_gb_s", "disk_gb_s"),
)


STARTS = "poisson, fixed (equal distances) or bursts:N (N at once)"
KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "str | Trace": ("one specification or one Trace", (str, Trace)),
    "str | ModelGeometry": ("a name, a path or a ModelGeometry", (str, ModelGeometry)),
    "str": ("a name", (str,)),
    "bool": ("True or False", (bool,)),
    "int": ("a whole number", (Integral,)),
    "float": ("a number", (Real,)),
}
"""Words for the values that a setting accepts, and their types, by the setting's own type."""


ELSEWHERE = {
    "placement": ": the placement of checkpoints is set by 'checkpoints'",
    "eviction": ": the eviction policy is set by 'policy'",
    "cache_gib": ": the memory is set by 'gib'",
}
"""Hints for names that other parts of the project use."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Settings of a simulation. Several policies, sizes, rates or seeds stand for a run of each
    combination; ``cells`` returns these."""

    trace: str | Trace
    """Trace, or a specification that ``open_trace`` reads."""
    model: str | ModelGeometry = _setting(
        "qwen3-next",
        "a preset's name, builtin, or the path of a config.json or a GGUF file",
        MOST_USED,
    )
    gib: Sizes | None = _setting(
        None,
        "memory for KV and states together, GiB: low:high:points (log-spaced; 15 if points is left "
        f"out), or a,b,c; or shares of the working set: 1%:100% (default {GIB_SPEC}; "
        f"{CLOSED_LOOP_GIB:g} in closed loop)",
        MOST_USED,
    )
    policy: Policies = _setting(
        DEFAULT_EVICTION,
        "eviction policies, joined by commas, or all",
        MOST_USED,
        names=lambda: [*known_names(ALL_NAMES), "module:Class"],
    )
    checkpoints: Policies = _setting(
        DEFAULT_PLACEMENT,
        "placements, joined by commas; repeat to compare",
        MOST_USED,
        names=lambda: [*known_names(PLACEMENT_NAMES), "none", "module:Class"],
        action="append",
    )
    baseline: Words = _setting(
        (),
        "caches of other systems, rebuilt; in closed loop their requests are admitted in the order "
        "of arrival; joined by commas",
        "results",
        names=lambda: list(BASELINES),
    )
    priority_classes: bool = _setting(
        True,
        "evict unreachable KV and superseded checkpoints first; otherwise each policy orders all "
        "items",
        MEMORY,
    )
    memory: str = _setting(
        "arena",
        "one arena for KV and states, as in the engine; moves: the same, and replays count the "
        "rows that it moves; an ideal budget of bytes; or two pools",
        MEMORY,
        choices=MEMORIES,
    )
    kv_share: float | None = _setting(
        None, "with memory pools: share of the memory for KV, 0 to 1", MEMORY
    )
    state_dtype: str | None = _setting(
        None, f"precision of states: {', '.join(DTYPE_BYTES)} (default: the model's own)", MEMORY
    )
    checkpoint_dtype: str = _setting(
        "auto",
        "precision of checkpoints only: bfloat16, int8 or fp8, the last two with :head, :row or "
        ":column (without them, :column); running states are then not counted in this memory; "
        "auto: the precision of states",
        MEMORY,
    )
    page_size: int = _setting(1, "tokens of a KV page", MEMORY, least=1)
    grid: int = _setting(
        GRID, "checkpoint positions are multiples of this number of tokens", MEMORY, least=1
    )
    servers: int = _setting(1, "concurrent prefills, for the TTFT", MEMORY, least=1)
    times: str | PrefillTimes | StepTimes | None = _setting(
        None, "measured prefill times; default: a roofline of H100s", MEMORY, metavar="FILE"
    )
    host_gib: float = _setting(
        0.0, "host memory for entries evicted from the device, GiB; 0: none", TIERS, least=0
    )
    host_gb_s: float = _setting(
        PCIE_BYTES_PER_S / 1e9,
        "bandwidth from host to a device, GB/s; decides which entries are loaded",
        TIERS,
        above=0,
    )
    disk_gib: float = _setting(
        0.0, "disk memory for entries evicted from the device, GiB; 0: none", TIERS, least=0
    )
    disk_gb_s: float = _setting(
        DISK_BYTES_PER_S / 1e9,
        "bandwidth from disk to a device, GB/s; decides which entries are loaded",
        TIERS,
        above=0,
    )
    rate: Sizes = _setting(
        "0.5:4:5", "sessions a second, low:high:points (log-spaced) or a,b,c", LOAD
    )
    starts: str = _setting("poisson", f"arrivals of sessions: {STARTS}", LOAD)
    max_running: int = _setting(16, "requests served at the same time", LOAD, least=1)
    admission: Admissions = _setting(
        ("oldest", "sessions"),
        "policies that admit waiting requests, joined by commas",
        LOAD,
        names=lambda: [*known_names(ADMISSION_NAMES), "module:Class"],
    )
    token_budget: int = _setting(8192, "tokens computed in a step", LOAD, least=64)
    ttft_limit_s: float = _setting(
        2.0, "seconds to the first token up to which an answer counts as goodput", LOAD, above=0
    )
    seeds: int | Sequence[int] = _setting(
        1,
        "runs with other arrivals, averaged: their number, or seeds as a,b (one: a,); in replays, "
        "draws of the trace: its drawn arrivals, and the texts of a generator",
        "results",
        type=seed_list,
    )
    by_request: bool = _setting(
        False, "keep a record of each request and of each eviction", "records"
    )
    tells_ends: bool = _setting(
        False,
        "clients say when a session has ended; otherwise an idle one keeps its place under the "
        f"admission live:N for {KEPT_S:g} s",
        LOAD,
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value, kind = getattr(self, one.name), str(one.type)
            optional = kind.removesuffix(" | None")
            if isinstance(value, Path) and one.name in ("trace", "model", "times"):
                value = str(value)
                object.__setattr__(self, one.name, value)
            if optional not in KINDS or (value is None and optional != kind):
                continue
            words, types = KINDS[optional]
            if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                raise ValueError(f"{one.name} must be {words} (got {value!r}).")
            least, above = one.metadata.get("least"), one.metadata.get("above")
            if least is not None and not value >= least:
                raise ValueError(f"{one.name} must be at least {least} (got {value:g}).")
            if above is not None and not value > above:
                raise ValueError(f"{one.name} must be above {above} (got {value:g}).")
        for name in ("gib", "rate"):
            if (given := getattr(self, name)) is not _defaults()[name]:
                sizes(given, name)
        try:
            self.starts_at(1.0)
        except ValueError:
            raise ValueError(f"starts must be {STARTS} (got {self.starts!r}).") from None
        if not all(type(one) is int and one >= 0 for one in _each(self.seeds)):
            raise ValueError(f"seeds must be whole numbers of at least 0 (got {self.seeds!r}).")
        if self.memory not in MEMORIES:
            raise ValueError(f"memory {self.memory!r} is none of {', '.join(MEMORIES)}")
        share = self.kv_share
        if share is not None and self.memory != "pools":
            raise ValueError(f"kv_share {share} is for memory 'pools' (got {self.memory!r})")
        if self.memory == "pools" and (share is None or not 0 < share <= 1):
            raise ValueError(f"memory 'pools' needs a kv_share above 0, at most 1 (got {share})")

    @classmethod
    def of(cls, given: Scenario | str | Trace, settings: Settings) -> Scenario:
        """Return the scenario of a function's arguments: a scenario, or a trace, and settings that
        replace its own. TypeError for an unknown setting."""
        known = {one.name for one in fields(cls)} - {"trace"}
        for name in settings:
            if name not in known:
                hint = ELSEWHERE.get(name, did_you_mean(name, known))
                raise TypeError(f"there is no setting {name!r}{hint}")
        if isinstance(given, Scenario):
            return replace(given, **settings)
        return cls(given, **settings)

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Raise ValueError, with ``reason``, if one of the settings ``names`` is not its
        default."""
        for name in names:
            if getattr(self, name) != _defaults()[name]:
                raise ValueError(f"{name} {reason}")

    # --- Files ------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> Scenario:
        """Read a file that ``to_toml`` wrote. Settings that are left out have their defaults.
        ValueError, which names the file, if it is none of a scenario."""
        try:
            found: Settings = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in tomllib.loads(Path(path).read_text(encoding="utf-8")).items()
            }
            if "trace" not in found:
                raise ValueError('there is no trace in it outside of a table: write trace = "chat"')
            return cls.of(found.pop("trace"), found)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_toml(self) -> str:
        """Return all settings that differ from their defaults. ValueError for one without a name in
        a file."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        lines = [
            f"{name} = {_written(name, value)}\n"
            for name, value in given.items()
            if name == "trace" or value != _defaults()[name]
        ]
        return "".join(lines)

    def key(self, trace_identity: bytes) -> str:
        """Return the identity of a run's result: a hash of all settings, the model's sizes, the
        times, the trace (see ``identity_of``), the source of the user's policies, and
        ``RESULT_FORM``. ValueError for policies and times that have no name or values in a file."""
        policies = (*_each(self.policy), *_each(self.checkpoints), *_each(self.admission))
        own = sources_of(map(written_policy, policies))
        geometry = self.geometry()
        times = self.prefill_times(geometry)
        kind: Any = type(times)
        if kind.__repr__ is object.__repr__:  # an address, which the next object may have
            raise ValueError(
                f"times is an object ({kind.__name__}) without a __repr__ of its values, so "
                "its runs cannot be identified in a file: make it a dataclass, or keep no runs"
            )
        others = {"trace", "model", "times"} | ({"by_request"} if not self.by_request else set())
        names = [one.name for one in fields(self) if one.name not in others]
        text = "".join(f"{name} = {getattr(self, name)!r}\n" for name in names)
        text += f"{geometry!r}\n{times!r}\n{own}\n{RESULT_FORM}"
        return hashlib.sha256(text.encode() + trace_identity).hexdigest()[:16]

    # --- Parts ------------------------------------------------------------------------------------

    def opened(self) -> Trace:
        """Return the trace."""
        return open_trace(self.trace) if isinstance(self.trace, str) else self.trace

    def geometry(self) -> ModelGeometry:
        """Return the model, with states of the precision asked for."""
        found = self.model
        if isinstance(found, str):
            found = ModelGeometry.load(found, checkpoint_dtype=self.checkpoint_dtype)
        if found.num_linear_layers and self.state_dtype is not None:
            return replace(found, state_dtype=self.state_dtype)
        return found

    def prefill_times(self, geometry: ModelGeometry) -> Any:
        """Return the times of prefills; a roofline of H100s if none were given."""
        times = MeasuredTimes.load(self.times) if isinstance(self.times, str) else self.times
        return times or Roofline.fitting(geometry)

    def step_times(self, geometry: ModelGeometry) -> Any:
        """Return the times of whole steps. ValueError if a table has none."""
        times = self.prefill_times(geometry)
        if isinstance(times, MeasuredTimes) and not times.decodes:
            raise ValueError(
                f"{times.source} has no times of decode steps: measure it again with "
                "experiments.benchmarks.measure_prefill of a checkout, or add them"
            )
        return times

    def points(
        self, trace: Trace, page_tokens: int, usual: str | float = GIB_SPEC
    ) -> tuple[tuple[float, ...], int]:
        """Return the sizes, GiB, ``usual`` if none were given, and the bytes of the working set if
        they are shares of it, else 0. ValueError for a size that holds no page of ``page_tokens``.
        """
        spec, geometry, whole_bytes = self.gib, self.geometry(), 0
        spec = usual if spec is None else spec
        if isinstance(spec, str) and "%" in spec:
            whole_bytes = working_set_bytes(trace, geometry)
            if not whole_bytes:
                raise ValueError(f"{trace.name}: {trace.is_empty_because}")
            found = shares(spec, whole_bytes)
        else:
            found = sizes(spec)
        page_bytes = page_tokens * geometry.kv_bytes_per_token
        if budget_bytes(min(found)) < page_bytes:
            raise ValueError(
                f"gib {min(found):g} is less than a page of KV, which takes "
                f"{format_bytes(page_bytes)}: give more"
            )
        return found, whole_bytes

    def competitors(self) -> list[Scenario]:
        """Return a scenario per competitor: every policy with every placement, then every peer.
        ValueError for one that does not exist or fit the model, and if two have the same label."""
        geometry = self.geometry()
        base = replace(self, model=geometry, state_dtype=None, baseline=())
        found = [
            replace(base, policy=policy, checkpoints=placement)
            for policy in named_policies(self.policy, split=True)
            for placement in named_policies(self.checkpoints)
        ]
        peers = split_specs(self.baseline) if isinstance(self.baseline, str) else self.baseline
        ours = {name: _defaults()[name] for name in ("policy", "checkpoints", *settings_of(TIERS))}
        found += [replace(base, **ours | {"baseline": word}) for word in peers if word]
        if not found:
            raise ValueError("nothing to simulate: no policy, and no baseline")
        labels = [one.label for one in found]
        for one in found:
            if not one.baseline:
                make_eviction(one.policy)()
                parse_placement(one.checkpoints)  # type: ignore[arg-type]
            elif one.baseline not in BASELINES:
                word = str(one.baseline)
                raise ValueError(f"no baseline {word!r}{or_known(word, BASELINES)}")
            elif not geometry.num_linear_layers:
                raise ValueError(
                    f"baseline {one.baseline}: {geometry.name} has no linear layers, and peers are "
                    "rebuilt for hybrid models only; compare policies for this model"
                )
            if labels.count(one.label) > 1:
                raise ValueError(
                    f"two competitors are called {one.label!r}: name each once, and give "
                    "functions names"
                )
        return found

    def cells(self, points: Sequence[float]) -> list[Scenario]:
        """Return a scenario per competitor and size."""
        return [replace(one, gib=size) for one in self.competitors() for size in points]

    # --- One cell: one competitor at one size -----------------------------------------------------

    @property
    def title(self) -> str:
        """Name of the cell in errors."""
        return f"{self.label} at {self.size_gib:.4g} GiB"

    @property
    def label(self) -> str:
        """Name of the competitor in tables and figures."""
        name = str(self.policy)
        if self.baseline:
            name = f"{self.baseline} (rebuilt)"
        elif self.checkpoints != DEFAULT_PLACEMENT:
            name = f"{name} @ {self.checkpoints}"
        for word, size in ((HOST, self.host_gib), (DISK, self.disk_gib)):
            if size:
                name = f"{name} + {size:.3g} GiB {word}"
        if self.baseline or self.memory == "arena":
            return name
        if self.kv_share is None:
            return f"{name} ({self.memory})"
        return f"{name} ({self.memory} {self.kv_share:.0%} KV)"

    @property
    def size_gib(self) -> float:
        """GiB for KV and states together."""
        assert isinstance(self.gib, int | float), "a cell has one size"
        return float(self.gib)

    def starts_at(self, rate: float) -> Starts:
        """Return the arrivals of ``rate`` sessions a second. ValueError for an unknown kind."""
        kind, colon, size = self.starts.partition(":")
        return parse_starts(f"{kind}:{rate}{colon}{size}")

    @property
    def budget_bytes(self) -> int:
        """Bytes for KV and states together."""
        return budget_bytes(self.size_gib)

    def cache_config(self, geometry: ModelGeometry, unit: int) -> CacheConfig:
        """Return the cache in units of the trace: a row holds ``unit`` tokens, and the grid is at
        least one unit. ValueError for a page or a grid that is neither whole units nor a part of
        one."""
        for name, size in (("page_size", self.page_size), ("grid", self.grid)):
            if size % unit and unit % size:
                raise ValueError(
                    f"{name} {size} must divide the trace's unit ({unit} tokens), or be a multiple "
                    "of it"
                )
        in_pools, num_kv_tokens, num_slots = self.memory == "pools", 0, 0
        if in_pools:
            share = self.kv_share or 0.0
            num_kv_tokens = round(share * self.budget_bytes) // geometry.kv_bytes_per_token
            if geometry.num_linear_layers:
                num_slots = round((1 - share) * self.budget_bytes) // geometry.state_bytes
        assert isinstance(self.policy, str | OwnPolicy), "a cell has one policy"
        return CacheConfig(
            prefix_cache="hybrid" if geometry.num_linear_layers else "radix",
            total_bytes=None if in_pools else self.budget_bytes,
            memory=MEMORIES[self.memory],
            num_kv_tokens=num_kv_tokens // unit,
            num_slots=num_slots,
            kv_bytes_per_token=geometry.kv_bytes_per_token * unit,
            state_bytes=max(geometry.state_bytes, 1),
            page_size=max(1, self.page_size // unit),
            grid=max(1, self.grid // unit),
            eviction=make_eviction(self.policy) if self.policy in LAB_NAMES else self.policy,
            priority_classes=self.priority_classes,
            host_bytes=budget_bytes(self.host_gib),
            disk_bytes=budget_bytes(self.disk_gib),
        )

    def placement(self, unit: int) -> PlacementPolicy:
        """Return the placement rules, their numbers in units."""
        words = self.checkpoints
        assert isinstance(words, str | OwnPolicy), "a cell has one placement"
        return parse_placement(_in_units(words, unit) if isinstance(words, str) else words)

    def exchange(self, geometry: ModelGeometry, unit: int) -> Exchange | None:
        """Return the rule that compares seconds of copies with seconds of prefill, or None without
        a lower tier. Devices of a roofline have a link each to host memory, and share that to disk.
        """
        if not self.host_gib and not self.disk_gib:
            return None
        times = self.prefill_times(geometry)
        num_links = times.devices if isinstance(times, Roofline) else 1
        rates = {HOST: num_links * self.host_gb_s * 1e9, DISK: self.disk_gb_s * 1e9}
        return Exchange(times, rates, unit=unit)


@cache
def _defaults() -> Settings:
    return {one.name: one.default for one in fields(Scenario)}


def settings_of(group: str) -> list[str]:
    """Return the names of the settings of a group."""
    return [one.name for one in fields(Scenario) if one.metadata.get("group") == group]


def _written(name: str, value: object) -> str:
    """Return a TOML value. ValueError if there is none."""
    if isinstance(value, Trace) and value.recipe:
        value = value.recipe
    elif name in ("policy", "checkpoints", "admission"):
        words = [written_policy(one) for one in _each(value)]
        value = words if isinstance(value, tuple | list) else words[0]
    if isinstance(value, float):
        return float.__repr__(value)  # "inf", which JSON writes as "Infinity"
    try:
        return json.dumps(value, ensure_ascii=False)  # TOML has no pairs of surrogates
    except TypeError:
        raise ValueError(
            f"{name} is an object ({type(value).__name__}), which has no name in a file"
        ) from None


def seeds_of(scenario: Scenario) -> Sequence[int]:
    """Return the seeds of the runs. ValueError if there is none."""
    seeds = scenario.seeds
    found = range(seeds) if isinstance(seeds, int) else seeds
    if not found:
        raise ValueError("seeds must be at least 1, or a list of seeds.")
    return found


def _each(given: object) -> Sequence[object]:
    """Return several values, or the one in a tuple."""
    return given if isinstance(given, Sequence) and not isinstance(given, str) else (given,)


def written_policy(policy: object) -> str:
    """Return the name of a policy in files. ValueError for one without."""
    if spec := policy if isinstance(policy, str) else _spec_of(policy):
        return spec
    raise ValueError(
        f"{own_policy(policy)}: it has no written form, which files need: name the policy as in "
        "'mine:Policy(weight=2)', with the class in a module"
    )


def _in_units(spec: str, unit: int) -> str:
    """Convert the lengths in the placement ``spec`` from tokens to units of ``unit`` tokens."""
    found = []
    for text in split_specs(spec):
        name, _, number = text.partition(":")
        entry = PLACEMENT_NAMES.get(name)
        is_length = entry is not None and entry.counts == "tokens" and number.isdecimal()
        found.append(f"{name}:{max(1, int(number) // unit)}" if is_length else text)
    return ",".join(found)


def named_policies(given: object, *, split: bool = False) -> tuple[str | OwnPolicy, ...]:
    """Return each policy as its name, or wrapped if it has none. With ``split``, a text names
    several with commas between, and ``all`` every built-in eviction policy."""
    if split and isinstance(given, str):
        given = tuple(filter(None, split_specs(given)))
    found = _each(given)
    if split and ALL in found:
        found = [*sorted(ALL_NAMES), *(one for one in found if one != ALL and one not in ALL_NAMES)]
    return tuple(map(_policy, found))


def _policy(one: object) -> str | OwnPolicy:
    """Replace a class by its name, so that other processes find it."""
    if isinstance(one, str):
        return ",".join(split_specs(one))
    if isinstance(one, OwnPolicy):
        return one
    if one is None or isinstance(one, int | float):
        raise ValueError(f"a policy must be a name, a class or an object of one (got {one!r}).")
    return _spec_of(one) or own_policy(one)


def is_own(policy: object) -> bool:
    """Return whether a policy, or one of several in a text, is a user's."""
    return not isinstance(policy, str) or any(map(_module_of, split_specs(policy)))


def _module_of(spec: str) -> str:
    """Return the module that a specification names, or an empty text for a built-in policy."""
    name, colon, _ = spec.strip().partition(":")
    known = name in ALL_NAMES | PLACEMENT_NAMES | ADMISSION_NAMES  # such as marconi:2
    return "" if known or not colon else name


def sources_of(policies: Iterable[str]) -> str:
    """Return the sources of the modules of the user's own policies among ``policies``, and of all
    modules that these import, except those of installed packages. No code of them is run.
    ValueError if one cannot be read."""
    found: dict[str, str] = {}
    for spec in (spec for policy in policies for spec in split_specs(policy)):
        module = _module_of(spec)
        if module and not _add_sources(module, found, module.partition(".")[0]):
            raise ValueError(
                f"{spec!r}: its source cannot be read, so stored runs cannot be matched with this "
                "class; put the class in a file, or store no runs"
            )
    return "".join(found[module] for module in sorted(found))


INSTALLED = tuple(
    {f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib", "platlib")}
)
"""Folders of Python's library and of installed packages."""
PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def _add_sources(module: str, found: dict[str, str], own: str) -> bool:
    """Add the source of a module, and of those that it imports. Modules of installed packages are
    left out, except those of the package ``own``. Returns False if it has no source."""
    if module in found:
        return True
    path = _path_of(module)
    if path is None or path.suffix != ".py" or not path.is_file():
        return False
    if module.partition(".")[0] != own and str(path).startswith((*INSTALLED, PACKAGE)):
        return True
    found[module] = path.read_text(encoding="utf-8")
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    if above := module.rpartition(".")[0]:
        _add_sources(above, found, own)
    for node in ast.walk(ast.parse(found[module], str(path))):
        if isinstance(node, ast.Import):
            names = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            start = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join(filter(None, [*start, node.module]))
            names = [base, *(f"{base}.{one.name}" for one in node.names)]
        else:
            continue
        for name in filter(None, names):
            _add_sources(name, found, own)
    return True


def _path_of(module: str) -> Path | None:
    """Return the file of a module, which is not imported for it; None if there is none."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded:
        return Path(loaded)
    folders: Sequence[str] | None = None
    spec, name = None, ""
    for part in module.split("."):
        name = f"{name}.{part}".strip(".")
        search = [*sys.path, str(Path.cwd())] if folders is None else folders
        spec = PathFinder.find_spec(name, search)
        if spec is None:
            return None
        folders = spec.submodule_search_locations or []
    return None if spec is None or not spec.has_location else Path(str(spec.origin))


def _spec_of(own: object) -> str | None:
    """Return ``module:Class`` of a class that is an attribute of its module; else None."""
    if not isinstance(own, type):
        return None
    is_found = getattr(sys.modules.get(own.__module__), own.__qualname__, None) is own
    return str(own_policy(own)) if is_found else None
