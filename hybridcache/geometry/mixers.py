"""Mixer kinds: dimensions, stored tensors, FLOPs and parameters of each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from hybridcache.geometry.sizes import MixerSizes, Spec, part


@dataclass(frozen=True, slots=True)
class AttentionSizes(MixerSizes):
    """Softmax attention with grouped queries."""

    divided = ("num_heads",)
    copied = ("num_kv_heads",)

    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool = False
    """True if the output is multiplied with a gate as wide as the queries."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        shape = self.num_kv_heads, self.head_dim
        return Spec("key", shape, "kv"), Spec("value", shape, "kv")

    @property
    def pair_flops(self) -> int:
        return 4 * self.num_heads * self.head_dim  # 2 for QK and 2 for PV

    def num_params(self, hidden: int) -> int:
        queries = 2 if self.gated else 1
        width = self.num_heads * self.head_dim
        return hidden * ((queries + 1) * width + 2 * self.num_kv_heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class LatentAttentionSizes(MixerSizes):
    """Multi-head latent attention.

    Each token stores one latent vector and one key that all heads share (rotated or not). Every
    rank stores them.
    """

    divided = ("num_heads",)

    num_heads: int
    rank: int
    """Width of the latent vector."""
    rope_dim: int
    """Width of the shared key."""
    nope_dim: int = 128
    """Width of a head's keys, excluding the rotated part."""
    value_dim: int = 128

    @property
    def keeps(self) -> tuple[Spec, ...]:
        return (Spec("latent", (self.rank + self.rope_dim,), "kv"),)

    @property
    def pair_flops(self) -> int:
        """FLOPs per query-key pair in expanded form."""
        return self.num_heads * 2 * (self.nope_dim + self.rope_dim + self.value_dim)

    def num_params(self, hidden: int) -> int:
        queries = hidden * self.num_heads * (self.nope_dim + self.rope_dim)
        down = hidden * (self.rank + self.rope_dim)
        up = self.rank * self.num_heads * (self.nope_dim + self.value_dim)
        return queries + down + up + self.num_heads * self.value_dim * hidden


@dataclass(frozen=True, slots=True)
class DeltaSizes(MixerSizes):
    """Linear attention with key-by-value states: Gated DeltaNet, Kimi Delta Attention, lightning
    attention."""

    divided = ("num_key_heads", "num_value_heads")

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Width of one key head."""
    value_dim: int
    """Width of one value head."""
    conv_width: int
    """Taps of the causal convolution over queries, keys and values. 0 if there is none."""

    @property
    def key_width(self) -> int:
        """Width of all key heads together."""
        return self.num_key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Width of all value heads together."""
        return self.num_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values of all heads."""
        return 2 * self.key_width + self.value_width

    @property
    def keeps(self) -> tuple[Spec, ...]:
        shape = self.num_value_heads, self.key_dim, self.value_dim
        return *conv_window(self.conv_channels, self.conv_width), recurrent(shape)

    def num_params(self, hidden: int) -> int:
        return hidden * (2 * self.key_width + 3 * self.value_width)  # q, k; v, gate, out


@dataclass(frozen=True, slots=True)
class MambaSizes(MixerSizes):
    """Selective state space: Mamba-1 (one head per channel, no groups) or Mamba-2."""

    divided = ("num_heads",)
    copied = ("num_groups",)

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    """Groups of heads that share B and C. 0 if B and C bypass the convolution (Mamba-1)."""
    conv_width: int

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.num_groups * self.state_dim

    @property
    def keeps(self) -> tuple[Spec, ...]:
        shape = self.num_heads, self.state_dim, self.head_dim
        return *conv_window(self.conv_channels, self.conv_width), recurrent(shape)

    def num_params(self, hidden: int) -> int:
        return hidden * (2 * self.inner + self.conv_channels)  # x, B, C; gate; out

    def share(self, count: int) -> Self:
        if not self.num_groups:  # Mamba-1: its channels are one head.
            channels = part(self.head_dim, count, "channels of a state space")
            return replace(self, head_dim=channels)
        return MixerSizes.share(self, count)


@dataclass(frozen=True, slots=True)
class ShortConvSizes(MixerSizes):
    """Gated causal convolution. Its state is the window of the last inputs."""

    divided = ("channels",)

    channels: int
    conv_width: int
    """Taps. The state stores one input fewer."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        return conv_window(self.channels, self.conv_width)

    def num_params(self, hidden: int) -> int:
        return 4 * hidden * hidden


def conv_window(channels: int, width: int) -> tuple[Spec, ...]:
    """Return the spec of a causal convolution's last inputs, or nothing for fewer than 2 taps."""
    return (Spec("conv", (channels, width - 1), "conv"),) if width > 1 else ()


def recurrent(shape: tuple[int, ...]) -> Spec:
    """Return the spec of a recurrent state."""
    return Spec("recurrent", shape, "recurrent")
