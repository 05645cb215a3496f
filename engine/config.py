"""Settings of an engine. The flags of the command line and their help are derived from the fields
and their docstrings."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import typing
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from hybridcache.config import Settings
from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.geometry.units import GIB
from hybridcache.scheduling.planner import MAX_SCORED as MAX_SCORED
from hybridcache.scheduling.planner import TILE as TILE

SMALL_TILES = (16, 32)
"""Smaller tiles that the kernels support, so that checkpoints can be at multiples of them."""

CPU_BUDGET, DEVICE_BUDGET = 1024, 8192
"""Tokens of a step. A step of a large mixture reads nearly all experts, for 1,024 tokens as for
8,192. On a fast device, more tokens share that cost. On a CPU, a longer step only delays decoding
requests."""
CPU_STEP_S = 1.0
"""Default of ``step_s`` on a CPU."""

BUILTIN_NAME = "builtin"
BUILTIN_DIR = Path(__file__).parent / "models" / BUILTIN_NAME
"""Directory of the built-in model, a small hybrid over bytes, similar to Qwen3-Next.

``training.json`` has the commit with the code that trained it, the data and the scores.
"""

BUILTIN_PROMPTS = (
    "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?",
    "Kira starts with 6 pens. Then Kira gets 3 times as many. How many pens does Kira have now?",
    "Leo has 10 eggs. Leo finds 5 eggs in a basket. Leo loses 3 eggs. How many eggs does Leo have "
    "now?",
)
"""Messages that the built-in model answers correctly, also when sampled at temperature 1."""

OF_CACHE = ("checkpoints", "eviction", "exact", "checkpoint_dtype")
"""Settings that have no effect without a prefix cache."""
NEEDS = {"disk_gib": "state_dir", "state_dir_mismatch": "state_dir", "draft_running": "draft"}
NEEDS |= {"fetch_above": "prefill", "transfer_timeout_s": "role"}
"""Setting -> the one without which it has no effect."""

DRAFT_LENS = {"tree": (8, 32), "mtp": (3, 4)}
"""Drafter -> (default, maximum) number of tokens drafted for a sequence in one step."""
DRAFTED_FULLY = 4
"""Number of sequences that may have drafts of full length in one step. More sequences share the
same number of verified tokens."""


class ConfigError(ValueError):
    """Error for a setting that cannot work. The message is one sentence with a remedy."""


class HubError(ValueError):
    """The model cannot be downloaded; the message gives the reason in one sentence."""


class Limits(NamedTuple):
    """Allowed values of a number."""

    words: str
    """Allowed values, to follow "must be"."""
    least: float
    most: float = math.inf
    is_whole: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError unless ``value`` is allowed."""
        is_number = isinstance(value, Integral if self.is_whole else Real)
        if (
            not is_number
            or isinstance(value, bool)
            or not self.least <= value <= self.most
            or value == math.inf
        ):
            raise ConfigError(f"{name} must be {self.words} (got {value!r}).")


ABOVE_0 = math.ulp(0)
"""Smallest positive number."""
COUNT = Limits("an integer of 1 or more", 1, is_whole=True)
GIB_SIZE = Limits("a number of GiB above 0, at most 1,048,576", ABOVE_0, 2**20)
HOST_SIZE = Limits("a number of GiB of 0 or more, at most 1,048,576", 0, 2**20)
MIB_SIZE = Limits("a number of MiB of 0 or more", 0, 2**30)
SECONDS = Limits("a number of seconds above 0, at most 1e6", ABOVE_0, 1e6)
BOUND = Limits("a number of seconds of 0 or more, at most 1e6", 0, 1e6)
SEED = Limits("an integer from 0 to 2**63 - 1", 0, 2**63 - 1, is_whole=True)
BUDGET = Limits(f"at least {TILE}, which is one tile of the kernels", TILE, is_whole=True)


def check_fields(settings: Any) -> None:
    """Raise ConfigError unless every field has a value that its annotation allows. A text, also a
    path, may be empty only by default."""
    for name, default, words, limits, is_optional, is_text in _rules(settings.__class__):
        value = getattr(settings, name)
        if value is default or (value is None and is_optional):
            continue
        if words and value not in words:
            allowed = ", ".join([*(("none",) if is_optional else ()), *words])
            raise ConfigError(f"{name} must be one of {allowed} (got {value!r}).")
        if is_text and (not isinstance(value, str | os.PathLike) or value == ""):
            raise ConfigError(f"{name} must be text that is not empty (got {value!r}).")
        if limits is not None:
            limits.check(name, value)


