"""Names of modules and tensors in files, and lists that match them on whole words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.weights.model_config import ModelError

WRAPPINGS = ("model.language_model.", "language_model.model.")
"""What multimodal checkpoints have in place of ``model.`` around their text part."""

MODEL_SLIM_FILE = "quant_model_description.json"
MODEL_OPT_FILE = "hf_quant_config.json"
"""Ascend's list of what each tensor is."""


def model_name(name: str) -> str:
    """A tensor's name without the wrapping that multimodal models put around their text part."""
    for wrapping in WRAPPINGS:
        if name.startswith(wrapping):
            return "model." + name.removeprefix(wrapping)
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_") else name


@dataclass(frozen=True, slots=True)
class Names:
    """A list of modules: full names, and after ``re:`` regular expressions that are matched from a
    name's beginning."""

    names: frozenset[str]
    """Without a wrapping."""
    patterns: tuple[re.Pattern[str], ...]
    num_words: frozenset[int]
    """Of the names that also stand for every module in which their words follow each other."""

    @classmethod
    def of(cls, texts: Iterable[object], *, anywhere: bool = False) -> Names:
        """Raises ModelError for what is no regular expression."""
        names, patterns = set(), []
        for text in map(str, texts):
            if not text.startswith("re:"):
                names.add(model_name(text))
                continue
            try:
                patterns.append(re.compile(text[3:]))
            except re.error as error:
                raise ModelError(f"{text!r} is not a regular expression: {error}.") from None
        counts = {len(name.split(".")) for name in names} if anywhere else ()
        return cls(frozenset(names), tuple(patterns), frozenset(counts))

    @property
    def is_empty(self) -> bool:
        return not self.names and not self.patterns

    def has(self, module: str) -> bool:
        """Whether ``module``, with its wrapping or without, is on the list. On whole words:
        ``mlp.gate`` does not match ``mlp.gate_proj``. However many names there are, O(words *
        lengths of names + regular expressions)."""
        name = model_name(module)
        if name in self.names or not self.names.isdisjoint(_runs(name, self.num_words)):
            return True
        if not self.patterns:
            return False
        spelled = (name, *(wrap + name.removeprefix("model.") for wrap in WRAPPINGS))
        return any(p.match(text) for p in self.patterns for text in (module, *spelled))

    def sample(self, most: int = 3) -> str:
        """A few entries."""
        return ", ".join([*sorted(self.names), *(f"re:{p.pattern}" for p in self.patterns)][:most])


def _runs(name: str, counts: Iterable[int]) -> Iterator[str]:
    """So many words of a dotted name as follow each other."""
    words = name.split(".") if counts else []
    for count in counts:
        for first in range(len(words) - count + 1):
            yield ".".join(words[first : first + count])
