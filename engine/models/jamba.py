"""Jamba: Mamba-1 with some attention layers, and experts in place of some MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.layers.blocks import (
    MLP,
    FeedForward,
    LayerInputs,
    Mixer,
    Pools,
    PrefillPart,
    RMSNorm,
    StepPart,
    pad_rows,
)
from engine.layers.experts import Gating, RoutedExperts
from engine.layers.recurrent import CausalConv, Recurrent
from engine.models.decoder import Decoder
from engine.weights.parameters import Build
from engine.weights.products import Experts, Linear, Part, expert_names
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import ExpertsSizes, MixerSizes, MLPSizes


class Mamba1(Recurrent):
    """Layer with an input product ``[x | z]``, and Jamba's norms. Time steps, B and C are products
    of the convolution's output, so ``mix`` contains dense products."""

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: MambaSizes,
        step_size: int,
        build: Build,
        *,
        eps: float,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        """``step_size``: inner size of the time steps' product. ``eps``: epsilon of the norms.
        ``bias``: True if input and output products have one."""
        inner, state, weights = sizes.inner, sizes.state_dim, build.weights
        self._widths, channels = [step_size, state, state], [(inner, 1)]
        inputs = [Part(f"{name}.in_proj", 2 * inner)]
        self._projection = Linear(hidden_size, inputs, build, outputs=2 * channels, bias=bias)
        selected = [Part(f"{name}.x_proj", sum(self._widths))]
        self._selection = Linear(inner, selected, build, sums=True)
        steps = [Part(f"{name}.dt_proj", inner)]
        self._steps = Linear(step_size, steps, build, outputs=channels)
        outputs = [Part(f"{name}.out_proj", hidden_size)]
        self._output = Linear(inner, outputs, build, bias=bias, sums=True)
        conv, sizes = {f"{name}.conv1d": inner}, build.own(sizes)
        self.keeps, self._inner = sizes.keeps, sizes.inner
        inner = sizes.inner
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
        self.own = [
            *self._conv.parameters(conv, channels),
            build.parameter(f"{name}.A_log", self._A_log, "log_decay", channels),
            build.parameter(f"{name}.dt_proj.bias", self._dt_bias, "time_bias", channels),
            build.parameter(f"{name}.D", self._D, "skip", channels),
        ]

    def seal(self) -> None:
        super().seal()
        self._A = self._A_log.exp().neg().mT.contiguous()
        del self._A_log

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Return ``[T, V]``."""
        x = projected[: inputs.num_tokens, : self._inner]
        windows, states = pools[0], pools[1][:, 0]
        x = inputs.by_part(lambda part, tokens: self._conv(x[tokens], part, windows))
        selected = self._selection(pad_rows(x, inputs.num_rows)).split(self._widths, dim=-1)
        dt, B, C = (norm(part) for norm, part in zip(self._norms, selected, strict=True))
        gates = B, C, self._steps(dt)
        return inputs.by_part(
            lambda part, tokens: self._scan(
                x[tokens], [gate[tokens] for gate in gates], part, states
            )
        )

    def _scan(
        self, x: torch.Tensor, gates: Sequence[torch.Tensor], part: StepPart, *states: torch.Tensor
    ) -> torch.Tensor:
        B, C, dt = gates
        if isinstance(part, PrefillPart):
            step = self._mamba1.time_steps(dt, self._dt_bias)
            return self._mamba1.chunk_mamba1(
                x, B, C, step, self._A, self._D, states=states[0], **part.scan_inputs
            )
        own = self._A, self._dt_bias, self._D
        return self._mamba1.decode_mamba1(x, B, C, dt, *own, states=states[0], **part.scan_inputs)

    def _gated(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        return self._gate(mixed, projected[:, self._inner :])


class Jamba(Decoder):
    """Decoder without rotation in attention: the state space layers provide positions."""

    model_types = ("jamba",)
    own_keys = "mamba_proj_bias", "mamba_conv_bias", "mamba_dt_rank"
    rope_defaults = None
    step_norms = "input_layernorm", "pre_ff_layernorm"
    norm_name = "model.final_layernorm"

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        own, hidden = self.config.own, self.config.hidden_size
        if isinstance(sizes, AttentionSizes):
            return self.attention(f"{name}.self_attn", sizes, bias=False)
        assert isinstance(sizes, MambaSizes)
        return Mamba1(
            f"{name}.mamba",
            hidden,
            sizes,
            own["mamba_dt_rank"],
            self.build,
            eps=self.config.norm_eps,
            bias=own["mamba_proj_bias"],
            conv_bias=own["mamba_conv_bias"],
        )

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        hidden, name = self.config.hidden_size, f"{name}.feed_forward"
        if isinstance(sizes, MLPSizes):
            return MLP(name, hidden, sizes.intermediate, self.build)
        router = Gating(f"{name}.router", hidden, sizes, self.build, renormalises=False)
        names = expert_names(f"{name}.experts.{{}}", "gate_proj", "up_proj", "down_proj")
        experts = Experts(f"{name}.experts", hidden, sizes, names, self.build)
        return RoutedExperts(router, experts, self.build)
