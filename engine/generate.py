"""Prompts in, answers out: for a caller that steps the engine itself and waits for what comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from engine.mailboxes import Mailboxes
from engine.requests.sampling_params import SamplingParams
from engine.requests.spec import Prompt, RequestSpec
from engine.text.outputs import RequestOutput

if TYPE_CHECKING:
    from engine.engine import Engine


def generate(
    engine: Engine,
    mailboxes: Mailboxes,
    prompts: Sequence[Prompt | RequestSpec],
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    options: Mapping[str, Any],
    *,
    show_progress: bool,
) -> list[RequestOutput]:
    """See ``Engine.generate``. Where it breaks off, all it submitted is ended."""
    if isinstance(prompts, str):
        raise ValueError("generate takes a list of prompts; give a single one as [prompt].")
    each = [sampling] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
    if len(each) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(each)} sampling parameters.")
    finals: dict[str, RequestOutput] = {}
    unfinished: set[str] = set()
    order: list[str] = []
    queue = deque(zip(prompts, each, strict=True))
    with tqdm(total=len(prompts), disable=not show_progress, unit="request") as bar:
        try:
            while queue or unfinished:
                while queue and engine.has_room:
                    prompt, params = queue.popleft()
                    order.append(engine.submit(prompt, params, **options))
                    mailboxes.open(order[-1])
                    unfinished.add(order[-1])
                engine.step()
                for output in mailboxes.take_finals(unfinished):
                    finals[output.request_id] = output
                    bar.update()
        finally:
            for request_id in unfinished:
                engine.abort(request_id)
                mailboxes.close(request_id)
    return [finals[request_id] for request_id in order]


def follow(engine: Engine, mailboxes: Mailboxes, request_id: str) -> Iterator[RequestOutput]:
    """The outputs of a request from now on, as they come; closing or dropping the iterator ends
    it."""
    outputs = _followed(engine, mailboxes, request_id)
    next(outputs)  # A generator that never began would not clean up.
    return outputs


def _followed(engine: Engine, mailboxes: Mailboxes, request_id: str) -> Iterator[Any]:
    """Nothing, to begin with; then the request's outputs."""
    mailbox = mailboxes.open(request_id)
    try:
        yield None
        while True:
            while not mailbox:
                engine.step()
            output = mailbox.popleft()
            yield output
            if output.is_finished:
                return
    finally:
        mailboxes.close(request_id)
        engine.abort(request_id)
