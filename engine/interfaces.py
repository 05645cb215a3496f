"""Interfaces of the engine: model runner, sampler, observer, plugin, and the engine itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from engine.config import EngineConfig
from engine.requests.request import RecentRequests, Request
from engine.requests.spec import RequestSpec, SamplingInput
from engine.schedule.batch import Batch, Newest, PendingTokens, StepHooks
from engine.schedule.fetching import Fetcher
from engine.schedule.report import CacheReport
from engine.text.outputs import FinishReason, RequestOutput
from hybridcache.cache import HybridRadixCache
from hybridcache.geometry.model import ModelGeometry
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.memory_sizes import MemorySizes
from hybridcache.tokens import Indices, Tokens


class Exactness(Struct, frozen=True):
    """Result of the check at the start that hits equal cold runs; see ``engine.runner.build``."""

    digest: str = ""
    """Digest of the checked numbers. Empty if nothing was checked."""
    different: tuple[str, ...] = ()
    """Results with different bits: ``hits``, ``batches``, ``logits``."""
    rounded_to: str = ""
    """Format to which checkpoints are rounded, so that hits differ. Empty if they are not."""

    @property
    def sentence(self) -> str:
        if not self.digest:
            return "not checked: only the kernels of the CPU are"
        if self.different:
            return (
                f"NOT exact with these kernels on this processor: {', '.join(self.different)} "
                "differ from a cold run in the last bits; the server continues"
            )
        if self.rounded_to:
            return (
                f"NOT exact: checkpoints are rounded to {self.rounded_to}, so hits differ slightly "
                "from cold runs; --checkpoint-dtype auto is exact"
            )
        return "hits on prompt tokens equal cold runs bit for bit (checked at the start)"

    @property
    def fingerprint(self) -> str:
        """Value of ``system_fingerprint`` in responses. Engines with equal weights, settings and
        fingerprints compute equal bits."""
        if not self.digest:
            return "unchecked"
        is_exact = not self.different and not self.rounded_to
        return f"{'exact' if is_exact else 'inexact'}-{self.digest[:12]}"


@dataclass(frozen=True, slots=True)
class StepReport:
    """Times and sizes of one step."""

    schedule_s: float
    forward_s: float
    sample_s: float
    wait_s: float
    """Time spent waiting for the device after the host's own work."""
    commit_s: float
    num_prefill_tokens: int
    num_decode_tokens: int


Observer = Callable[[StepReport], None]
"""Called after every step."""


class RunnerLost(RuntimeError):
    """The runner can compute nothing any more; the message gives the reason in one sentence."""


class Runner(Protocol):
    """Interface between the engine and the runner of a model."""

    @property
    def memory(self) -> MemorySizes: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def geometry(self) -> ModelGeometry: ...

    @property
    def exactness(self) -> Exactness: ...

    @property
    def is_asynchronous(self) -> bool:
        """True if ``forward`` returns before the device is done."""
        ...

    def forward(self, batch: Batch, drawn: Any = None) -> Any:
        """Compute a batch and return its logits: one row for a segment with ``logits`` "last", one
        per token for "all".

        ``drawn`` are the ``tokens`` sampled by the previous step, for ``batch.late_tokens``.
        """
        ...

    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """Accept ``taken`` tokens of each segment with drafts of the ``batch`` computed last; 0 if
        its state is not needed.

        Its state advances by that many tokens. Exports up to that position are in their slots
        afterwards. Not called for a batch without drafts.
        """
        ...

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Tokens]:
        """Draft tokens after each newest token, which is not computed yet, with the model's
        multi-token head.

        Returns at most ``most`` tokens for each (1 or more) as int32. Called between the ``commit``
        of a batch and the next ``forward``.
        """
        ...

    def attach_tiers(self, copier: Callable[..., Any], num_host_rows: int) -> float | None:
        """Execute transfers between tiers with the copier that ``copier`` makes for this runner: of
        the arena (uint8 ``[N, row_bytes]``), its sizes, the device and ``num_host_rows``.

        Returns the measured bandwidth from host memory to the device; None if there is no host
        tier. Raises ModelError if the memory cannot be allocated.
        """
        ...

    def identity(self, weights_digest: str | None = None) -> Mapping[str, str]:
        """Describe everything that the computed bits depend on. ``weights_digest`` is a saved
        digest of the weights; if it is None, the weights are read."""
        ...

    def table_row(self, row: int, end: int) -> Indices:
        """Return the KV indices of the positions of ``row`` below ``end``, as far as batches
        assigned them: int32, a view."""
        ...


class TokenSampler(Protocol):
    """Interface between the engine and the sampler."""

    def launch(
        self, logits: Any, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> PendingTokens:
        """Start sampling a token for each request from its row of ``logits``, without waiting for
        the device."""
        ...

    def score(self, logits: Any, token_ids: Sequence[int], num_top: int) -> PendingTokens:
        """Start computing the log-probabilities of the given tokens, one per row."""
        ...


class EngineCore(Protocol):
    """Part of ``Engine`` that loops, plugins and observers use."""

    config: EngineConfig
    runner: Runner
    interrupted: tuple[str, ...]
    clock: Callable[[], float]
    recent: RecentRequests

    @property
    def model_name(self) -> str: ...
    @property
    def cache(self) -> HybridRadixCache: ...
    @property
    def requests(self) -> Collection[Request]: ...
    def report(self) -> CacheReport: ...
    def observe(self, observer: Observer) -> None: ...
    @property
    def num_waiting(self) -> int: ...
    def validate(self, spec: RequestSpec) -> RequestSpec: ...
    def make(self, spec: RequestSpec) -> Request: ...
    def enqueue(self, request: Request) -> None: ...
    def abort(self, request_id: str, reason: FinishReason = "abort") -> RequestOutput | None: ...
    def step(self) -> list[RequestOutput]: ...
    def take_outputs(self) -> list[RequestOutput]: ...
    def has_work(self) -> bool: ...
    def run_idle_tasks(self) -> float | None: ...
    def on_work(self, wake: Callable[[], None]) -> None: ...
    def stop_accepting(self) -> None: ...
    def disconnect(self) -> None: ...
    def close(self) -> None: ...


class Plugin(StepHooks):
    """One optional capability of one engine. Every method does nothing unless it is overridden.

    A plugin is made from the engine's settings before anything is loaded. While the engine is
    built, the hooks are called in the order in which they are listed here. Afterwards those of
    ``StepHooks`` are called.
    """

    name: str
    """Name of the plugin's folder."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.wake: Callable[[], None] = lambda: None
        """Wakes an idle engine because ``before_step`` has work. Safe to call from any thread."""

    def open_manager(self, manager: CacheManager, runner: Runner) -> Fetcher | None:
        """Prepare the new ``manager``. Returns a fetcher of prefixes, or None."""
        return None

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        """Start work for the complete engine."""

    def start_screen(self) -> Sequence[tuple[str, str]]:
        """Return lines of the start screen: (title, text)."""
        return ()
