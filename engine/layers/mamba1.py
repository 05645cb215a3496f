"""Mamba-1 after a short causal convolution, with Jamba's norms of time steps, B and C."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from engine.layers.inputs import LayerInputs, Pools, PrefillPart, StepPart, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.norm import RMSNorm
from engine.layers.parameters import Build, Composite, Parameter
from engine.layers.shortconv import CausalConv
from hybridcache.geometry.mixers import MambaSizes


class Mamba1(Composite):
    """Layer with an input product ``[x | z]``. Time steps, B and C are products of the
    convolution's output, so ``mix`` contains dense products."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: MambaSizes,
        rank: int,
        build: Build,
        *,
        eps: float,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        """``rank``: inner size of the time steps' product. ``eps``: epsilon of the norms. ``bias``:
        True if input and output products have one."""
        inner, state, weights = sizes.inner, sizes.state_dim, build.weights
        self._widths, channels = [rank, state, state], (inner, 1)
        inputs = shared([Part(f"{name}.in_proj", 2 * inner)], [channels] * 2, build.rank)
        self._projection = Linear(hidden_size, inputs, build, bias=bias)
        selected = [Part(f"{name}.x_proj", sum(self._widths))]
        self._selection = Linear(inner, selected, build, shares_inputs=True)
        steps = shared([Part(f"{name}.dt_proj", inner)], [channels], build.rank)
        self._steps = Linear(rank, steps, build)
        outputs = [Part(f"{name}.out_proj", hidden_size)]
        self._output = Linear(inner, outputs, build, bias=bias, shares_inputs=True)
        self._cut, sizes = build.rank.cut(channels), sizes.share(build.rank.count)
        self.name, self.sizes, self.keeps, inner = name, sizes, sizes.keeps, sizes.inner
        self.projected_size, self.mixed_shape = 2 * inner, (inner,)
        self._norms = [
            RMSNorm(f"{name}.{word}_layernorm", size, build, eps=eps)
            for word, size in zip(("dt", "b", "c"), self._widths, strict=True)
        ]
        products = self._projection, self._selection, self._steps, self._output
        self.layers = *products, *self._norms
        self._conv = CausalConv(inner, sizes.conv_width, build, bias=conv_bias)
        self._A_log = weights.empty(inner, state, dtype=torch.float32)
        self._dt_bias = weights.empty(inner, dtype=torch.float32)
        self._D = weights.empty(inner, dtype=torch.float32)
        self._mamba1 = build.kernels["mamba1"]
        self._gate = build.kernels["activation"].silu_mul

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from super().parameters()
        yield f"{self.name}.conv1d.weight", Parameter(self._conv.weight.unsqueeze(1), cut=self._cut)
        if self._conv.bias is not None:
            yield f"{self.name}.conv1d.bias", Parameter(self._conv.bias, cut=self._cut)
        yield f"{self.name}.A_log", Parameter(self._A_log, "log_decay", cut=self._cut)
        yield f"{self.name}.dt_proj.bias", Parameter(self._dt_bias, "time_bias", cut=self._cut)
        yield f"{self.name}.D", Parameter(self._D, "skip", cut=self._cut)

    def seal(self) -> None:
        super().seal()
        self._A = self._A_log.exp().neg().mT.contiguous()
        del self._A_log

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Convolve and scan, starting from each sequence's state and updating it in its slot.
        Returns ``[T, V]``."""
        x = projected[: inputs.num_tokens, : self.sizes.inner]
        windows, states = pools[0], pools[1][:, 0]
        x = inputs.by_part(lambda part, tokens: self._conv(x[tokens], part, windows))
        selected = self._selection(pad_rows(x, inputs.num_rows)).split(self._widths, dim=-1)
        dt, B, C = (norm(part) for norm, part in zip(self._norms, selected, strict=True))
        dt = self._steps(dt)
        return inputs.by_part(
            lambda part, tokens: self._scan([rows[tokens] for rows in (x, B, C, dt)], part, states)
        )

    def _scan(
        self, tokens: list[torch.Tensor], part: StepPart, states: torch.Tensor
    ) -> torch.Tensor:
        out: torch.Tensor
        if isinstance(part, PrefillPart):
            *tokens, dt = tokens
            step = self._mamba1.time_steps(dt, self._dt_bias)
            out = self._mamba1.chunk_mamba1(
                *tokens, step, self._A, self._D, states=states, **part.scan_inputs
            )
        else:
            out = self._mamba1.decode_mamba1(
                *tokens, self._A, self._dt_bias, self._D, states=states, **part.scan_inputs
            )
        return out

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        z = projected[: len(mixed), self.sizes.inner :]
        return self._output(pad_rows(self._gate(mixed, z), len(projected)))
