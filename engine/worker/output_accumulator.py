"""One answer put together from the news of each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from engine.text.growing import GrowingTokens
from engine.text.outputs import DraftCounts, RequestOutput, SampledToken
from engine.worker.messages import DraftNews, News


class Answer:
    """What has come of one request's answer."""

    def __init__(self, prompt: npt.NDArray[np.int32]) -> None:
        self._prompt = prompt
        self._tokens = GrowingTokens()
        self._text: list[str] = []
        self._logprobs: list[SampledToken] = []
        self._prompt_logprobs: tuple[SampledToken | None, ...] | None = None

    def add(self, news: News) -> RequestOutput:
        """``news`` with all that came before. O(new tokens), amortised."""
        new = news.new_token_ids
        if news.new_text:
            self._text.append(news.new_text)
        self._logprobs.extend(news.new_logprobs)
        if news.prompt_logprobs is not None:
            self._prompt_logprobs = news.prompt_logprobs
        return RequestOutput(
            request_id=news.request_id,
            prompt_token_ids=self._prompt,
            new_token_ids=new,
            new_text=news.new_text,
            new_logprobs=news.new_logprobs,
            output=self._tokens.extended(new),
            all_text=self._text,
            num_pieces=len(self._text),
            cached_len=news.cached_len,
            losses=news.losses,
            finish_reason=news.finish_reason,
            error=None,
            is_refused=False,
            timings=news.timings,
            num_preemptions=news.num_preemptions,
            all_logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            drafts=None if news.drafts is None else _counts(news.drafts),
            transferred=news.transferred,
        )


def _counts(news: DraftNews) -> DraftCounts:
    return DraftCounts(news.num_verified, _counter(news.drafted), _counter(news.accepted))


def _counter(entries: Iterable[tuple[str, int, int]]) -> Counter[tuple[str, int]]:
    return Counter({(source, place): number for source, place, number in entries})
