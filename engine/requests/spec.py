"""What a request asks for, in one place: the server's front, the command line and a user's own code
build it, everything behind them reads it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.requests.grammar import Grammar
from engine.requests.sampling_params import SamplingParams

Prompt = str | Sequence[int] | np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class RequestSpec:
    """One prompt and how it is to be answered."""

    prompt: Prompt
    """A text, or token ids: a list or int[n]."""
    sampling: SamplingParams | None = None
    """None: as the model recommends."""
    namespace: Hashable = None
    """Requests of different namespaces share nothing of the cache. None, a str, bytes, an int, or a
    tuple of these."""
    boundaries: Sequence[int] = ()
    """Positions known to survive into later prompts; those outside the prompt are left out."""
    answer_survives: bool = True
    """False: later prompts are known to leave this one before its end, and no state is saved past
    it."""
    ends_session: bool = False
    """True: the client says that no request of this session follows."""
    save_at: Sequence[int] = ()
    """Positions of the prompt where its state is saved whatever the placement says, floored to the
    grid."""
    prompt_logprobs: int | None = None
    """Report the prompt's own log-probabilities with this many alternatives, for which no cache is
    read; None: do not."""
    request_id: str | None = None
    """None: one is given."""
    grammar: Grammar | None = None
    """What the answer must be; None: anything."""

    @classmethod
    def of(
        cls, prompt: Prompt | RequestSpec, sampling: SamplingParams | None, options: dict[str, Any]
    ) -> RequestSpec:
        """``prompt`` where it is a whole spec already, else one of these fields. TypeError: an
        option that is no field, or options beside a whole spec."""
        if not isinstance(prompt, RequestSpec):
            return cls(prompt, sampling, **options)
        if sampling is not None or options:
            raise TypeError("a RequestSpec says everything: set its fields, give nothing beside.")
        return prompt
