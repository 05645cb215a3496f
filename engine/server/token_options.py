"""What vLLM's and SGLang's clients may ask beside OpenAI's parameters: which tokens may come, and
what is told of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from engine.requests.sampling_params import MAX_BIAS, MAX_BIASES, MAX_COUNT
from engine.server.config import MAX_STOPS
from engine.server.guided import Guided
from engine.server.strict import Listed, whole_numbers

MAX_ID_CHARS = 128
"""Of a request's name."""
LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
"""No control characters, and nothing that breaks lines."""
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[Listed[TokenId], BeforeValidator(whole_numbers)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[Listed[Text], Field(max_length=MAX_STOPS)]
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
ALL = (-1, 0)
"""What clients send as ``top_k`` that mean every token."""


def _by_id(biases: dict[str, float]) -> dict[int, float]:
    """JSON's names are strings."""
    return {int(name): value for name, value in biases.items()}


def _one_line(request_id: str) -> str:
    """It comes back in answers and stands in logs, which are lines."""
    if not re.match(LINE, request_id):
        raise ValueError("'request_id' may have no control characters: send one line of text.")
    return request_id


class TokenOptions(Guided):
    """The part of a request that says which tokens may come, and what is reported of them."""

    top_k: int | None = Field(default=None, ge=-1, le=MAX_COUNT)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias],
            Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
            AfterValidator(_by_id),
        ]
        | None
    ) = None
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    thinking_token_budget: int | None = Field(default=None, ge=0, le=MAX_COUNT)
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    bad_words: Texts | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    """None are put there, which is no difference with the tokenizers that are served."""
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    return_token_ids: bool = False
    return_cached_tokens_details: bool = False
    """SGLang's: also as its ``sglext``."""
    request_id: (
        Annotated[
            str,
            Field(min_length=1, max_length=MAX_ID_CHARS, json_schema_extra={"pattern": LINE}),
            AfterValidator(_one_line),
        ]
        | None
    ) = None
    """What the answer's id ends with."""
    priority: Annotated[int, Field(ge=0, le=0)] = 0
    """Who came first goes first."""

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "top_k",
        "logit_bias",
        "min_tokens",
        "thinking_token_budget",
        "allowed_token_ids",
        "bad_words",
        "skip_special_tokens",
        "include_stop_str_in_output",
    )

    def options(self) -> dict[str, Any]:
        """Those of ``SamplingParams`` that are given."""
        given = {name: value for name in self.OPTIONS if (value := getattr(self, name)) is not None}
        if given.get("top_k") in ALL:
            given["top_k"] = None
        return given


def seed_of(seed: int | None, choice: int) -> int | None:
    """Of one of a request's choices, which must differ, and be the same ones the next time: in the
    range of 64 bits, into which any other is folded."""
    return None if seed is None else (seed + choice + 2**63) % 2**64 - 2**63
