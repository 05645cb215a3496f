"""Names of modules and tensors in files, and lists that match them on whole words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from engine.weights.model_config import ModelError

WRAPPINGS = ("model.language_model.", "language_model.model.")
"""Prefixes of multimodal checkpoints that replace ``model.`` in their text part."""

MODEL_SLIM_FILE = "quant_model_description.json"
"""File of Ascend's ModelSlim that lists the format of each tensor."""
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
INDEX_NAMES = (INDEX_NAME, "quant_model_weights.safetensors.index.json")
"""Files that list the weight files of a model, of Hugging Face and of ModelSlim."""


def model_name(name: str) -> str:
    """Return a tensor's name without the prefix of the text part of a multimodal model."""
    for wrapping in WRAPPINGS:
        if name.startswith(wrapping):
            return "model." + name.removeprefix(wrapping)
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_") else name


_BUFFER = re.compile(r"(^|\.)(rotary_emb\.\w+|position_ids)$")


def is_buffer(name: str) -> bool:
    """Return True for a tensor that older programs saved although it follows from the config.
    transformers ignores these (``PreTrainedModel``, unexpected keys).

    >>> is_buffer("model.layers.0.self_attn.rotary_emb.inv_freq"), is_buffer("model.norm.weight")
    (True, False)
    """
    return _BUFFER.search(name) is not None


@dataclass(frozen=True, slots=True)
class Names:
    """Full names of modules, and regular expressions (``re:``) for the start of a name."""

    names: frozenset[str]
    """Names without the prefix of a multimodal model."""
    patterns: tuple[re.Pattern[str], ...]
    num_words: frozenset[int]
    """Numbers of words of the names that also match inside other names."""

    @classmethod
    def of(cls, texts: Iterable[object], *, anywhere: bool = False) -> Names:
        """Build the list. With ``anywhere``, a name also matches every module that contains its
        words in sequence. Raises ModelError for an invalid regular expression."""
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

    def has(self, module: str) -> bool:
        """Return True if ``module``, with or without the prefix of a multimodal model, is on the
        list.

        Names match whole words: ``mlp.gate`` does not match ``mlp.gate_proj``. O(words * lengths of
        names + regular expressions), independent of the number of names.
        """
        name = model_name(module)
        if name in self.names or not self.names.isdisjoint(_runs(name, self.num_words)):
            return True
        if not self.patterns:
            return False
        spelled = (name, *(wrap + name.removeprefix("model.") for wrap in WRAPPINGS))
        return any(p.match(text) for p in self.patterns for text in (module, *spelled))


def _runs(name: str, counts: Iterable[int]) -> Iterator[str]:
    """Yield every run of ``counts`` words in a dotted name."""
    words = name.split(".") if counts else []
    for count in counts:
        for first in range(len(words) - count + 1):
            yield ".".join(words[first : first + count])
