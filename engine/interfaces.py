"""What may stand behind an engine: a runner of the model, a sampler of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from engine.plugins.tiers.disk import Disk
from engine.requests.sampling_params import SamplingInput
from engine.schedule.batch import Batch
from engine.schedule.drafter import Newest
from engine.text.outputs import SampledToken
from hybridcache.geometry.model import ModelGeometry
from hybridcache.scheduling.memory import MemorySizes
from hybridcache.tokens import Indices, Tokens


class RunnerLost(RuntimeError):
    """The runner can compute nothing any more, in one sentence that says why."""


class Below(Protocol):
    """Memory below a runner's own."""

    host_bytes_per_s: float | None
    """To the device, measured; None: there is no host tier."""


@runtime_checkable
class Losable(Protocol):
    """A runner whose parts may go while it has nothing to do."""

    def when_lost(self, order: Callable[[Callable[[], None]], None]) -> None:
        """Where that happens ``order`` gets, from any thread, what is to be called between two
        steps: it raises RunnerLost."""
        ...


class Runner(Protocol):
    """What the engine asks of a model runner."""

    @property
    def memory(self) -> MemorySizes: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def geometry(self) -> ModelGeometry: ...

    @property
    def is_asynchronous(self) -> bool:
        """``forward`` returns before the device is done."""
        ...

    def forward(self, batch: Batch, drawn: Any = None) -> Any:
        """Logits, indexable by row: one for a segment that wants its last, one per token where it
        wants all.

        ``drawn`` are the ``tokens`` drawn by the step before, for ``batch.late_tokens``."""
        ...

    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """Of the ``batch`` computed last, each segment with drafts keeps so many of its tokens (0:
        nobody wants its state): its state moves on by them, and the states that it exports at
        positions up to there are in their slots after. Not called for a batch without drafts."""
        ...

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> Sequence[Tokens]:
        """What the model's own multi-token head takes to follow each newest token, which is not
        computed yet: int32, at most as many as ``most`` says, 1 or more. Between the ``commit`` of
        a batch and the next ``forward``."""
        ...

    def attach(self, num_host_rows: int, disk: Disk | None) -> Below:
        """Have so many rows of host memory, and ``disk``, below the arena; batches may then order
        copies between them. ModelError: there is no such memory."""
        ...

    def identity(self) -> Mapping[str, str]:
        """All that the bits it computes depend on, in words."""
        ...

    def table_row(self, row: int, end: int) -> Indices:
        """KV indices of the positions of ``row`` below ``end``, as far as batches gave it any:
        int32, a view."""
        ...


class PendingTokens(Protocol):
    """Tokens on their way from the device."""

    tokens: Any
    """What ``Runner.forward`` takes: they need not be waited for."""

    def wait(self) -> Sequence[SampledToken]:
        """The tokens, as soon as they are there."""
        ...


class TokenSampler(Protocol):
    """What the engine asks of a sampler."""

    def launch(
        self, logits: Any, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> PendingTokens:
        """Begin to draw a token for each request, from its row of ``logits``; what else the device
        has to do may go on."""
        ...

    def keep(self, logits: Any, row: int) -> Any:
        """Copy one row of ``logits``, as logits of one row that outlive the next ``forward``."""
        ...

    def score(self, logits: Any, token_ids: Sequence[int], num_top: int) -> PendingTokens:
        """Begin to find the log-probabilities of given tokens, one per row."""
        ...
