"""The kinds of mixers, and what each declares to keep."""

from __future__ import annotations

from dataclasses import dataclass

from hybridcache.geometry.sizes import KVSpec, Spec, StateSpec


@dataclass(frozen=True, slots=True)
class AttentionSizes:
    """Softmax attention with grouped queries."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool = False
    """Whether the output is multiplied with a gate as wide as the queries."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        shape = self.num_kv_heads, self.head_dim
        return KVSpec("key", shape), KVSpec("value", shape)

    @property
    def pair_flops(self) -> int:
        return 4 * self.num_heads * self.head_dim  # 2 for QK and 2 for PV

    def num_params(self, hidden: int) -> int:
        queries = 2 if self.gated else 1
        width = self.num_heads * self.head_dim
        return hidden * ((queries + 1) * width + 2 * self.num_kv_heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class LatentAttentionSizes:
    """Multi-head latent attention: a token keeps one latent vector, and beside it one key, rotated
    or not, for all heads."""

    num_heads: int
    rank: int
    """Of the latent vector."""
    rope_dim: int
    """Of the shared key."""
    nope_dim: int = 128
    """Of a head's keys, beside what is rotated."""
    value_dim: int = 128

    @property
    def keeps(self) -> tuple[Spec, ...]:
        return (KVSpec("latent", (self.rank + self.rope_dim,)),)

    @property
    def pair_flops(self) -> int:
        """In expanded form."""
        return self.num_heads * 2 * (self.nope_dim + self.rope_dim + self.value_dim)

    def num_params(self, hidden: int) -> int:
        queries = hidden * self.num_heads * (self.nope_dim + self.rope_dim)
        down = hidden * (self.rank + self.rope_dim)
        up = self.rank * self.num_heads * (self.nope_dim + self.value_dim)
        return queries + down + up + self.num_heads * self.value_dim * hidden


@dataclass(frozen=True, slots=True)
class DeltaSizes:
    """A linear-attention layer of key times value states: Gated DeltaNet, Kimi Delta Attention,
    lightning attention."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    """Per head."""
    value_dim: int
    """Per head."""
    conv_width: int
    """Taps of the causal convolution over queries, keys and values; 0: there is none."""

    @property
    def key_width(self) -> int:
        """Of all heads."""
        return self.num_key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Of all heads."""
        return self.num_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Queries, keys and values of all heads: what the convolution runs over."""
        return 2 * self.key_width + self.value_width

    @property
    def keeps(self) -> tuple[Spec, ...]:
        shape = self.num_value_heads, self.key_dim, self.value_dim
        return *conv_window(self.conv_channels, self.conv_width), recurrent(shape)

    @property
    def pair_flops(self) -> int:
        return 0

    def num_params(self, hidden: int) -> int:
        return hidden * (2 * self.key_width + 3 * self.value_width)  # q, k; v, gate, out


@dataclass(frozen=True, slots=True)
class MambaSizes:
    """A selective state space, Mamba-1 (one head a channel, no groups) or Mamba-2."""

    num_heads: int
    head_dim: int
    state_dim: int
    num_groups: int
    """That B and C are shared by, as they go through the convolution; 0: they do not."""
    conv_width: int

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """x, B and C: what the convolution runs over."""
        return self.inner + 2 * self.num_groups * self.state_dim

    @property
    def keeps(self) -> tuple[Spec, ...]:
        shape = self.num_heads, self.state_dim, self.head_dim
        return *conv_window(self.conv_channels, self.conv_width), recurrent(shape)

    @property
    def pair_flops(self) -> int:
        return 0

    def num_params(self, hidden: int) -> int:
        return hidden * (2 * self.inner + self.conv_channels)  # x, B, C; gate; out


@dataclass(frozen=True, slots=True)
class ShortConvSizes:
    """A gated causal convolution: its whole state are the last inputs."""

    channels: int
    conv_width: int
    """Taps: one more than inputs are kept."""

    @property
    def keeps(self) -> tuple[Spec, ...]:
        return conv_window(self.channels, self.conv_width)

    @property
    def pair_flops(self) -> int:
        return 0

    def num_params(self, hidden: int) -> int:
        return 4 * hidden * hidden


@dataclass(frozen=True, slots=True)
class StatedSizes:
    """A recurrence of which only the sizes of the states are known."""

    state_size: int
    conv_size: int

    @property
    def keeps(self) -> tuple[Spec, ...]:
        return StateSpec("conv", (self.conv_size,), "conv"), recurrent((self.state_size,))

    @property
    def pair_flops(self) -> int:
        return 0

    def num_params(self, hidden: int) -> int:
        return 0


def conv_window(channels: int, width: int) -> tuple[StateSpec, ...]:
    """The inputs that a causal convolution of ``width`` taps still needs; none without one."""
    return (StateSpec("conv", (channels, width - 1), "conv"),) if width > 1 else ()


def recurrent(shape: tuple[int, ...]) -> StateSpec:
    """The state of a recurrence."""
    return StateSpec("recurrent", shape, "recurrent")
