"""Refusals: one sentence each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def refused(
    words: str,
    call: Callable[..., Any],
    /,
    *arguments: Any,
    kind: type[BaseException] | tuple[type[BaseException], ...] = ValueError,
    **settings: Any,
) -> str:
    """Return the sentence of the error that a call raises. Fails unless it is of the ``kind``, one
    line, and has the ``words``, a regular expression."""
    with pytest.raises(kind, match=words) as caught:
        call(*arguments, **settings)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1 and len(sentence) < 1000, sentence
    return sentence
