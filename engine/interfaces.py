"""What an engine is put together from: the parts it asks for, and how its settings find them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from engine.config import ConfigError, EngineConfig
from engine.requests.sampling_params import SamplingInput
from engine.schedule.batch import Batch
from engine.text.outputs import SampledToken
from hybridcache.build import CacheConfig
from hybridcache.geometry.model import ModelGeometry

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


class Runner(Protocol):
    """What the engine asks of a model runner."""

    @property
    def num_kv_tokens(self) -> int: ...

    @property
    def num_slots(self) -> int:
        """0: an attention-only model."""
        ...

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
        """Logits, indexable by row: one for a segment that wants its last, one per token where it wants all.

        ``drawn`` are the ``tokens`` drawn by the step before, for ``batch.late_tokens``."""
        ...


class Drawn(Protocol):
    """Tokens on their way from the device."""

    tokens: Any
    """What ``Runner.forward`` takes: they need not be waited for."""

    def wait(self) -> Sequence[SampledToken]:
        """The tokens, as soon as they are there."""
        ...


class Chooser(Protocol):
    """What the engine asks of a sampler."""

    def launch(self, logits: Any, requests: Sequence[SamplingInput], rows: Sequence[int]) -> Drawn:
        """Begin to draw a token for each request, from its row of ``logits``; what else the device has to do may go on."""
        ...

    def score(self, logits: Any, token_ids: Sequence[int], num_top: int) -> Drawn:
        """Begin to find the log-probabilities of given tokens, one per row."""
        ...


def load(config: EngineConfig) -> tuple[Runner, Chooser, Tokenizer]:
    """Model, sampler and tokenizer that ``config`` names. Imports torch."""
    from engine.run.model_runner import ModelRunner
    from engine.run.sampler import Sampler
    from engine.text.tokenizer import load_tokenizer

    runner = ModelRunner(config)
    tokenizer = load_tokenizer(config.tokenizer or config.model)
    return runner, Sampler(runner.vocab_size), tokenizer


def cache_config(config: EngineConfig, runner: Runner) -> CacheConfig:
    """What the runner's pools hold, as the cache that ``config`` names. ConfigError: the model does not suit it."""
    stateful = runner.num_slots > 0
    kind = config.prefix_cache
    if stateful and kind == "radix":
        raise ConfigError(
            "prefix_cache=radix keeps KV alone, but this model has linear-attention layers that need their state too: "
            "use hybrid, or none."
        )
    return CacheConfig(
        prefix_cache="radix" if kind == "hybrid" and not stateful else kind,
        num_kv_tokens=runner.num_kv_tokens,
        num_slots=runner.num_slots,
        page_size=config.page_size,
        grid=config.grid,
        eviction=config.eviction,
        kv_bytes_per_token=runner.geometry.kv_bytes_per_token,
        state_bytes=max(runner.geometry.state_bytes, 1),
    )
