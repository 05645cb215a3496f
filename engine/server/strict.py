"""What every body is made of."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_NAMES = 64
"""Names that an object of a fixed form may have: each that it should not have is an error of its
own."""
Entry = TypeVar("Entry")
Listed = Annotated[list[Entry], Field(fail_fast=True)]
"""A list of which the first wrong entry is the only error."""


class Strict(BaseModel):
    """No unknown names, no guessed types, no infinities."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    HOLDS_IDS: ClassVar[bool] = False
    """It may be a long list of token ids."""

    @model_validator(mode="before")
    @classmethod
    def _has_few_names(cls, body: Any) -> Any:
        if isinstance(body, dict) and len(body) > MAX_NAMES:
            raise ValueError(f"An object here has at most {MAX_NAMES} names, not {len(body)}.")
        return body
