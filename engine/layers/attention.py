"""Softmax attention with grouped queries, norms, partial rotary embedding and optional output
gate."""

from __future__ import annotations

import math

import torch

from engine.layers.blocks import (
    LayerInputs,
    OneProduct,
    Pools,
    PrefillPart,
    RMSNorm,
    StepPart,
    VerifyPart,
    pad_rows,
)
from engine.weights.model_config import ModelError
from engine.weights.parameters import Build
from engine.weights.products import Linear, Part
from hybridcache.geometry.mixers import AttentionSizes


class Attention(OneProduct):
    """Attention with one product ``[gate | query | key | value]``."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: AttentionSizes,
        build: Build,
        *,
        norms: tuple[RMSNorm, RMSNorm] | None = None,
        bias: bool = False,
        output: str = "o_proj",
        output_bias: bool | None = None,
        rotates: bool = True,
        scale: float | None = None,
    ) -> None:
        """Make the layer.

        ``norms`` are those of queries and keys, over one head or over all heads. ``output`` is the
        name of the last product. Its bias is that of the others if ``output_bias`` is None.
        ``scale`` multiplies the products with keys; None means ``head_dim ** -0.5``.
        """
        if build.is_divided and norms is not None and norms[0].size != sizes.head_dim:
            raise ModelError(
                f"--tp does not support norms over all heads, as in {name}: omit --tp."
            )
        heads, keys = ((n, sizes.head_dim) for n in (sizes.num_heads, sizes.num_kv_heads))
        kinds = [heads] * (1 + sizes.gated) + [keys, keys]
        inputs = [
            Part(f"{name}.q_proj", math.prod(heads) * (1 + sizes.gated), _gate_first(sizes)),
            Part(f"{name}.k_proj", math.prod(keys)),
            Part(f"{name}.v_proj", math.prod(keys)),
        ]
        self._projection = Linear(hidden_size, inputs, build, outputs=kinds, bias=bias)
        self._output = Linear(
            math.prod(heads),
            [Part(f"{name}.{output}", hidden_size)],
            build,
            bias=bias if output_bias is None else output_bias,
            sums=True,
        )
        self.sizes = sizes = build.own(sizes)
        self.keeps, self._rotates = sizes.keeps, rotates
        queries, kept = (n * sizes.head_dim for n in (sizes.num_heads, sizes.num_kv_heads))
        self._widths = [queries * sizes.gated, queries, kept, kept]
        self.projected_size, self.mixed_shape = sum(self._widths), (queries,)
        self._norms = norms
        self.layers = self._projection, self._output, *(norms or ())
        self._scale = sizes.head_dim**-0.5 if scale is None else scale
        self._attention = build.kernels["attention"]
        self._rotate_and_write = build.kernels["rotary"].rotate_and_write

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Write this step's KV, and attend to all tokens so far. Returns ``[T, HQ * D]``, gated if
        the layer has a gate."""
        key_pool, value_pool = pools
        query, gate = self.write(projected, inputs, pools), None
        if self.sizes.gated:
            gate = projected[: inputs.num_tokens, : self._widths[0]]

        def attend(part: StepPart, tokens: slice) -> torch.Tensor:
            kernel = self._attention.decode_attention
            if isinstance(part, VerifyPart):
                kernel = self._attention.verify_attention
            elif isinstance(part, PrefillPart):
                kernel = self._attention.prefill_attention
            where = {"table": inputs.table, "scale": self._scale} | part.attention_inputs
            own_gate = None if gate is None else gate[tokens]
            return kernel(query[tokens], key_pool, value_pool, gate=own_gate, **where)

        return inputs.by_part(attend).flatten(1)

    def write(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Write this step's KV. Returns the queries, ``[T, HQ, D]``."""
        parts = projected[: inputs.num_tokens].split(self._widths, dim=-1)[1:]
        options: dict[str, object] = {}
        if (norms := self._norms) is not None:
            if norms[0].size == self.sizes.head_dim:
                options = {"norms": [norm.weight for norm in norms], "eps": norms[0].eps}
            else:
                parts = *(norm(x) for norm, x in zip(norms, parts, strict=False)), parts[2]
        if self._rotates:
            options["angles"] = inputs.angles
        heads = [part.unflatten(-1, (-1, self.sizes.head_dim)) for part in parts]
        return self._rotate_and_write(*heads, *pools, inputs.kv_indices, **options)

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        return self._output(pad_rows(mixed, len(projected)))


def _gate_first(sizes: AttentionSizes) -> torch.Tensor | None:
    """Return the order of rows with the gates first. Checkpoints have query and gate head by head,
    ``[q_0 | g_0 | q_1 | g_1 ...]``."""
    if not sizes.gated:
        return None
    rows = torch.arange(2 * sizes.num_heads * sizes.head_dim).view(-1, 2, sizes.head_dim)
    return torch.cat([rows[:, 1].flatten(), rows[:, 0].flatten()])
