"""Tensor parallelism: the sizes that one of several ranks computes and stores.

Heads, channels and inner widths of feed-forward blocks are divided. The residual stream is
replicated on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from hybridcache.geometry.mixers import (
    AttentionSizes,
    DeltaSizes,
    LatentAttentionSizes,
    MambaSizes,
    ShortConvSizes,
)
from hybridcache.geometry.sizes import (
    ExpertsSizes,
    LayerSizes,
    MixerSizes,
    MLPSizes,
    ModelSizes,
    SizesError,
)

S = TypeVar("S", bound=MixerSizes | MLPSizes | ExpertsSizes)


def share_of(sizes: ModelSizes, count: int) -> ModelSizes:
    """Return the sizes that one of ``count`` ranks computes and stores.

    Width and vocabulary stay whole.

    Raises:
        SizesError: a layer cannot be divided evenly.
    """
    layers = [
        LayerSizes(
            tuple(share(mixer, count) for mixer in layer.mixers),
            None if layer.mlp is None else share(layer.mlp, count),
        )
        for layer in sizes.layers
    ]
    return replace(sizes, layers=tuple(layers))


def share(sizes: S, count: int) -> S:
    """Divide one mixer or feed-forward block by ``count``. Raises SizesError if it is uneven."""
    if count == 1:
        return sizes
    made = SHARES.get(type(sizes))
    if made is None:
        kind = type(sizes).__name__.removesuffix("Sizes")
        raise SizesError(f"Layers of kind {kind} cannot be divided over ranks")
    shared: S = made(sizes, count)
    return shared


def part(size: int, count: int, what: str) -> int:
    """Divide ``size`` evenly. Raises SizesError if there is a remainder."""
    if size % count:
        raise SizesError(f"{count} ranks cannot divide {size} {what} evenly")
    return size // count


def _repeated(size: int, count: int, what: str) -> int:
    """Divide ``size`` evenly, or return 1 if each unit is replicated on several ranks."""
    return 1 if 0 < size < count and count % size == 0 else part(size, count, what)


def _latent_attention(sizes: LatentAttentionSizes, count: int) -> LatentAttentionSizes:
    """Divide the heads. The latent row is replicated."""
    return replace(sizes, num_heads=part(sizes.num_heads, count, "heads of latent attention"))


def _attention(sizes: AttentionSizes, count: int) -> AttentionSizes:
    heads = part(sizes.num_heads, count, "heads of attention")
    kv_heads = _repeated(sizes.num_kv_heads, count, "heads of keys and values")
    return replace(sizes, num_heads=heads, num_kv_heads=kv_heads)


def _delta(sizes: DeltaSizes, count: int) -> DeltaSizes:
    keys = part(sizes.num_key_heads, count, "key heads of linear attention")
    values = part(sizes.num_value_heads, count, "value heads of linear attention")
    return replace(sizes, num_key_heads=keys, num_value_heads=values)


def _mamba(sizes: MambaSizes, count: int) -> MambaSizes:
    if not sizes.num_groups:  # Mamba-1: its channels are one head.
        channels = part(sizes.head_dim, count, "channels of a state space")
        return replace(sizes, head_dim=channels)
    heads = part(sizes.num_heads, count, "heads of a state space")
    groups = _repeated(sizes.num_groups, count, "groups of a state space")
    return replace(sizes, num_heads=heads, num_groups=groups)


def _short_conv(sizes: ShortConvSizes, count: int) -> ShortConvSizes:
    return replace(sizes, channels=part(sizes.channels, count, "channels of a convolution"))


def _mlp(sizes: MLPSizes, count: int) -> MLPSizes:
    return replace(sizes, intermediate=part(sizes.intermediate, count, "units of an MLP"))


def _experts(sizes: ExpertsSizes, count: int) -> ExpertsSizes:
    """Divide every expert over all ranks, so that the load is even for any routing."""
    return replace(
        sizes,
        intermediate=part(sizes.intermediate, count, "units of an expert"),
        shared_intermediate=part(sizes.shared_intermediate, count, "units of a shared expert"),
    )


SHARES: dict[type, Callable[[Any, int], Any]] = {
    AttentionSizes: _attention,
    LatentAttentionSizes: _latent_attention,
    DeltaSizes: _delta,
    MambaSizes: _mamba,
    ShortConvSizes: _short_conv,
    MLPSizes: _mlp,
    ExpertsSizes: _experts,
}
