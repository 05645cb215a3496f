"""What the engine reads of a Hugging Face ``config.json`` beside the sizes, which are
``hybridcache.geometry``'s. A family adds its own numbers in a subclass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from hybridcache.geometry.families import sizes_of
from hybridcache.geometry.sizes import MixerSizes, ModelSizes

Fields = Mapping[str, Any]
M = TypeVar("M", bound=MixerSizes)


class ModelError(ValueError):
    """A model that can not be served, in one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary position embedding."""

    theta: float
    dim: int
    """Leading dimensions of a head that are rotated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model. Sizes are in elements."""

    sizes: ModelSizes
    norm_eps: float
    rope: Rope | None
    tie_embeddings: bool
    max_position: int
    dtype: str
    """The checkpoint's own: float32, bfloat16 ..."""
    attention_bias: bool = False
    """Of the products of attention layers."""
    embedding_multiplier: float = 1.0
    """Of the embeddings, where they enter the residual stream."""
    logit_multiplier: float = 1.0

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab

    @property
    def hidden_size(self) -> int:
        return self.sizes.hidden


class Common(TypedDict):
    """Arguments of ``ModelConfig`` that all families name alike."""

    sizes: ModelSizes
    norm_eps: float
    tie_embeddings: bool
    max_position: int
    dtype: str
    attention_bias: bool


def common(text: Fields) -> Common:
    """What is read alike for all families. Raises what ``sizes_of`` does, and ModelError."""
    check_only(text, hidden_act="silu")
    sizes = sizes_of(text)
    if any(getattr(mixer, "conv_width", 2) < 2 for mixer in sizes.mixers):
        raise ModelError("convolutions of one tap, which keep no input, are not supported.")
    longest = int(text.get("max_position_embeddings", 32768))
    for name, size in (("vocab_size", sizes.vocab), ("max_position_embeddings", longest)):
        if size < 1:
            raise ModelError(f"{name} must be at least 1 in config.json, not {size}.")
    return {
        "sizes": sizes,
        "norm_eps": float(text.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(text.get("tie_word_embeddings")),
        "max_position": longest,
        "dtype": str(text.get("dtype") or text.get("torch_dtype") or "float32").removeprefix(
            "torch."
        ),
        "attention_bias": bool(text.get("attention_bias")),
    }


def mixer_of(sizes: ModelSizes, kind: type[M]) -> M:
    """The mixer of a kind, of which all that the model has are alike. Raises ModelError."""
    found = {mixer for mixer in sizes.mixers if isinstance(mixer, kind)}
    if len(found) != 1:
        word = kind.__name__.removesuffix("Sizes").lower()
        raise ModelError(
            f"a model with {len(found)} sorts of {word} layers is not supported; one is."
        )
    return found.pop()


def rope(text: Fields, head_dim: int, *, fraction: float = 1.0) -> Rope | None:
    """A rotary embedding over ``fraction`` of a head, or over what the config says; None where its
    base is null. Text positions are the same on all axes of a multimodal one. Raises ModelError."""
    fields: Fields = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelError(f"rotary embeddings of type {kind!r} are not supported; default is.")
    theta = fields.get("rope_theta", text.get("rope_theta", 10000.0))
    if theta is None:
        return None
    part = fields.get("partial_rotary_factor", text.get("partial_rotary_factor", fraction))
    dim = int(head_dim * float(part))
    if dim % 2:
        raise ModelError(f"{dim} dimensions of a head are rotated: head_dim must make it even.")
    return Rope(float(theta), dim)


def time_limits(text: Fields) -> tuple[float, float]:
    """Between which Mamba-2's time steps are kept: ``time_step_limit``, whose infinity is JSON's
    or an object that names it."""
    low, high = (
        float(limit["__float__"] if isinstance(limit, Mapping) else limit)
        for limit in text.get("time_step_limit") or (0.0, "inf")
    )
    return low, high


def check_only(text: Fields, **values: object) -> None:
    """Raises ModelError where the config has another value than the one that is served."""
    for name, value in values.items():
        found = text.get(name, value)
        if found != value:
            raise ModelError(f"{name} {found!r} is not supported; {value!r} is.")


def read_config(model_dir: Path) -> dict[str, Any]:
    """``config.json`` as it stands. Raises ModelError."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelError(f"there is no config.json in {model_dir}: give a model directory.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return config
