"""Few-shot prompts: questions with answers, each after the same examples (GSM8K and similar).

JSON lines of ``{"question", "answer"}``. The first ``shots`` records are the examples, and every
further record is a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from hybridcache.lab.arrivals import Poisson, Starts
from hybridcache.lab.trace import TraceRequest
from hybridcache.lab.traces.base import (
    FileReader,
    Record,
    json_lines,
    parsed,
    text,
)
from hybridcache.lab.traces.text import load_chat_text


@dataclass(frozen=True, slots=True)
class FewShotReader(FileReader):
    """Every question as a separate session, arriving by ``starts``."""

    word: ClassVar[str] = "few-shot-questions"
    shots: int = 8
    tokenizer: str = ""
    starts: Starts = field(default_factory=lambda: Poisson(4.0))
    seed: int = 0
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has a question and an answer."""
        return "question" in record and "answer" in record

    def __call__(self) -> Iterator[TraceRequest]:
        encode = load_chat_text(self.tokenizer).encode
        times = self.starts.times(np.random.default_rng(self.seed))
        examples: list[str] = []

        def parse(record: Record) -> Iterable[TraceRequest]:
            question, answer = text(record, "question"), text(record, "answer")
            if len(examples) < self.shots:
                examples.append(f"Question: {question}\nAnswer: {answer}\n\n")
                return
            head = "".join(examples)
            prompt = encode(f"{head}Question: {question}\nAnswer:")
            boundaries = (len(encode(head)),) if head else ()
            output = encode(f" {answer}")
            yield TraceRequest(next(times), question, None, prompt, output, boundaries)

        return parsed(self.path, json_lines(self.path, self.bad), parse, self.bad)
