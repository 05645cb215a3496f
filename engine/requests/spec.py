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
    """One prompt and the parameters of its answer."""

    prompt: Prompt
    """A text, or token ids: a list or int[n]."""
    sampling: SamplingParams | None = None
    """Sampling parameters, or None for the model's recommendation."""
    namespace: Hashable = None
    """Requests of different namespaces share no cache entries. None, a str, bytes, an int, or a
    tuple of these."""
    boundaries: Sequence[int] = ()
    """Positions at which later prompts are known to continue; positions outside the prompt are
    ignored."""
    answer_survives: bool = True
    """False if later prompts are known to differ from this one before its end. No state is saved
    past that point."""
    ends_session: bool = False
    """True if the client declared that no request of this session follows."""
    call_marks: Sequence[str] = ()
    """Texts with which a tool call begins in the answer, for the stop reason. Empty if the request
    offers no tools."""
    save_at: Sequence[int] = ()
    """Positions of the prompt at which its state is saved for any placement policy, floored to the
    grid."""
    prompt_logprobs: int | None = None
    """Number of alternatives to report with the prompt's log-probabilities, which are computed
    without the cache; None to report none."""
    request_id: str | None = None
    """Id of the request, or None to generate one."""
    grammar: Grammar | None = None
    """Grammar of the answer, or None if the answer is free."""

    @classmethod
    def of(
        cls, prompt: Prompt | RequestSpec, sampling: SamplingParams | None, options: dict[str, Any]
    ) -> RequestSpec:
        """Return ``prompt`` if it is a complete spec, else a spec of these fields.

        Raises TypeError for an unknown option, or for options next to a complete spec.
        """
        if not isinstance(prompt, RequestSpec):
            return cls(prompt, sampling, **options)
        if sampling is not None or options:
            raise TypeError("a RequestSpec is complete: set its fields, and pass no other options.")
        return prompt
