"""Engine with scripted answers, token by token.

Its runner verifies every read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import Engine, EngineConfig, RequestOutput, RequestSpec, SamplingParams
from engine.requests.request import SamplingInput
from engine.text.answers import SampledToken
from engine.text.tokenizer import Tokenizer
from engine.text.tokenizer_files import HFTokenizer
from tests.engine.front.server.conftest import allowed
from tests.oracle import Fingerprints, OracleDrawn, OracleRunner


class ScriptedSampler:
    """Sampler that returns the tokens of a script, which the request's seed selects.

    A forbidden token is replaced by the first allowed one, and the last token is repeated.
    """

    def __init__(self) -> None:
        self.scripts: list[Sequence[int]] = []

    def add(self, token_ids: Sequence[int]) -> int:
        """Add a script and return its seed."""
        self.scripts.append(token_ids)
        return len(self.scripts) - 1

    def launch(
        self, logits: Fingerprints, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> OracleDrawn:
        sampled = []
        for request in requests:
            script = self.scripts[request.seed]
            token = script[min(request.draw, len(script) - 1)]
            sampled.append(SampledToken(allowed(token, request.ruling.mask), None))
        return OracleDrawn(sampled)

    def score(self, logits: Any, token_ids: Sequence[int], num_top: int) -> OracleDrawn:
        raise AssertionError("A scripted sampler does not support scores.")


class ScriptedEngine:
    """Engine with answers given by the caller."""

    def __init__(
        self,
        tokenizer: Tokenizer | None = None,
        num_kv_tokens: int = 8192,
        num_slots: int = 16,
        **config: Any,
    ) -> None:
        self.tokenizer = tokenizer or HFTokenizer()
        self.sampler = ScriptedSampler()
        runner = OracleRunner(num_kv_tokens, num_slots, vocab_size=self.tokenizer.vocab_size)
        self.engine = Engine(
            EngineConfig(**config), runner=runner, sampler=self.sampler, tokenizer=self.tokenizer
        )

    def answer(self, spec: RequestSpec, answer: Sequence[int]) -> RequestOutput:
        """Serve one request with the given ``answer``. Returns its last output."""
        sampling = SamplingParams(max_tokens=len(answer), seed=self.sampler.add(answer))
        options = {name: getattr(spec, name) for name in ("namespace", "boundaries")}
        [output] = self.engine.generate([spec.prompt], sampling, **options)
        return output
