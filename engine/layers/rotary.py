"""Rotary position embeddings: the frequencies that a ``config.json`` describes, and their table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict

import torch

from engine.weights.model_config import ModelError, Rope
from hybridcache.geometry.config_format import Config

Parameters = Mapping[str, object]
"""Section ``rope_parameters`` of a config.json, which is not checked yet."""


class RotaryTable:
    """cos and sin ``[max_model_len, R]`` in the model's dtype, with equal halves. A table, so that
    a position always has the same bits. R is 0 for a model without rotation."""

    def __init__(
        self, rope: Rope | None, max_model_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        frequencies, factor = ((), 1.0) if rope is None else (rope.frequencies, rope.factor)
        angles = torch.arange(max_model_len, dtype=torch.float)[:, None] * torch.tensor(frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos = (angles.cos() * factor).to(device, dtype)
        self.sin = (angles.sin() * factor).to(device, dtype)

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin of int64[T] positions: ``[T, R]`` each."""
        return self.cos[positions], self.sin[positions]


class RopeDefaults(TypedDict, total=False):
    """Arguments of ``read_rope`` for a family of models."""

    theta: float
    fraction: float | None
    is_optional: bool


def read_rope(
    config: Config,
    head_dim: int,
    *,
    theta: float = 10_000.0,
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
    if not dim:
        return None
    exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
    frequencies = 1.0 / base**exponents
    if kind == "default":
        return _rope(frequencies)
    if kind == "linear":
        return _rope(frequencies / _positive("factor", found.get("factor")))
    if kind == "llama3":
        original = _original_len(found, config)
        factor = _positive("factor", found.get("factor"))
        kept = _kept_by_llama3(found, original * frequencies / (2 * math.pi))
        return _rope(_mixed(frequencies, factor, kept))
    if kind == "yarn":
        if base == 1:
            raise ModelError("rope_theta 1.0 in config.json is not supported with type 'yarn'.")
        original = _original_len(found, config)
        factor, attention_factor = _yarn_factors(found, config, original)
        kept = _kept_by_yarn(found, dim, base, original)
        return _rope(_mixed(frequencies, factor, kept), attention_factor, int(factor * original))
    raise ModelError(
        f"rotary embeddings of type {kind!r} ({section}) are not supported; default, linear, "
        "llama3 and yarn are."
    )


def _rope(frequencies: torch.Tensor, factor: float = 1.0, max_len: int = 0) -> Rope:
    return Rope(tuple(frequencies.tolist()), factor, max_len)


def _mixed(frequencies: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    """Divide low frequencies by ``factor``, keep high ones, and interpolate in between. ``kept`` is
    the part of each that is kept, clamped to [0, 1]."""
    kept = kept.clamp(0.0, 1.0)
    return frequencies * kept + frequencies / factor * (1.0 - kept)


def _original_len(found: Parameters, config: Config) -> float:
    """Return the length of the first training. Both values must be valid; the one outside is
    used."""
    original = config["max_position_embeddings"]
    for part in (found, config):
        original = part.get("original_max_position_embeddings", original)
        original = _positive("original_max_position_embeddings", original)
    return original


def _kept_by_llama3(found: Parameters, rotations: torch.Tensor) -> torch.Tensor:
    """Return the part of each frequency that is kept, by its rotations in the original length."""
    low, high = (
        _positive(name, found.get(name)) for name in ("low_freq_factor", "high_freq_factor")
    )
    if low >= high:
        raise ModelError(
            f"high_freq_factor of rotary embeddings must be greater than low_freq_factor in "
            f"config.json (got {high} and {low})."
        )
    return (rotations - low) / (high - low)


def _kept_by_yarn(found: Parameters, dim: int, base: float, original: float) -> torch.Tensor:
    """Return the part of each frequency that is kept, by its index: 1 up to the first, and linear
    to 0 at the last. Source: https://arxiv.org/abs/2309.00071."""
    bounds = ("beta_fast", 32), ("beta_slow", 1)
    first, last = (  # Indices of the frequencies with these numbers of rotations.
        dim
        * math.log(original / (_positive(name, found.get(name) or usual) * 2 * math.pi))
        / (2 * math.log(base))
        for name, usual in bounds
    )
    if found.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    return 1.0 - (torch.arange(dim // 2, dtype=torch.float) - first) / (last - first)


def _yarn_factors(found: Parameters, config: Config, original: float) -> tuple[float, float]:
    """Return the factors of the length, and of cos and sin."""
    if "factor" not in found:
        raise ModelError("rope_parameters of type 'yarn' in config.json must have a factor.")
    factor = found["factor"]
    factor = config["max_position_embeddings"] / original if factor is None else factor
    factor = _positive("factor", factor)
    attention_factor = found.get("attention_factor")
    if attention_factor is None:
        over, under = (found.get(name) for name in ("mscale", "mscale_all_dim"))
        attention_factor = _yarn_scale(factor, 1.0)
        if over and under:
            over, under = _number("mscale", over), _number("mscale_all_dim", under)
            attention_factor = _yarn_scale(factor, over) / _yarn_scale(factor, under)
    return factor, _number("attention_factor", attention_factor)


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
