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
from typing import Any, Literal, TypeVar

from hybridcache.geometry.config_format import Config
from hybridcache.geometry.sizes import MixerSizes, ModelSizes

M = TypeVar("M", bound=MixerSizes)
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
DEFAULT_ROPE_THETA = 10_000.0


class ModelError(ValueError):
    """The model is not supported; the message gives the reason in one sentence."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Change of the frequencies for contexts longer than those of the first training.

    ``linear`` divides every frequency by ``factor``. ``llama3`` and ``yarn`` divide low ones, keep
    high ones, and interpolate in between: by rotations, or by the indices of the frequencies.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low: float = 0.0
    """Number of rotations within ``original_len`` below which a frequency is low."""
    high: float = 0.0
    original_len: float = 0.0
    truncates: bool = True
    """True if the interpolation of yarn begins and ends at whole indices."""
    attention_factor: float = 1.0
    """Factor of cos and sin."""


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary position embedding."""

    theta: float
    dim: int
    """Number of leading dimensions of a head that are rotated."""
    scaling: Scaling | None = None

    @property
    def extended_len(self) -> int:
        """Length to which YaRN extends the context.

        0 for other scalings, for which ``max_position_embeddings`` is the extended length.
        """
        scaling = self.scaling
        if scaling is None or scaling.kind != "yarn":
            return 0
        return int(scaling.factor * scaling.original_len)


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
    described_sizes: str = field(default="", compare=False)
    """Keys of config.json that determine shapes of tensors, for errors."""

    @property
    def vocab_size(self) -> int:
        return self.sizes.vocab

    @property
    def hidden_size(self) -> int:
        return self.sizes.hidden

    @property
    def time_limits(self) -> tuple[float, float]:
        """Bounds of Mamba-2's time steps."""
        low, high = self.own["time_step_limit"]
        return float(low), float(high)

    @property
    def max_len(self) -> int:
        """Longest context that the model was made for, in tokens."""
        return max(self.max_position, 0 if self.rope is None else self.rope.extended_len)


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
        described_sizes=config.describe_sizes(),
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


def read_rope(
    config: Config,
    head_dim: int,
    *,
    theta: float = DEFAULT_ROPE_THETA,
    fraction: float | None = None,
    is_optional: bool = False,
) -> Rope | None:
    """Read a rotary embedding, or return None if there is no rotation.

    ``rope_scaling`` takes precedence over ``rope_parameters``. ``rope_theta`` and
    ``partial_rotary_factor`` inside these take precedence over the same keys outside. Keys that a
    type of embedding does not use are ignored.

    Args:
      theta: Default base.
      fraction: Default part of a head that is rotated, or None for a family that always
        rotates whole heads.
      is_optional: True if a base of null means no rotation.

    Raises ModelError for unsupported types and invalid values.
    """
    section = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = config.get(section) or {}
    config.ignore("rope_scaling", "rope_parameters", "original_max_position_embeddings")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ModelError(f"{section} for each sort of layer in config.json is not supported.")
    kind = found.get("rope_type", found.get("type", "default"))
    part = config.get("partial_rotary_factor")
    part = (1.0 if fraction is None else fraction) if part is None else part
    part = found.get("partial_rotary_factor", part)
    base = found.get("rope_theta", config.get("rope_theta", theta))
    if is_optional and base is None:
        return None
    base = _positive("rope_theta", base)
    if fraction is None and kind == "default":
        part = 1.0
    dim = int(head_dim * _number("partial_rotary_factor", part))
    if dim % 2 or not 0 <= dim <= head_dim or (fraction is None and dim != head_dim):
        wanted = "all" if fraction is None else "some"
        raise ModelError(
            f"{dim} of {head_dim} dimensions of a head would be rotated: head_dim (or else "
            f"hidden_size / num_attention_heads) and partial_rotary_factor must make it {wanted} "
            "of them, and an even number."
        )
    return Rope(base, dim, _scaling(kind, base, found, section, config)) if dim else None


