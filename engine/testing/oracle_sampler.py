"""Sampler for the oracle: tokens are a function of the fingerprints that replace logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.requests.logit_rules import FREE
from engine.requests.spec import SamplingInput
from engine.testing.oracle import Fingerprints
from engine.text.outputs import SampledToken


class OracleDrawn:
    """Tokens that are available to the runner and the host at once."""

    def __init__(self, sampled: list[SampledToken]) -> None:
        self.tokens = [one.token_id for one in sampled]
        self._sampled = sampled

    def wait(self) -> list[SampledToken]:
        return self._sampled


class OracleSampler:
    """Selects tokens as a function of the fingerprint."""

    def __init__(self, vocab_size: int = 320) -> None:
        self._vocab_size = vocab_size

    def launch(
        self, logits: Fingerprints, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> OracleDrawn:
        assert len(rows) == len(requests)
        for request in requests:
            repeats = request.ruling.repeats
            num_seen = request.draw if repeats is None else repeats.num_seen
            assert num_seen == request.draw, "a sampling rule that did not see every token"
        pairs = zip(rows, requests, strict=True)
        return OracleDrawn([self.choose(int(logits[row]), request) for row, request in pairs])

    def keep(self, logits: Fingerprints, row: int) -> Fingerprints:
        """See ``TokenSampler.keep``."""
        return logits[row : row + 1].copy()

    def choose(self, logits: int, request: SamplingInput | None = None) -> SampledToken:
        """Return the one token that follows a prefix, among those that ``request`` allows."""
        possible = np.arange(self._vocab_size)
        ruling = FREE if request is None else request.ruling
        if ruling.mask is not None:
            possible = possible[np.unpackbits(ruling.mask, bitorder="little")[possible] == 1]
        if ruling.added is not None:
            ids, values = ruling.added
            possible = np.setdiff1d(possible, ids[np.isneginf(values)])
        token = int(possible[logits % len(possible)])
        return SampledToken(token, -(logits % 9973) / 1000)

    def score(self, logits: Fingerprints, token_ids: Sequence[int], num_top: int) -> OracleDrawn:
        """Return log-probabilities that depend on the prefix and on the token."""
        return OracleDrawn(
            [
                SampledToken(int(token), -((int(one) + int(token)) % 9973) / 1000)
                for one, token in zip(logits, token_ids, strict=True)
            ]
        )
