"""Shared context of the endpoints: engine, model name, tokenization, submission and usage."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

import numpy as np
from fastapi import Request, Response

from engine.async_engine import RequestStream, ServedEngine
from engine.errors import ContextOverflow, QueueFull, RequestError
from engine.plugins import chat_hooks
from engine.requests.grammar import Grammar
from engine.requests.spec import RequestSpec
from engine.server import request_log
from engine.server.access import AnswerId, AnswerIds, Tenant, Tenants
from engine.server.api_errors import APIError, of_failure, quoted
from engine.server.body import to_json
from engine.server.chat_hooks import ChatHooks
from engine.server.metrics import Metrics
from engine.server.schemas import Guided
from engine.server.settings import ServerConfig
from engine.server.streaming import interleave
from engine.server.workers import Workers
from engine.text.answers import CLOSE
from engine.text.outputs import DraftCounts, RequestOutput, Transferred
from engine.text.tokenizer import EncodeOptions, Tokenizer
from hybridcache.api import Losses

logger = logging.getLogger(__name__)


class ServingContext:
    """One engine with its model name."""

    def __init__(self, engine: ServedEngine, config: ServerConfig, workers: Workers) -> None:
        self.engine = engine
        self.model_name = config.served_model_name or engine.model_name
        self.special_in_content = config.special_in_content
        self._default_max_tokens = config.default_max_tokens
        self.workers = workers
        self._tenants = Tenants(config.salt_by_key)
        self.ids = AnswerIds()
        self.metrics = Metrics()
        self._config = config
        self._chats: ChatHooks | None = None
        self._loading = threading.Lock()
        self.created = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer:
        assert self.engine.tokenizer is not None, "a served engine always has a tokenizer"
        return self.engine.tokenizer

    @property
    def chats(self) -> ChatHooks:
        """Hooks around every chat, loaded by the first one."""
        with self._loading:
            if self._chats is None:
                engine = self.engine.config
                grid = engine.grid if engine.prefix_cache == "hybrid" else 0
                self._chats = chat_hooks(self.tokenizer, self._config, grid)
            return self._chats

    def check_model(self, model: str | None) -> None:
        """Raise APIError 404 if a client names another model."""
        if model is not None and model != self.model_name:
            raise APIError(
                404,
                f"The model {quoted(model)} is not served: use '{self.model_name}'.",
                param="model",
                code="model_not_found",
            )

    def check_number(self, num_choices: int) -> None:
        """Raise APIError 400 if a request has more answers than the queue can hold, so a retry
        would fail too."""
        if num_choices > self.engine.config.max_queue:
            raise APIError(
                400,
                f"{num_choices} answers are more than the queue of {self.engine.config.max_queue} "
                "requests can hold: send fewer prompts or lower 'n'.",
            )

    async def encode(
        self,
        prompts: Sequence[str | list[int]],
        how: EncodeOptions,
    ) -> list[list[int]]:
        """Return the ids of each prompt. Long ones are encoded in a thread. Raises APIError 400 for
        a text that the tokenizer rejects."""

        def work() -> list[list[int]]:
            return [
                self.tokenizer.encode(prompt, how) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]

        try:
            return await self.workers.run(sum(map(len, prompts)), work)
        except ValueError as error:
            raise APIError(400, str(error)) from error

    async def grammar_of(
        self,
        body: Guided,
        calls: Callable[[], Grammar | None] = lambda: None,
        is_thinking: bool = False,
    ) -> Grammar | None:
        """Compile the grammar of the answer, or return None if the answer is free.

        The grammar comes from the ``body`` or from the required ``calls``. If the prompt ends
        inside reasoning, the grammar applies after it. Raises APIError 400 if it cannot be used.
        """
        param = body.form_name

        def work() -> Grammar | None:
            grammar = calls() or body.grammar()
            if grammar is None:
                return None
            if is_thinking:
                grammar = grammar.behind(CLOSE)
            try:
                self.engine.compile(grammar)
            except ValueError as error:
                raise ValueError(str(error) if param is None else f"'{param}': {error}") from error
            return grammar

        if not body.is_guided:
            return None
        try:
            return await self.workers.compile(work)
        except ValueError as error:
            raise APIError(400, str(error), param=param) from error

    def tenant_of(self, request: Request, salt: str | None = None) -> Tenant:
        """Return the tenant of a ``request`` with ``salt`` in its body. Raises APIError 400 if its
        salts differ, or one is not text."""
        return self._tenants.of(request.scope, salt)

    def check_length(self, num_tokens: int, param: str, min_answer: int = 1) -> None:
        """Raise APIError 400 unless a prompt of ``num_tokens`` leaves room for an answer of
        ``min_answer`` tokens. ``param`` names the prompt in the body."""
        limit = self.engine.max_model_len
        if num_tokens + min_answer > limit:
            raise of_failure(ContextOverflow(num_tokens, min_answer, limit), param=param)

    def check_limit(self, limit: int | None, param: str) -> None:
        """Raise APIError 400 if the context is shorter than an answer of ``limit`` tokens.

        ``param`` names the limit in the body. The error has no code for a long prompt, because a
        shorter prompt would not help.
        """
        most = self.engine.max_model_len
        if limit is not None and limit > most:
            raise APIError(
                400,
                f"'{param}' must be at most {most}, this model's context length (got {limit}): "
                f"lower {param}.",
                param=param,
                for_anthropic=f"{param}: {limit} > {most}, which is the maximum allowed number of "
                f"output tokens for {self.model_name}",
            )

    def answer_limit(self, num_tokens: int, limit: int | None) -> int | None:
        """Return the maximum length of the answer to a prompt of ``num_tokens``: ``limit``, or
        ``--default-max-tokens`` if the request names none, or None if only the context limits
        it."""
        limit = self._default_max_tokens if limit is None else limit
        fits = limit is not None and num_tokens + limit <= self.engine.max_model_len
        return limit if fits else None

    async def as_arrays(self, prompts: Sequence[list[int]]) -> list[list[int] | np.ndarray]:
        """Convert the prompts to arrays that all their choices share. Prompts with invalid ids stay
        lists, which the engine refuses."""
        return await self.workers.run(
            sum(map(len, prompts)), lambda: [_as_array(prompt) for prompt in prompts]
        )

    async def submit(
        self, specs: Iterable[RequestSpec], answer_id: AnswerId
    ) -> list[RequestStream]:
        """Submit ``specs`` and return their streams in order; all are submitted or none. Raises
        RequestError if the engine refuses one."""
        streams: list[RequestStream] = []
        record = request_log.CURRENT.get()
        if record is not None:
            record.answer_id = answer_id.public
        try:
            for spec in specs:
                if record is not None:
                    record.expect(spec)
                streams.append(self.engine.submit(spec))
                await asyncio.sleep(0)  # Let the event loop run between two choices.
        except BaseException as error:
            for stream in streams:
                stream.abort()
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, ValueError | RequestError):
                logger.exception("A request could not be submitted.")
            self._count_refusal(error)
            raise RequestError.of(error) from error
        return streams

    def _count_refusal(self, error: Exception) -> bool:
        """Count a request that was refused before it was queued. Returns True if it was."""
        is_full = isinstance(error, QueueFull)
        self.metrics.rejected.inc(is_full)
        return is_full or isinstance(error, ValueError)

    async def outputs(
        self, streams: Sequence[RequestStream]
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        """Yield the outputs of the streams, and count each ended request.

        If the iterator is closed early, the remaining requests count as aborted. Raises
        RequestError if a request ended without an answer; an engine in another process refuses
        requests this way.
        """
        num_left = len(streams)
        record = request_log.CURRENT.get()
        merged = interleave(streams)
        try:
            async for index, output in merged:
                if record is not None:
                    record.take(index, output)
                if output.finish_reason is not None:
                    self.metrics.observe(output)
                    num_left -= 1
                yield index, output
        except RequestError as error:
            num_left -= self._count_refusal(error)
            raise
        finally:
            self.metrics.count_aborted(num_left)
            await merged.aclose()

    async def finals(self, streams: Sequence[RequestStream]) -> list[RequestOutput]:
        """Return the last output of each stream, in order."""
        finals: dict[int, RequestOutput] = {}
        async for index, output in self.outputs(streams):
            finals[index] = output
        return [finals[index] for index in range(len(streams))]

    async def answer(
        self,
        outputs: Sequence[RequestOutput],
        whole: Callable[[], dict[str, object]],
        echoes: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """Return the result of ``whole`` as a response. A long one is written in a thread."""
        size = sum(len(output.output) * (1 + (output.logprobs is not None)) for output in outputs)
        if echoes:
            size += sum(len(output.prompt_token_ids) for output in outputs)
        content = await self.workers.run(size, lambda: to_json(whole()))
        return Response(content, media_type="application/json", headers=headers)


def _as_array(prompt: list[int]) -> list[int] | np.ndarray:
    try:
        tokens = np.asarray(prompt, np.int32)
    except (OverflowError, ValueError):
        return prompt
    return tokens


def usage(outputs: Sequence[RequestOutput], num_choices: int) -> dict[str, object]:
    """Return the token counts of an answer. ``outputs`` lists ``num_choices`` choices per prompt.

    A prompt counts once, with the cache hit of its first choice. Not part of OpenAI's API are
    ``lost_tokens``, the reasons why the other tokens were computed, and ``transferred``, the
    transfers between engines. ``completion_tokens_details`` is present with speculation.
    """
    firsts = outputs[::num_choices]
    num_prompt = sum(len(output.prompt_token_ids) for output in firsts)
    num_new = sum(len(output.token_ids) for output in outputs)
    losses = [output.losses for output in firsts if output.losses is not None]
    lost = {cause: sum(getattr(loss, cause) for loss in losses) for cause in Losses._fields}
    drafts = [output.drafts for output in outputs if output.drafts is not None]
    transferred = [output.transferred for output in firsts if output.transferred is not None]
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {
            "cached_tokens": sum(output.cached_len for output in firsts),
            "lost_tokens": lost,
            **({"transferred": _sums(transferred)} if transferred else {}),
        },
    } | ({"completion_tokens_details": _drafted(drafts, num_new)} if drafts else {})


def _sums(transferred: Sequence[Transferred]) -> dict[str, int]:
    return {name: sum(getattr(one, name) for one in transferred) for name in Transferred._fields}


def _drafted(drafts: Sequence[DraftCounts], num_new: int) -> dict[str, float | None]:
    """Return the statistics on draft tokens.

    Not part of OpenAI's API are ``verifications``, the number of steps with drafts;
    ``acceptance_length``, the mean number of tokens per such step; and ``tokens_per_step``, the
    mean over all steps that gave any of the ``num_new`` tokens. The means are null before the first
    step.
    """
    num_accepted = sum(counts.accepted.total() for counts in drafts)
    num_verified = sum(counts.num_verified for counts in drafts)
    num_steps = num_new - num_accepted
    return {
        "accepted_prediction_tokens": num_accepted,
        "rejected_prediction_tokens": sum(c.drafted.total() for c in drafts) - num_accepted,
        "verifications": num_verified,
        "acceptance_length": 1 + num_accepted / num_verified if num_verified else None,
        "tokens_per_step": num_new / num_steps if num_steps > 0 else None,
    }
