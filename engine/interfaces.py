"""Interfaces of the engine: model runner, sampler and observer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from msgspec import Struct

from engine.requests.request import SamplingInput
from engine.schedule.scheduler import Batch, Newest, PendingTokens
from hybridcache.geometry.model import ModelGeometry
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
            return "not checked: Triton's kernels are checked on a GPU, with --warm-up"
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
    prefilled: tuple[tuple[int, int], ...]
    """(start, end) of each computed part of a prompt."""
    num_decode_tokens: int

    @property
    def num_prefill_tokens(self) -> int:
        return sum(end - start for start, end in self.prefilled)

    @property
    def computed_s(self) -> float:
        """Time from the scheduled step to its tokens."""
        return self.forward_s + self.sample_s + self.wait_s


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
    def step_state_bytes(self) -> int:
        """Bytes of the states after each verified token, outside the cache's memory."""

    @property
    def is_asynchronous(self) -> bool:
        """True if ``forward`` returns before the device is done."""

    def forward(self, batch: Batch, drawn: Any = None) -> Any:
        """Compute a batch and return its logits: one row for a segment with ``logits`` "last", one
        per token for "all".

        ``drawn`` are the ``tokens`` sampled by the previous step, for ``batch.late_tokens``.
        """

    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """Accept ``taken`` tokens of each segment with drafts of the ``batch`` computed last; 0 if
        its state is not needed.

        Its state advances by that many tokens. Exports up to that position are in their slots
        afterwards. Not called for a batch without drafts.
        """

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Tokens]:
        """Draft tokens after each newest token, which is not computed yet, with the model's
        multi-token head.

        Returns at most ``most`` tokens for each (1 or more) as int32. Called between the ``commit``
        of a batch and the next ``forward``.
        """

    def attach_tiers(self, copier: Callable[..., Any], num_host_rows: int) -> float | None:
        """Execute transfers between tiers with the copier that ``copier`` makes for this runner: of
        the arena (uint8 ``[N, row_bytes]``), its sizes, the device and ``num_host_rows``.

        Returns the measured bandwidth from host memory to the device; None if there is no host
        tier. Raises ModelError if the memory cannot be allocated.
        """

    def identity(self, weights_digest: str | None = None) -> Mapping[str, str]:
        """Describe everything that the bits of KV and states depend on, and their layout: engines
        that share these can exchange them. ``weights_digest`` is a saved digest of the weights; if
        it is None, the weights are read."""

    def table_row(self, row: int, end: int) -> Indices:
        """Return the KV indices of the positions of ``row`` below ``end``, as far as batches
        assigned them: int32, a view."""


class TokenSampler(Protocol):
    """Interface between the engine and the sampler."""

    def launch(
        self, logits: Any, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> PendingTokens:
        """Start sampling a token for each request from its row of ``logits``, without waiting for
        the device."""

    def score(self, logits: Any, token_ids: Sequence[int], num_top: int) -> PendingTokens:
        """Start computing the log-probabilities of the given tokens, one per row."""
