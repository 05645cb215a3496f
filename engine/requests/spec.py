"""Specification of one request, built by the server, the command line or user code."""

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
    """None for the model's recommendation."""
    namespace: Hashable = None
    """Requests of different namespaces share nothing of the cache. None, a str, bytes, an int, or a
    tuple of these."""
    boundaries: Sequence[int] = ()
    """Positions known to survive into later prompts; those outside the prompt are left out."""
    answer_survives: bool = True
    """False if later prompts are known to leave this one before its end: no state is saved past
    it."""
    ends_session: bool = False
    """True if no request of this session follows, as the client says."""
    save_at: Sequence[int] = ()
    """Positions of the prompt at which its state is saved for any placement policy, floored to the
    grid."""
    prompt_logprobs: int | None = None
    """Number of alternatives to report with the prompt's log-probabilities, which are computed
    without the cache; None to report none."""
    request_id: str | None = None
    """None to have one chosen."""
    grammar: Grammar | None = None
    """Grammar of the answer; None if it is free."""

    @classmethod
    def of(
        cls, prompt: Prompt | RequestSpec, sampling: SamplingParams | None, options: dict[str, Any]
    ) -> RequestSpec:
        """Return ``prompt`` if it is a whole spec already, else a spec of these fields. Raises
        TypeError for an unknown option, or for options next to a whole spec."""
        if not isinstance(prompt, RequestSpec):
            return cls(prompt, sampling, **options)
        if sampling is not None or options:
            raise TypeError("a RequestSpec is complete: set its fields, and pass no other options.")
        return prompt
