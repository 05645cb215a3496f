"""Reports of a runner and of a step, and the error of a runner that is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec import Struct


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
