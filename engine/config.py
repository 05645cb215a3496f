"""What an engine is started with. The command line's flags and their help are derived from these
fields."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from hybridcache.geometry.checkpoints import CheckpointFormat
from hybridcache.scheduling.planner import MAX_SCORED as MAX_SCORED
from hybridcache.scheduling.planner import TILE as TILE

SMALL_TILES = (16, 32)
"""Smaller ones that the kernels can be run with, so that checkpoints may lie on multiples of
them."""

CPU_BUDGET, DEVICE_BUDGET = 1024, 8192
"""Tokens of a step. A step of a large mixture reads nearly all its experts whether it has 1,024
tokens or 8,192, so on a device that computes quickly more of them share the reading; on a CPU a
longer step only keeps decoding requests waiting."""

MAX_LOAD_WORKERS = 16
"""Unless more are asked for."""

BUILTIN_NAME = "builtin"
BUILTIN_DIR = Path(__file__).parent / "models" / BUILTIN_NAME
"""Of the model that comes with the engine: a small hybrid of Qwen3-Next's kind over bytes, trained
by ``experiments/training/train_builtin.py``; its ``training.json`` says on what and how well."""

BUILTIN_PROMPTS = (
    "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?",
    "Kira starts with 6 pens. Then Kira gets 3 times as many. How many pens does Kira have now?",
    "Leo has 10 eggs. Leo finds 5 eggs in a basket. Leo loses 3 eggs. How many eggs does Leo have "
    "now?",
)
"""Messages that the built-in model answers correctly, also when sampled at temperature 1."""

DRAFT_LENS = {"tree": (8, 32), "mtp": (3, 4)}
"""Drafter to the tokens that it drafts for a sequence at a time: where no number is given, and at
most."""
DRAFTED_FULLY = 4
"""Sequences that may be drafted for in full length in one step; more share what these would
verify."""

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting that can not work, in one sentence that says what to do."""


