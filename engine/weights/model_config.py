"""Reader of the engine's settings in a ``config.json``.

The sizes are read by ``hybridcache.geometry``, which also has the names of all keys. A family lists
the keys of its layers (``Decoder.own_keys``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hybridcache.geometry.config_format import Config
from hybridcache.geometry.gguf import ABSENT, gguf_file, unreadable
from hybridcache.geometry.gguf_config import GgufModel
from hybridcache.geometry.sizes import MixerSizes, ModelSizes
from hybridcache.geometry.sizes import ModelError as ModelError

M = TypeVar("M", bound=MixerSizes)
RawConfig = dict[str, object]
"""Contents of a config.json."""
Served = Mapping[str, tuple[object, ...]]
"""Supported values of keys of a config.json. Errors name the first one."""
ACTIVATIONS = ("silu", "swish")
"""Names of the supported activation."""
SERVED: Served = {
    "hidden_act": ACTIVATIONS,
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "transformers_weights": (None,),
    "fusion_config": (None,),
}
"""Those of all families."""
POSITIVE = (
    "vocab_size",
    "max_position_embeddings",
    "mamba_dt_rank",
    "attention_multiplier",
    "logits_scaling",
)
"""Keys whose values must be greater than zero."""
CONVOLUTIONS = ("conv_L_cache", "conv_kernel", "linear_conv_kernel_dim", "mamba_d_conv")
"""Keys of a causal convolution's number of taps."""


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary position embedding."""

    frequencies: tuple[float, ...]
    """Radians per position of each pair of the leading dimensions of a head, in float32."""
    factor: float = 1.0
    """Factor of cos and sin."""
    max_len: int = 0
    """Length to which YaRN extends the context, or 0 for other types, for which
    ``max_position_embeddings`` is the extended length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Numbers of one model. Sizes are in elements."""

    sizes: ModelSizes
    norm_eps: float
    rope: Rope | None
    tie_embeddings: bool
    """True if the head has the weights of the embedding, unless the files have others for it."""
    max_position: int
    dtype: str
    """dtype of the checkpoint: float32, bfloat16 ..."""
    attention_bias: bool = False
    """True if the products of attention layers have a bias."""
    embedding_multiplier: float = 1.0
    """Factor of the embeddings at the start of the residual stream."""
    logit_multiplier: float = 1.0
    own: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Values of config.json that only the family's layers use, by key."""

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab

    @property
    def hidden_size(self) -> int:
        return self.sizes.hidden

    @property
    def max_len(self) -> int:
        """Longest context that the model was made for, in tokens."""
        return max(self.max_position, 0 if self.rope is None else self.rope.max_len)


def read_config(model_dir: Path) -> RawConfig:
    """Return the contents of a model's ``config.json``, or those that a GGUF file has in its place.
    Raises ModelError."""
    file = gguf_file(model_dir)
    if file is not None:
        return GgufModel(file).config
    path = model_dir / "config.json"
    fault = unreadable(path)
    if fault not in (None, ABSENT):
        raise ModelError(f"{path} {fault}.")
    if fault is not None:
        if model_dir.is_symlink() and not model_dir.exists():
            raise ModelError(f"{model_dir} {unreadable(model_dir)}.")
        raise ModelError(
            f"{model_dir} is not a model: use a directory with config.json or a GGUF file, the "
            "file itself, or ORG/NAME for a model of the Hugging Face Hub."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not contain a JSON object.")
    return config


def read_settings(
    config: Config, sizes: ModelSizes, rope: Rope | None, own: Sequence[str], *, eps: str
) -> ModelConfig:
    """Read the settings that all families share, and those of the keys ``own``.

    ``eps`` is the key of the norms' epsilon. Raises ModelError.
    """
    check_only(config, SERVED)
    # Convolutions of one tap would keep no input.
    taps = [(name, config[name], 2) for name in CONVOLUTIONS if name in config]
    for name, value, least in (*taps, (eps, config[eps], 0)):
        if value < least:
            raise ModelError(f"{name} must be at least {least} in config.json (got {value}).")
    for name in POSITIVE:
        if name in config and (isinstance(config[name], str) or config[name] <= 0):
            raise ModelError(
                f"{name} must be greater than 0 in config.json (got {config[name]!r})."
            )
    limits = config.get("time_step_limit", (0.0, math.inf))
    if len(limits) != 2:
        raise ModelError(f"time_step_limit must be two numbers in config.json (got {limits}).")
    dtype, older = config.get("dtype"), config.get("torch_dtype")
    return ModelConfig(
        sizes=sizes,
        norm_eps=config[eps],
        rope=rope,
        tie_embeddings=bool(config.get("tie_word_embeddings")),
        max_position=config["max_position_embeddings"],
        dtype=(dtype or older or "float32").removeprefix("torch."),
        attention_bias=bool(config.get("attention_bias")),
        own={key: config[key] for key in own if key in config},
    )


def mixer_of(sizes: ModelSizes, kind: type[M]) -> M:
    """Return the mixer of a kind, which must be the same in all layers. Raises ModelError."""
    found = {mixer for mixer in sizes.mixers if isinstance(mixer, kind)}
    if len(found) != 1:
        word = kind.__name__.removesuffix("Sizes").lower()
        raise ModelError(
            f"a model with {len(found)} sorts of {word} layers is not supported; one is."
        )
    return found.pop()


def check_only(config: Config, served: Served) -> None:
    """Raise ModelError if a key has a value that is not ``served``. Missing keys are accepted."""
    for name, values in served.items():
        if name in config and config[name] not in values:
            raise ModelError(f"{name} {config[name]!r} is not supported; {values[0]!r} is.")


def check_all_read(config: Config) -> None:
    """Raise ModelError for a key that was not read although its value is not the default."""
    for name, value in config.unread().items():
        raise ModelError(f"{name} {value!r} in config.json is not supported; remove it.")
