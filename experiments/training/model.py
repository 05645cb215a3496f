"""The built-in model for training: Qwen3-Next with autograd and the multi-token head.

Parameters are named as in a checkpoint. The delta rule runs in chunks (Yang et al. 2024, arXiv
2412.06464), so training consists of matrix products instead of a loop over tokens. Serving uses
``engine``; ``tests/experiments`` compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Links = list[tuple[Tensor, Tensor]]
"""Keys and values ``[B, heads, T - n, D]`` of pass n of the multi-token head."""

CHUNK = 32
"""Tokens per chunk of the delta rule. The result does not depend on it."""


class CentredNorm(nn.Module):
    """RMS norm with weights stored as differences from 1."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + self.weight, self.eps).to(x.dtype)


class GatedNorm(nn.Module):
    """RMS norm, multiplied by silu of a gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)
        return (normed * F.silu(gate.float())).to(gate.dtype)


class GatedDeltaNet(nn.Module):
    """Gated delta rule layer, ``[B, T, H]`` to ``[B, T, H]``.

    Projections are interleaved by key head, as in Qwen3-Next's files.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.key_heads, self.value_heads = (
            config["linear_num_key_heads"],
            config["linear_num_value_heads"],
        )
        self.key_dim, self.value_dim = (
            config["linear_key_head_dim"],
            config["linear_value_head_dim"],
        )
        self.group = self.value_heads // self.key_heads
        hidden, width = config["hidden_size"], config["linear_conv_kernel_dim"]
        keys, values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.in_proj_qkvz = nn.Linear(hidden, 2 * keys + 2 * values, bias=False)
        self.in_proj_ba = nn.Linear(hidden, 2 * self.value_heads, bias=False)
        channels = 2 * keys + values
        self.conv1d = nn.Conv1d(
            channels, channels, width, groups=channels, padding=width - 1, bias=False
        )
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(0.02, 8.0).log())
        steps = torch.empty(self.value_heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.norm = GatedNorm(self.value_dim, config["rms_norm_eps"])
        self.out_proj = nn.Linear(values, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value, z, b, a = self._split(x)
        mixed = torch.cat([part.flatten(2) for part in (query, key, value)], dim=-1)
        mixed = F.silu(self.conv1d(mixed.mT)[..., :length]).mT
        keys = self.key_heads * self.key_dim
        query, key, value = mixed.split([keys, keys, mixed.shape[-1] - 2 * keys], dim=-1)
        query, key = (
            F.normalize(part.float().view(batch, length, self.key_heads, -1), dim=-1, eps=1e-6)
            .repeat_interleave(self.group, 2)
            .transpose(1, 2)
            for part in (query, key)
        )
        value = value.float().view(batch, length, self.value_heads, -1).transpose(1, 2)
        gate = -self.A_log.exp() * F.softplus(a.float() + self.dt_bias)
        out = delta_rule(
            query * self.key_dim**-0.5, key, value, gate.transpose(1, 2), b.float().sigmoid().mT
        )
        return self.out_proj(self.norm(out.transpose(1, 2), z).flatten(2))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return query and key ``[B, T, HK, K]``, value and z ``[B, T, HV, V]``, b and a ``[B, T,
        HV]``."""
        shape, values = x.shape[:2], self.group * self.value_dim
        grouped = self.in_proj_qkvz(x).view(*shape, self.key_heads, -1)
        query, key, value, z = grouped.split([self.key_dim, self.key_dim, values, values], dim=-1)
        b, a = self.in_proj_ba(x).view(*shape, self.key_heads, -1).chunk(2, dim=-1)
        heads = (*shape, self.value_heads, self.value_dim)
        return query, key, value.reshape(heads), z.reshape(heads), b.flatten(2), a.flatten(2)


@torch.autocast("cpu", enabled=False)
def delta_rule(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, beta: Tensor) -> Tensor:
    """Apply the gated delta rule from a zero state, in float32. Returns ``[B, H, T, V]``.

    ``query`` and ``key`` are ``[B, H, T, K]``, with keys of unit length. ``gate`` (log decays) and
    ``beta`` are ``[B, H, T]``.
    """
    length = query.shape[2]
    query, key, value, gate, beta = (
        F.pad(x, [0, 0] * (x.ndim - 3) + [0, -length % CHUNK]).unflatten(2, (-1, CHUNK))
        for x in (query, key, value, gate, beta)
    )
    total = gate.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril()
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()
    weighted = key * beta.unsqueeze(-1)
    inverse = _unit_inverse((weighted @ key.mT * decay).tril(-1))
    writes = inverse @ (value * beta.unsqueeze(-1))
    reads = inverse @ (weighted * total.exp().unsqueeze(-1))
    within = query @ key.mT * decay
    carried = query * total.exp().unsqueeze(-1)
    decayed = key * (total[..., -1:] - total).exp().unsqueeze(-1)
    state = value.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    outs = []
    for chunk in range(key.shape[2]):
        new = writes[:, :, chunk] - reads[:, :, chunk] @ state
        outs.append(carried[:, :, chunk] @ state + within[:, :, chunk] @ new)
        end = total[:, :, chunk, -1].exp()[..., None, None]
        state = state * end + decayed[:, :, chunk].mT @ new
    return torch.cat(outs, dim=2)[:, :, :length]


def _unit_inverse(lower: Tensor) -> Tensor:
    """Return ``(I + lower)^-1`` of strictly lower triangular ``[..., CHUNK, CHUNK]``.

    Such matrices are nilpotent, so the power series is finite.
    """
    power = -lower
    inverse = torch.eye(CHUNK) + power
    for _ in range(CHUNK.bit_length() - 2):
        power = power @ power
        inverse = inverse + inverse @ power
    return inverse


class Attention(nn.Module):
    """Gated attention with rotary embeddings on a part of each head."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = dim = config["head_dim"]
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.q_proj = nn.Linear(hidden, 2 * self.heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(self.heads * dim, hidden, bias=False)
        self.q_norm, self.k_norm = CentredNorm(dim, eps), CentredNorm(dim, eps)
        self.rotated = int(dim * config["partial_rotary_factor"])
        self.theta = config["rope_theta"]

    def forward(self, x: Tensor, links: Links | None = None) -> Tensor:
        """Attend to this pass and to the earlier passes in ``links``, to which this pass is added.

        ``links`` holds the keys and values of earlier passes over the same sequence, shifted by one
        token each. A query sees the first pass's keys up to the start of its chain, and its chained
        chain's keys of later passes.
        """
        links = [] if links is None else links
        shape = (*x.shape[:2], -1, self.head_dim)
        query, gate = self.q_proj(x).view(*x.shape[:2], self.heads, -1).chunk(2, dim=-1)
        query = self._rotate(self.q_norm(query).transpose(1, 2), len(links))
        key = self._rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), len(links))
        links.append((key, self.v_proj(x).view(shape).transpose(1, 2)))
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*links, strict=True))
        first, *chained = (
            torch.ones(x.shape[1], key.shape[2], dtype=torch.bool).tril() for key, _ in links
        )
        mask = torch.cat([first, *(part.triu() for part in chained)], dim=1) if chained else None
        out = F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=mask is None, enable_gqa=True
        )
        return self.o_proj((out.transpose(1, 2) * gate.sigmoid()).flatten(2))

    def _rotate(self, x: Tensor, first: int) -> Tensor:
        rates = self.theta ** (-torch.arange(0, self.rotated, 2) / self.rotated)
        angles = torch.arange(first, first + x.shape[2])[:, None] * rates
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
        turned, rest = x[..., : self.rotated], x[..., self.rotated :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Mixer and MLP with residual connections."""

    def __init__(self, config: Mapping[str, Any], *, is_full: bool) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.input_layernorm = CentredNorm(hidden, eps)
        self.post_attention_layernorm = CentredNorm(hidden, eps)
        if is_full:
            self.self_attn = self._mixer = Attention(config)
        else:
            self.linear_attn = self._mixer = GatedDeltaNet(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *links: Links) -> Tensor:
        x = x + self._mixer(self.input_layernorm(x), *links)
        return x + self.mlp(self.post_attention_layernorm(x))


class Draft(nn.Module):
    """Multi-token head.

    Maps the hidden vector at a position and the next token to the hidden vector that predicts the
    token after it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = CentredNorm(hidden, eps)
        self.pre_fc_norm_hidden = CentredNorm(hidden, eps)
        self.layers = nn.ModuleList([DecoderLayer(config, is_full=True)])
        self.norm = CentredNorm(hidden, eps)

    def forward(self, hidden: Tensor, embedded: Tensor, links: Links) -> Tensor:
        parts = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        return self.norm(self.layers[0](self.fc(torch.cat(parts, dim=-1)), links))


class Backbone(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        every = config["full_attention_interval"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(
            DecoderLayer(config, is_full=(layer + 1) % every == 0)
            for layer in range(config["num_hidden_layers"])
        )
        self.norm = CentredNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, token_ids: Tensor) -> Tensor:
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Model(nn.Module):
    """Qwen3-Next with dense MLPs and one multi-token head. ``state_dict`` is its checkpoint."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = Backbone(config)
        self.mtp = Draft(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        scale = (2 * config["num_hidden_layers"]) ** -0.5
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                nn.init.normal_(weight, std=0.02 * scale)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, token_ids: Tensor, depth: int = 0) -> list[Tensor]:
        """Return logits ``[B, T - d, vocab]`` for d = 0 .. ``depth``.

        Logits at d predict the token d + 1 positions later, with the multi-token head applied d
        times.
        """
        hidden = self.model(token_ids)
        logits = [self.lm_head(hidden)]
        links: Links = []
        for d in range(1, depth + 1):
            embedded = self.model.embed_tokens(token_ids[:, d:])
            hidden = self.mtp(hidden[:, :-1], embedded, links)
            logits.append(self.lm_head(hidden))
        return logits


def losses(logits: list[Tensor], token_ids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean cross entropy per depth, ``[depth + 1]``, in nats per token.

    ``weights`` ``[B, T]`` are the weights of the tokens in the mean.
    """
    weights = torch.ones(token_ids.shape) if weights is None else weights
    found = []
    for d, predicted in enumerate(logits):
        targets = token_ids[:, d + 1 :]
        entropy = F.cross_entropy(predicted[:, :-1].mT.float(), targets, reduction="none")
        counts = weights[:, d + 1 :]
        found.append((entropy * counts).sum() / counts.sum())
    return torch.stack(found)
