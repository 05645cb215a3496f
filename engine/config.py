"""Settings of an engine, and the base of the settings of plugins.

The flags of the command line and their help are derived from the fields and their docstrings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar

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
MIB_SIZE = Limits("a number of MiB of 0 or more", 0, 2**30)
SECONDS = Limits("a number of seconds above 0, at most 1e6", ABOVE_0, 1e6)
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
def _rules(kind: type) -> list[tuple[str, Any, tuple[str, ...], Limits | None, bool, bool]]:
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
class PluginConfig:
    """Settings of one plugin. Their words and limits are checked when it is made."""

    plugin: ClassVar[str]
    """Name of the plugin's folder."""
    title: ClassVar[str]
    """Title of the plugin's flags in the help."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def is_used(self) -> bool:
        """True if these settings differ from the defaults, so that the plugin is loaded."""
        return self != type(self)()

    @property
    def num_ranks(self) -> int:
        """Number of processes that compute the model together."""
        return 1

    @property
    def drafts(self) -> DraftSizes:
        """Memory that the runner needs for drafts."""
        return DraftSizes()

    @property
    def host_bytes(self) -> Mapping[str, int]:
        """Memory of the host that each setting reserves, in bytes."""
        return {}

    def check(self, config: Any) -> None:
        """Raise ConfigError if these settings contradict the other ones of ``config``."""


P = TypeVar("P", bound=PluginConfig)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine. Raises ConfigError for a bad value. ``engine.engine_config`` takes
    the settings of plugins as keywords too."""

    plugins: tuple[PluginConfig, ...] = dataclasses.field(default=(), kw_only=True)
    """Settings of the plugins in use."""

    model: str | None = None
    """Model directory in Hugging Face format, a GGUF file, or ORG/NAME of a model of the Hugging
    Face Hub, or ORG/NAME:Q4_K_M of a GGUF file there (a directory of that name is preferred); by
    default the built-in byte model, which is small and trained on code and synthetic tasks."""
    revision: str | None = None
    """For a model of the hub: branch, tag or commit; by default its main branch."""
    tokenizer: str | None = None
    """Directory or GGUF file of the tokenizer, ORG/NAME, or builtin, if it is not that of the
    model."""
    chat_template: str | None = None
    """File with a chat template in place of the model's, or tools-first: the form of Qwen2.5 and
    Qwen3, with the tools before the system text, so that sessions share them."""
    load_format: Literal["auto", "dummy"] = "auto"
    """auto: read the weights; dummy: seeded random weights for any config.json."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and KV; auto: that of the model, or the device's default."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of recurrent states; bfloat16 halves their size and rounds them every 64 tokens
    (or --grid, if that is less) of a prompt and at every token of an answer; 8 bits are for
    checkpoints only (--checkpoint-dtype), because errors of a running state accumulate."""
    checkpoint_dtype: str = "auto"
    """Number format of recurrent states in checkpoints: bfloat16, int8 or fp8, the last two with a
    scale per channel, or per head as in int8:head; auto: unchanged and exact."""
    quantization: Literal["int8", "fp8", "int4", "int4-128"] | None = None
    """Quantize weights to 8 bits while loading, or on a CPU to 4 bits in groups of 32 or 128
    columns."""
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
    """Positions at which states are saved: names of placements, joined by commas (adaptive, branch,
    boundary, backoff, end, every:1024, ...)."""
    eviction: str = "survival"
    """Eviction policy: survival, lru, gdsf, s3-fifo, ...; an unknown name lists all."""
    grid: Annotated[int, COUNT] = TILE
    """Checkpoint positions are multiples of this number of tokens: a multiple of 64, or, for short
    prompts, 32 or 16 with kernels that support such tiles."""
    page_size: Annotated[int, COUNT] = 1
    """KV allocation unit, tokens."""
    exact: bool = False
    """Reuse only tokens that a prefill computed, so that a hit does not change the logits."""

    cache_gib: Annotated[float | None, GIB_SIZE] = None
    """Memory for KV and states together, one arena, GiB (of each replica); by default a quarter of
    the free memory, at most 4 GiB, on a CPU, and elsewhere 90 % of the memory that weights, graphs
    and the largest step leave."""
    max_model_len: Annotated[int | None, Limits("an integer of 2 or more", 2, is_whole=True)] = None
    """Maximum number of tokens of prompt and answer; by default that of the model."""

    max_running: Annotated[int, COUNT] = 16
    """Requests computed at the same time."""
    token_budget: Annotated[int | None, BUDGET] = None
    """Tokens computed per step, including decoded ones; at least 64 are for prompts, regardless of
    the number of decoding requests; by default 1024 on a CPU, 8192 elsewhere."""
    admission: str = "sessions"
    """Policy that admits waiting requests: sessions (resident ones first, others as the cache
    permits), oldest, cached-first, longest-match, live:N (sessions at a time), or module:Class."""
    max_queue: Annotated[int, COUNT] = 1024
    """Requests in progress beyond --max-running; further ones are refused."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Prepare the next step while the device computes this one, except for steps with drafts; auto:
    on devices that compute asynchronously."""
    check: bool = False
    """Verify the request table after every step, and every cache invariant whenever the engine is
    idle."""

    def of(self, kind: type[P]) -> P:
        """Return the settings of one plugin; its defaults if it is not in use."""
        return next((one for one in self.plugins if isinstance(one, kind)), None) or kind()

    def uses(self, plugin: str) -> bool:
        """Return whether a plugin is in use, by the name of its folder."""
        return any(one.plugin == plugin for one in self.plugins)

    def settled(self, *, on_cpu: bool) -> EngineConfig:
        """Return the settings with defaults for those that depend on the device and the machine."""
        budget = CPU_BUDGET if on_cpu else DEVICE_BUDGET
        return dataclasses.replace(self, token_budget=self.token_budget or budget)

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
    def drafts(self) -> DraftSizes:
        """Memory that the runner needs for drafts."""
        return max((one.drafts for one in self.plugins), default=DraftSizes())

    @property
    def num_step_states(self) -> int:
        """Maximum number of verified tokens of the sequences with drafts in one step. The state
        after each of them is kept."""
        longest = self.drafts.max_len
        return (1 + longest) * min(self.max_running, DRAFTED_FULLY) if longest else 0

    @property
    def num_ranks(self) -> int:
        """Number of processes that compute the model together."""
        return max((one.num_ranks for one in self.plugins), default=1)

    @property
    def cache_bytes(self) -> int | None:
        """Memory of KV and states in bytes, for all ranks together, or None if it is not set."""
        return None if self.cache_gib is None else int(self.cache_gib * GIB)

    def __post_init__(self) -> None:
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
        for field in dataclasses.fields(self) if self.prefix_cache == "none" else ():
            if field.name in OF_CACHE and getattr(self, field.name) != field.default:
                flag = "--" + field.name.replace("_", "-")
                raise ConfigError(f"{flag} requires --prefix-cache hybrid.")
        object.__setattr__(self, "plugins", tuple(one for one in self.plugins if one.is_used))
        for one in self.plugins:
            one.check(self)


def check_no_foreign_kernels() -> None:
    """Raise ConfigError if Hugging Face's ``kernels`` is installed, a package with the name of
    ours."""
    with suppress(metadata.PackageNotFoundError):
        raise ConfigError(
            f"The distribution 'kernels' {metadata.version('kernels')} is installed in the same "
            "environment as this project, which has a package of the same name: run "
            "`pip uninstall kernels`, or install this project into a separate environment."
        )