def _scaling(
    kind: object, base: float, found: Mapping[str, Any], section: str, config: Config
) -> Scaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return Scaling("linear", _positive("factor", found.get("factor")))
    longest = config["max_position_embeddings"]
    original = longest
    if kind in ("llama3", "yarn"):  # Both values must be valid; the one outside is used.
        for part in (found, config):
            original = part.get("original_max_position_embeddings", original)
            original = _positive("original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = (
            _positive(name, found.get(name)) for name in ("low_freq_factor", "high_freq_factor")
        )
        if low >= high:
            raise ModelError(
                f"high_freq_factor of rotary embeddings must be greater than low_freq_factor in "
                f"config.json (got {high} and {low})."
            )
        factor = _positive("factor", found.get("factor"))
        return Scaling("llama3", factor, low, high, original)
    if kind == "yarn" and base == 1:
        raise ModelError("rope_theta 1.0 in config.json is not supported with type 'yarn'.")
    if kind == "yarn":
        return _yarn(found, longest, original)
    raise ModelError(
        f"rotary embeddings of type {kind!r} ({section}) are not supported; default, linear, "
        "llama3 and yarn are."
    )


def _yarn(found: Mapping[str, Any], longest: int, original: float) -> Scaling:
    """Return the scaling of https://arxiv.org/abs/2309.00071."""
    if "factor" not in found:
        raise ModelError("factor is missing in the rope_parameters of type 'yarn' in config.json.")
    factor = longest / original if found["factor"] is None else found["factor"]
    factor = _positive("factor", factor)
    attention_factor = found.get("attention_factor")
    if attention_factor is None:
        over, under = (found.get(name) for name in ("mscale", "mscale_all_dim"))
        attention_factor = _yarn_scale(factor, 1.0)
        if over and under:
            over, under = _number("mscale", over), _number("mscale_all_dim", under)
            attention_factor = _yarn_scale(factor, over) / _yarn_scale(factor, under)
    return Scaling(
        "yarn",
        factor,
        low=_positive("beta_slow", found.get("beta_slow") or 1),
        high=_positive("beta_fast", found.get("beta_fast") or 32),
        original_len=original,
        truncates=bool(found.get("truncate", True)),
        attention_factor=_number("attention_factor", attention_factor),
    )


def _yarn_scale(factor: float, weight: float) -> float:
    """Return the factor that sharpens attention in a context ``factor`` times longer."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _number(name: str, value: object) -> float:
    """Return ``value`` as a float. Raises ModelError unless it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):  # type: ignore[arg-type]
        raise ModelError(
            f"{name} of rotary embeddings must be a number in config.json (got {value!r})."
        )
    return float(value)  # type: ignore[arg-type]


def _positive(name: str, value: object) -> float:
    """Return ``value`` as a float. Raises ModelError unless it is a number greater than zero."""
    number = _number(name, value)
    if number <= 0:
        raise ModelError(f"{name} must be greater than 0 in config.json (got {number}).")
    return number


def check_only(config: Config, served: Served) -> None:
    """Raise ModelError if a key has a value that is not ``served``. Missing keys are accepted."""
    for name, values in served.items():
        if name in config and config[name] not in values:
            raise ModelError(f"{name} {config[name]!r} is not supported; {values[0]!r} is.")


def check_all_read(config: Config) -> None:
    """Raise ModelError for a key that was not read although its value is not the default."""
    for name, value in config.unread().items():
        raise ModelError(f"{name} {value!r} in config.json is not supported; remove it.")


def read_config(model_dir: Path) -> dict[str, Any]:
    """Return the contents of ``config.json``. Raises ModelError."""
    path = model_dir / "config.json"
    if not path.is_file():
        raise ModelError(
            f"there is no config.json in {model_dir}: use a model directory, or ORG/NAME for a "
            "model of the Hugging Face Hub."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not contain a JSON object.")
    return config
