"""One answer put together from what a replica sends: the news of each step, without what the other
side has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.text.outputs import RequestOutput, SampledToken
from hybridcache.units import counted


class Answer:
    """What has come of one request's answer."""

    def __init__(self, prompt: npt.NDArray[np.int32]) -> None:
        self._prompt = prompt
        self._tokens = np.empty(64, np.int32)
        self._logprobs: list[SampledToken] = []
        self.num_tokens = 0

    @property
    def broken_off(self) -> str:
        """What a client is told whose replica died."""
        return (
            f"the replica that computed it died after {counted(self.num_tokens, 'token')} of the "
            "answer; send the request again"
        )

    def whole(self, output: RequestOutput) -> RequestOutput:
        """``output`` with the prompt and all tokens so far. O(new tokens), amortised."""
        end = self.num_tokens + len(output.new_token_ids)
        if end > len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.empty(end, np.int32)))
        self._tokens[self.num_tokens : end] = output.new_token_ids
        self.num_tokens = end
        self._logprobs.extend(output.new_logprobs)
        return replace(
            output,
            prompt_token_ids=self._prompt,
            output=self._tokens[:end],
            all_logprobs=self._logprobs,
        )
