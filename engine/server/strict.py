"""What every body is made of."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_NAMES = 64
"""Names that an object of a fixed form may have: each that it should not have is an error of its
own."""
Entry = TypeVar("Entry")
Listed = Annotated[list[Entry], Field(fail_fast=True)]
"""A list of which the first wrong entry is the only error."""
Name = Annotated[str, Field(min_length=1)]
"""Of a tool."""


class Strict(BaseModel):
    """No unknown names, no guessed types, no infinities. A null asks for nothing, also under a name
    that is unknown: clients send answers back with all the fields that their own classes know."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    HOLDS_IDS: ClassVar[bool] = False
    """It may be a long list of token ids."""

    @model_validator(mode="before")
    @classmethod
    def _is_read(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        if len(body) > MAX_NAMES:
            raise ValueError(f"An object here has at most {MAX_NAMES} names, not {len(body)}.")
        return {name: _whole(value) for name, value in without_nulls(body).items()}


def without_nulls(body: dict[str, Any]) -> dict[str, Any]:
    """``body`` without its nulls, but for those further down: null means "your default" everywhere
    in this API."""
    return {name: value for name, value in body.items() if value is not None}


def whole_numbers(values: Any) -> Any:
    """A list with 3 for 3.0, which is an integer in JSON's own word for it. O(len(values))."""
    if isinstance(values, list) and float in set(map(type, values)):
        return [_whole(value) for value in values]
    return values


def _whole(value: Any) -> Any:
    is_whole = isinstance(value, float) and abs(value) <= 2**53 and value.is_integer()
    return int(value) if is_whole else value


def without_what_asks_for_nothing(
    body: Any, ignored: Container[str], neutral: Mapping[str, Container[Any]]
) -> Any:
    """``body`` without what is ``ignored`` or ``neutral``. ValueError: a name of ``neutral`` with
    another value."""
    if not isinstance(body, dict):
        return body
    for name, values in neutral.items():
        if body.get(name) is not None and body[name] not in values:
            raise ValueError(f"'{name}' is not served here: leave it out.")
    return {
        name: value for name, value in body.items() if name not in ignored and name not in neutral
    }