def _setting(default: T, help: str, **metadata: Any) -> T:
    """A field with its help; typed as its default so that mypy reads the annotation."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Every choice of one engine; see each field's help. A bad value is a ConfigError."""

    model: str | None = _setting(
        None,
        "model directory in Hugging Face form, or ORG/NAME to take a model of the Hugging Face Hub "
        "(a directory of that name wins); none: the built-in byte model, small, trained on code "
        "and made-up tasks",
    )
    revision: str | None = _setting(
        None, "with a model of the hub: branch, tag or commit; none: its main branch"
    )
    tokenizer: str | None = _setting(
        None, "directory of the tokenizer, or ORG/NAME, where it is not the model's"
    )
    load_format: Literal["auto", "dummy"] = _setting(
        "auto", "auto: read the weights; dummy: seeded random weights for any config.json"
    )
    load_workers: int | None = _setting(
        None, "threads that read weights; none: one for every two cores, 16 at most"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "number format of weights and KV; auto: the model's own"
    )
    state_dtype: Literal["float32", "bfloat16"] = _setting(
        "float32",
        "number format of recurrent states; bfloat16 halves them and rounds them every 64 tokens "
        "(or --grid, if that is less) of a prompt, every token of an answer; 8 bits are for "
        "checkpoints only (--checkpoint-dtype), since errors of a running state add up",
    )
    checkpoint_dtype: str = _setting(
        "auto",
        "number format of recurrent states in checkpoints: bfloat16, int8 or fp8, the last two "
        "with a scale per channel, or as in int8:head; auto: as they are, exact",
    )
    quantization: Literal["int8", "fp8"] | None = _setting(
        None, "8-bit weights, made while loading"
    )
    device: str | None = _setting(None, "cpu, cuda, ...; none: the best one found")
    kernels: str = _setting(
        "", "kernel backends, as in attention=reference,gdn=fused; empty: the device's best"
    )
    tp: int = _setting(
        1,
        "processes that compute the model together, each with its part of every layer, and on a "
        "device of its own where there are any",
    )
    graphs: Literal["auto", "off", "decode", "all"] = _setting(
        "auto", "device graphs: of decode steps, or of prefills too"
    )
    warm_up: bool = _setting(
        True,
        "compile kernels and capture graphs at the start; without it on first use, while a request "
        "waits",
    )
    sampling_defaults: Literal["model", "none"] = _setting(
        "model",
        "what a request that says nothing is sampled with; model: as its generation_config.json "
        "says",
    )
    seed: int = _setting(0, "seed of dummy weights and of requests that bring none")

    prefix_cache: Literal["hybrid", "radix", "none"] = _setting(
        "hybrid", "hybrid: KV and state checkpoints; radix: KV alone, attention-only models"
    )
    checkpoints: tuple[str, ...] = _setting(
        ("adaptive",),
        "where states are saved: placement names joined by commas (adaptive, branch, boundary, "
        "backoff, end, every:1024, ...)",
    )
    eviction: str = _setting(
        "survival",
        "eviction policy: survival, lru, gdsf, s3-fifo, ...; an unknown name lists all",
    )
    grid: int = _setting(
        TILE,
        "checkpoint positions are multiples of it, tokens: a multiple of 64, or, for short "
        "prompts, 32 or 16, with kernels that compute as few at a time",
    )
    page_size: int = _setting(1, "KV allocation unit, tokens")
    exact: bool = _setting(
        False, "reuse only what a prefill computed: a hit then never changes a bit of the logits"
    )

    cache_gib: float | None = _setting(
        None,
        "memory for KV and states together, GiB: one arena; none: a quarter of the free memory, at "
        "most 4 GiB, on a CPU, and "
        "elsewhere 90 % of what weights, graphs and the largest step leave",
    )
    kv_gib: float | None = _setting(
        None, "memory for KV alone, GiB: two fixed pools instead of the arena, as a control"
    )
    state_gib: float | None = _setting(
        None,
        "memory for states alone, those of running requests and checkpoints alike, GiB: two fixed "
        "pools, as with --kv-gib",
    )
    host_gib: float | None = _setting(
        None,
        "host memory for what leaves the device's, GiB; none: what is evicted is gone, or "
        "on disk (--state-dir)",
    )
    state_dir: str | None = _setting(
        None,
        "folder on disk in which all that is cached is kept too, so that the next start has it, "
        "after a stop or a kill; also the tier below the others; none: nothing is written",
    )
    disk_gib: float | None = _setting(
        None, "most that --state-dir may take, GiB; none: 2.5 times device and host memory"
    )
    max_model_len: int | None = _setting(
        None, "most tokens of prompt and answer; none: the model's own"
    )

    draft: str = _setting(
        "none",
        "tokens guessed ahead and verified together, so that a step may give several: tree:8 (what "
        "followed here before, in the cache or in the request itself; at most 8 tokens), mtp:3 "
        "(the model's own multi-token head), tree,mtp (the head where the tree has nothing), or "
        "none",
    )
    draft_index_mib: float = _setting(
        64.0,
        "with draft tree: host memory for the index of running and ended texts, MiB, of 24 to 48 "
        "bytes a token; what does not fit is drafted for from the cache alone",
    )

    role: Literal["prefill", "decode"] | None = _setting(
        None,
        "prefill: compute the prompts of decode engines beside its own; decode: have prompts "
        "computed by prefill engines; none: on its own",
    )
    transfer_at: str | None = _setting(
        None,
        "with role prefill: HOST:PORT to listen on for decode engines, in a trusted network",
    )
    prefill: tuple[str, ...] = _setting((), "with role decode: HOST:PORT of every prefill engine")
    fetch_above: int = _setting(
        256, "with role decode: prompts that lack fewer tokens of what is cached are computed here"
    )
    transfer_timeout_s: float = _setting(
        10.0, "with a role: seconds of silence after which the other engine counts as gone"
    )

    max_running: int = _setting(16, "requests computed at the same time")
    token_budget: int | None = _setting(
        None,
        "tokens computed per step, decoded ones included; at least 64 are for prompts, however "
        "many decode; none: 1024 on "
        "a CPU, 8192 elsewhere",
    )
    admission: str = _setting(
        "sessions",
        "which waiting request is admitted first, and which must wait: sessions (resident ones "
        "first, others as the cache can bear), oldest, cached-first, longest-match, window:N, "
        "live:N (sessions at a time), or module:Class",
    )
    max_share: float | None = _setting(
        None,
        "most of the running places and of the memory that the requests of one tenant take while "
        "another tenant waits, 0 to 1; none: no limit",
    )
    max_queue: int = _setting(1024, "requests that may wait; one more is refused")
    grammar_budget_s: float = _setting(
        10.0,
        "seconds that the grammar of one request may take in the background, 5 ms for each token "
        "of the answer not counted; then the request fails, with an error that says so",
    )
    overlap: Literal["auto", "on", "off"] = _setting(
        "auto",
        "make the next step while the device computes this one, but for steps with drafts; auto: "
        "where it computes by itself",
    )
    check: bool = _setting(
        False,
        "verify the request table after every step, and every cache invariant whenever the engine "
        "is idle",
    )

    def settled(self, *, on_cpu: bool) -> EngineConfig:
        """With what is left to the device and the machine chosen."""
        budget = CPU_BUDGET if on_cpu else DEVICE_BUDGET
        return dataclasses.replace(
            self,
            token_budget=self.token_budget or budget,
            load_workers=self.load_workers or default_load_workers(),
        )

    @property
    def model_dir(self) -> Path:
        """Where config.json and weights lie."""
        return Path(self.model) if self.model else BUILTIN_DIR

    @property
    def tile_size(self) -> int:
        """Tokens per tile of the kernels of recurrent states: a state that may be a checkpoint is
        one after whole tiles."""
        return min(self.grid, TILE)

    @property
    def most_step_tokens(self) -> int:
        """No step computes more tokens. Of a settled config."""
        assert self.token_budget is not None
        return max(self.token_budget, self.max_running + TILE) + self.num_step_states

    @property
    def drafters(self) -> dict[str, int]:
        """Drafters in the order in which they are asked, and the most tokens that each drafts for a
        sequence in one step."""
        return {} if self.draft == "none" else _drafters(self.draft)

    @property
    def draft_len(self) -> int:
        """Most tokens drafted for one sequence in one step."""
        return max(self.drafters.values(), default=0)

    @property
    def num_step_states(self) -> int:
        """Most tokens, drafted and sure ones, of the sequences with drafts in one step: the state
        after each is kept."""
        return (1 + self.draft_len) * min(self.max_running, DRAFTED_FULLY) if self.draft_len else 0

    @property
    def has_lower(self) -> bool:
        """Whether there is memory below the device's."""
        return self.host_gib is not None or self.state_dir is not None

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """(host, port) that its role needs: its own as a prefill engine, of all prefill engines as
        a decode engine."""
        return _addresses(self.prefill if self.transfer_at is None else (self.transfer_at,))

    def _check_role(self) -> None:
        needed = {"prefill": "transfer_at", "decode": "prefill"}
        for role, name in needed.items():
            if (self.role == role) != bool(getattr(self, name)):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"--role {role} and {flag} HOST:PORT go together: give both.")
        _check_positive_int("fetch_above", self.fetch_above)
        if not 0 < self.transfer_timeout_s < 1e6:
            raise ConfigError(f"transfer_timeout_s must be above 0, not {self.transfer_timeout_s}.")
        if self.role is not None and self.prefix_cache == "none":
            raise ConfigError(
                f"--role {self.role} moves prefixes between caches: --prefix-cache none has none."
            )
        if self.role is not None and self.has_lower:
            raise ConfigError(
                f"--role {self.role} is served without memory below the device's: leave --host-gib "
                "and --state-dir out."
            )
        if not isinstance(self.prefill, tuple):
            raise ConfigError("prefill must be a tuple of addresses.")
        _ = self.addresses

    def __post_init__(self) -> None:
        for name in ("tp", "grid", "page_size", "max_running", "max_queue"):
            _check_positive_int(name, getattr(self, name))
        if self.load_workers is not None:
            _check_positive_int("load_workers", self.load_workers)
        budget = self.token_budget
        if budget is not None and (not isinstance(budget, int) or budget < TILE):
            raise ConfigError(
                f"token_budget must be at least {TILE}, one tile of the kernels, not {budget}."
            )
        if not 0 <= self.draft_index_mib < 2**30:
            raise ConfigError(
                f"draft_index_mib must be a number of MiB of 0 or more, not {self.draft_index_mib}."
            )
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise ConfigError(f"max_share must be above 0 and at most 1 (got {self.max_share}).")
        if not 0 < self.grammar_budget_s < 1e6:
            raise ConfigError(
                f"grammar_budget_s must be above 0 and below 1e6, not {self.grammar_budget_s}."
            )
        if self.grid % TILE and self.grid not in SMALL_TILES:
            small = " or ".join(map(str, SMALL_TILES))
            raise ConfigError(f"grid must be {small} or a multiple of {TILE}, not {self.grid}.")
        if self.max_model_len is not None:
            _check_positive_int("max_model_len", self.max_model_len)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be between 0 and 2**63 - 1, not {self.seed}.")
        for name in ("kv_gib", "state_gib", "cache_gib", "host_gib", "disk_gib"):
            size = getattr(self, name)
            if size is not None and not (isinstance(size, int | float) and 0 < size < 2**20):
                raise ConfigError(f"{name} must be a positive number of GiB, not {size}.")
        if self.cache_gib is not None and (self.kv_gib is not None or self.state_gib is not None):
            raise ConfigError("give cache_gib alone, or kv_gib and state_gib, not both.")
        if self.tp > 1 and self.has_lower:
            raise ConfigError("host_gib and state_dir are for one device: leave them out with tp.")
        if self.disk_gib is not None and self.state_dir is None:
            raise ConfigError("disk_gib is the size of a folder: name it with state_dir.")
        if self.state_dir == "":
            raise ConfigError("state_dir must name a folder; leave it out to keep nothing.")
        try:
            CheckpointFormat.parse(self.checkpoint_dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                allowed = ", ".join("none" if word is None else word for word in words)
                raise ConfigError(f"{name} must be one of {allowed}, not {getattr(self, name)!r}.")
        _ = self.drafters
        if self.tp > 1:
            self._check_shared()
        if self.model == "":
            raise ConfigError("model must name a directory; leave it out for the built-in one.")
        self._check_role()
        places = self.checkpoints
        if isinstance(places, str):
            places = tuple(places.split(","))
        object.__setattr__(self, "checkpoints", tuple(places))

    def _check_shared(self) -> None:
        """What several processes can not do together."""
        if "mtp" in self.drafters:
            raise ConfigError(
                "--tp is served without the multi-token head: use draft tree, or none."
            )
        if self.graphs in ("decode", "all"):
            raise ConfigError("--tp is served without graphs: leave graphs at auto or off.")
        if self.role is not None:
            raise ConfigError(f"--tp is served without roles: leave --role {self.role} out.")
        if self.device is not None and ":" in self.device:
            raise ConfigError(
                f"--tp gives every rank a device of its own: leave out the number of {self.device}."
            )


def default_load_workers() -> int:
    """One for every two cores: on two, 16 took 1.2 to 1.7 times as long as one and 1.7 times the
    processor's time, for packing wants the cores too."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone knows what a process may use.
        cores = os.cpu_count() or 1
    return min(max(cores // 2, 1), MAX_LOAD_WORKERS)


def _addresses(texts: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """(host, port) of each ``HOST:PORT``. ConfigError."""
    found = []
    for text in texts:
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ConfigError(f"{text!r} is no address: write HOST:PORT, as in 127.0.0.1:7000.")
        found.append((host.strip("[]"), int(port)))
    return tuple(found)


def _drafters(text: str) -> dict[str, int]:
    """Most tokens of every word of ``tree:8,mtp``. ConfigError."""
    words: dict[str, int] = {}
    for word in text.split(","):
        name, colon, number = word.partition(":")
        usual, limit = DRAFT_LENS.get(name, (0, 0))
        most = usual if not colon else int(number) if number.isdecimal() else 0
        if name in words or not 1 <= most <= limit:
            known = " and ".join(
                f"{name} (1 to {limit} tokens, as in {name}:{usual})"
                for name, (usual, limit) in DRAFT_LENS.items()
            )
            raise ConfigError(
                f"draft must be none, or drafters joined by a comma, each once: {known}; not "
                f"{text!r}."
            )
        words[name] = most
    return words


_WORDS: dict[str, tuple[str | None, ...]] = {
    "load_format": ("auto", "dummy"),
    "sampling_defaults": ("model", "none"),
    "state_dtype": ("float32", "bfloat16"),
    "quantization": (None, "int8", "fp8"),
    "graphs": ("auto", "off", "decode", "all"),
    "prefix_cache": ("hybrid", "radix", "none"),
    "overlap": ("auto", "on", "off"),
    "role": (None, "prefill", "decode"),
}
"""The settings that are one of a few words. (``dtype`` is the model's to judge.)"""


def _check_positive_int(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of 1 or more, not {value!r}.")