@functools.cache
def _rules(kind: type) -> list[tuple[str, object, tuple[str, ...], Limits | None, bool, bool]]:
    """Return (name, default, words, limits, may be None, is a text) of each field."""
    hints, rules = typing.get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        hint, limits = hints[field.name], None
        if typing.get_origin(hint) is Annotated:
            hint, limits = typing.get_args(hint)
        parts = (hint, *typing.get_args(hint))
        words = next((typing.get_args(p) for p in parts if typing.get_origin(p) is Literal), ())
        is_text = hint in (str, str | None)
        rules.append((field.name, field.default, words, limits, type(None) in parts, is_text))
    return rules


class DraftSizes(NamedTuple):
    """Memory that a runner needs for drafts."""

    max_len: int = 0
    """Maximum number of tokens drafted for one sequence in one step; 0 if there are no drafts."""
    head_len: int = 0
    """The same for the model's multi-token head; 0 if the head is not used."""


@dataclass(frozen=True, slots=True)
class EngineConfig(Settings):
    """Settings of one engine, those of its optional parts included. Raises ConfigError for a bad
    value, or for values that contradict each other."""

    _elsewhere: ClassVar = {"policy": "use eviction", "placement": "use checkpoints"}
    model: str | None = None
    """Model directory, GGUF file, or ORG/NAME of the Hugging Face Hub; ORG/NAME:Q4_K_M is a GGUF
    file there, and a directory of that name is preferred; by default the built-in byte model, which
    is small and trained on code and synthetic tasks."""
    revision: str | None = None
    """For a model of the hub: branch, tag or commit; by default its main branch."""
    tokenizer: str | None = None
    """Directory, GGUF file or ORG/NAME of the tokenizer, or builtin; by default that of the
    model."""
    chat_template: str | None = None
    """File with a chat template in place of the model's, or tools-first; that is the form of
    Qwen2.5 and Qwen3 with the tools before the system text, so that sessions share them."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: read the weights; dummy: seeded random weights for any config.json."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and KV; auto: that of the model, or the device's default."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of recurrent states; bfloat16 halves their size and rounds them every 64 tokens
    (or --grid, if that is less) of a prompt and at every token of an answer; 8 bits are for
    checkpoints only (--checkpoint-dtype), because errors of a running state accumulate."""
    checkpoint_dtype: str = "auto"
    """Number format of states in checkpoints: auto, bfloat16, int8 or fp8; the last two with a
    scale per channel, or per head as in int8:head; auto: unchanged and exact."""
    quantization: Literal["int8", "fp8", "int4", "int4-128"] | None = None
    """Quantize weights to 8 bits while loading, or on a CPU to 4 bits; these have groups of 32 or
    128 columns."""
    fp8_activations: bool = False
    """Also round the inputs of products with fp8 weights to fp8, in blocks of 128, on a GPU: faster
    prompts, less exact."""
    device: str | None = None
    """cpu, cuda, ...; by default the best one found."""
    kernels: str = ""
    """Kernel backends, as in attention=reference,gdn=fused; empty: the device's best."""
    graphs: Literal["auto", "off", "decode", "all"] = "auto"
    """Device graphs of decode steps, or of all steps."""
    warm_up: bool = True
    """Compile kernels, capture graphs and load the grammar library at the start; otherwise this is
    done on first use, while requests wait."""
    sampling_defaults: Literal["model", "none"] = "model"
    """Sampling parameters of a request that sets none; model: those of its
    generation_config.json."""
    seed: Annotated[int, SEED] = 0
    """Seed of dummy weights, and of requests without a seed, such as all messages of a chat."""

    prefix_cache: Literal["hybrid", "none"] = "hybrid"
    """hybrid: KV, and checkpoints of states if the model has any; none: no cache."""
    checkpoints: tuple[str, ...] = ("adaptive",)
    """Positions at which states are saved: adaptive, branch, boundary, backoff, end, every:1024,
    ...; names of placements, joined by commas."""
    eviction: str = "survival"
    """Eviction policy: survival, lru, gdsf, sieve, ...; an unknown name lists all."""
    grid: Annotated[int, COUNT] = TILE
    """Checkpoint positions are multiples of this number of tokens; a multiple of 64, or, for short
    prompts, 32 or 16 with kernels that support such tiles."""
    page_size: Annotated[int, COUNT] = 1
    """KV allocation unit, tokens."""
    exact: bool = False
    """Reuse only tokens that a prefill computed, so that a hit does not change the logits."""

    cache_gib: Annotated[float | None, GIB_SIZE] = None
    """Memory for KV and states together, GiB; one arena, of each replica; by default a quarter of
    the free memory, at most 4 GiB, on a CPU, and elsewhere 90 % of the memory that weights, graphs
    and the largest step leave."""
    max_model_len: Annotated[int | None, Limits("an integer of 2 or more", 2, is_whole=True)] = None
    """Maximum number of tokens of prompt and answer; by default that of the model."""

    max_running: Annotated[int, COUNT] = 16
    """Requests computed at the same time."""
    token_budget: Annotated[int | None, BUDGET] = None
    """Tokens computed per step, including decoded ones; at least 64 are for prompts, regardless of
    the number of decoding requests; by default 1024 on a CPU, 8192 elsewhere."""
    step_s: Annotated[float | None, BOUND] = None
    """Seconds that a step of a prompt should take, or half of it while others wait; long prompts
    are computed in smaller parts, with the same bits, so that other requests, /metrics and the page
    wait less; a part has at least 64 tokens, and at most --token-budget; 0: no limit; by default 1
    on a CPU without --token-budget, and no limit elsewhere."""
    admission: str = "sessions"
    """Policy that admits waiting requests: sessions, sessions:N, oldest, cached-first,
    longest-match, live:N, or module:Class; sessions: resident ones first, others as the cache
    permits, and after N seconds; live:N: that many sessions at a time."""
    max_queue: Annotated[int, COUNT] = 1024
    """Requests in progress beyond --max-running; further ones are refused."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Prepare the next step while the device computes this one, except for steps with drafts; auto:
    on devices that compute asynchronously."""
    check: bool = False
    """Verify the request table after every step, and every cache invariant whenever the engine is
    idle."""

    host_gib: Annotated[float | None, HOST_SIZE] = None
    """Host memory for entries that are evicted from the device, GiB; by default they are lost, or
    stay on disk (--state-dir); 0: none."""
    state_dir: str | None = None
    """Folder on disk that keeps a copy of the cache for the next start, even after a kill; also the
    lowest tier; by default nothing is written."""
    state_dir_mismatch: Literal["refuse", "empty"] = "refuse"
    """If --state-dir has entries of another model, format or kernel: refuse to start, or delete
    them."""
    disk_gib: Annotated[float | None, GIB_SIZE] = None
    """Maximum size of --state-dir, GiB; by default 2.5 times device and host memory, and at most 90
    % of the free disk."""

    draft: str = "none"
    """Draft tokens and verify them together: tree:8, mtp:3, tree,mtp, or none; a step may then
    produce several tokens; tree: text that followed earlier, in the cache or in the request itself,
    at most 8 tokens; mtp: the model's own multi-token head; tree,mtp: the head if the tree has no
    draft."""
    draft_running: Annotated[int | None, COUNT] = None
    """Maximum number of requests that decode in a step with drafts (default: 4 on a CPU, where more
    requests lose speed with drafts; no limit on a device)."""

    tp: Annotated[int, COUNT] = 1
    """Processes that compute the model together; each a part of every layer, and each on its own
    device if there are several."""

    role: Literal["prefill", "decode"] | None = None
    """Compute prompts for decode engines, or have them computed by prefill engines; by default
    neither; a prefill engine also serves its own requests."""
    transfer_at: str | None = None
    """With role prefill: HOST:PORT to listen on for decode engines; in a trusted network."""
    prefill: tuple[str, ...] = ()
    """With role decode: HOST:PORT of every prefill engine."""
    fetch_above: Annotated[int, COUNT] = 256
    """With role decode: prompts with fewer tokens that are not cached are computed here."""
    transfer_timeout_s: Annotated[float, SECONDS] = 10.0
    """With a role: seconds without a message after which the other engine is considered gone; must
    be longer than a step of the prefill engine."""

    def settled(self, *, on_cpu: bool) -> EngineConfig:
        """Return the settings with defaults for those that depend on the device and the machine."""
        budget = CPU_BUDGET if on_cpu else DEVICE_BUDGET
        step_s = CPU_STEP_S if on_cpu and self.token_budget is None else 0.0
        return dataclasses.replace(
            self,
            token_budget=self.token_budget or budget,
            step_s=step_s if self.step_s is None else self.step_s,
        )

    @property
    def model_dir(self) -> Path:
        """Directory of config.json and the weights, or a GGUF file."""
        return Path(self.model) if self.model else BUILTIN_DIR

    @property
    def tile_size(self) -> int:
        """Tokens per tile of the kernels of recurrent states. States after whole tiles can be
        checkpoints."""
        return min(self.grid, TILE)

    @property
    def most_step_tokens(self) -> int:
        """Maximum number of tokens of one step. Requires settled settings."""
        assert self.token_budget is not None
        return max(self.token_budget, self.max_running + TILE) + self.num_step_states

    @property
    def has_tiers(self) -> bool:
        """True if evicted entries move to the host's memory or to a disk."""
        return self.host_gib is not None or self.state_dir is not None

    @property
    def drafters(self) -> dict[str, int]:
        """Drafters in the order in which they are tried -> maximum number of tokens that each
        drafts for a sequence in one step. Raises ConfigError."""
        lengths: dict[str, int] = {}
        for word in self.draft.split(",") if self.draft != "none" else ():
            name, colon, number = word.partition(":")
            usual, limit = DRAFT_LENS.get(name, (0, 0))
            most = usual if not colon else int(number) if number.isdecimal() else 0
            if name in lengths or not 1 <= most <= limit:
                known = " and ".join(
                    f"{name} (1 to {limit} tokens, as in {name}:{usual})"
                    for name, (usual, limit) in DRAFT_LENS.items()
                )
                raise ConfigError(
                    f"draft must be none, or drafters joined by a comma, each once: {known}; not "
                    f"{self.draft!r}."
                )
            lengths[name] = most
        return lengths

    @property
    def drafts(self) -> DraftSizes:
        """Memory that the runner needs for drafts."""
        lengths = self.drafters
        return DraftSizes(max(lengths.values(), default=0), lengths.get("mtp", 0))

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

    @property
    def num_step_states(self) -> int:
        """Maximum number of verified tokens of the sequences with drafts in one step. The state
        after each of them is kept."""
        longest = self.drafts.max_len
        return (1 + longest) * min(self.max_running, DRAFTED_FULLY) if longest else 0

    @property
    def cache_bytes(self) -> int | None:
        """Memory of KV and states in bytes, for all ranks together, or None if it is not set."""
        return None if self.cache_gib is None else int(self.cache_gib * GIB)

    def __post_init__(self) -> None:
        if self.host_gib == 0:
            object.__setattr__(self, "host_gib", None)
        check_fields(self)
        if self.grid % TILE and self.grid not in SMALL_TILES:
            small = " or ".join(map(str, SMALL_TILES))
            raise ConfigError(f"grid must be {small} or a multiple of {TILE}, not {self.grid}.")
        try:
            CheckpointFormat.parse(self.checkpoint_dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        places = self.checkpoints
        if isinstance(places, str):
            places = tuple(places.split(","))
        object.__setattr__(self, "checkpoints", tuple(places))
        changed = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        for name in sorted(changed & {*OF_CACHE}) if self.prefix_cache == "none" else ():
            raise ConfigError(f"--{name.replace('_', '-')} requires --prefix-cache hybrid.")
        for name, needed in NEEDS.items():
            if name in changed and needed not in changed:
                raise ConfigError(f"{name} requires --{needed.replace('_', '-')}.")
        head_len = self.drafts.head_len
        if self.tp > 1:
            for is_set, what in (
                (self.has_tiers, "host and disk tiers: remove --host-gib and --state-dir"),
                (head_len > 0, "the multi-token head: use draft tree, or none"),
                (self.graphs in ("decode", "all"), "graphs: set graphs to auto or off"),
                (self.role is not None, "roles: remove --role"),
                (":" in (self.device or ""), "a numbered device: remove the number of --device"),
            ):
                if is_set:
                    raise ConfigError(f"--tp does not support {what}.")
        self._check_role()

    def _check_role(self) -> None:
        for role, name in (("prefill", "transfer_at"), ("decode", "prefill")):
            if (self.role == role) != bool(getattr(self, name)):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"--role {role} and {flag} HOST:PORT require each other: set both."
                )
        _ = self.addresses
        if self.role is not None and (self.prefix_cache == "none" or self.has_tiers):
            raise ConfigError(
                f"--role {self.role} requires a prefix cache without tiers: remove --prefix-cache "
                "none, --host-gib and --state-dir."
            )


def check_no_foreign_kernels() -> None:
    """Raise ConfigError if Hugging Face's ``kernels`` is installed, a package with the name of
    ours."""
    with suppress(metadata.PackageNotFoundError):
        raise ConfigError(
            f"The distribution 'kernels' {metadata.version('kernels')} is installed in the same "
            "environment as this project, which has a package of the same name: run "
            "`pip uninstall kernels`, or install this project into a separate environment."
        )
