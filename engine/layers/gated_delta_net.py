"""Gated DeltaNet after a short causal convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from engine.layers.inputs import LayerInputs, Pools, PrefillPart, StepPart, pad_rows
from engine.layers.linear import Linear, Part, shared
from engine.layers.parameters import Build, Composite, Parameter
from engine.layers.shortconv import CausalConv
from hybridcache.geometry.mixers import DeltaSizes


class GatedDeltaNet(Composite):
    """Layer in which all inputs are one product ``[query | key | value | z | b | a]``.

    With 8-bit weights, the gates b and a are a separate product, because their few rows determine
    the whole state.
    """

    def __init__(
        self,
        name: str,
        hidden_size: int,
        sizes: DeltaSizes,
        inputs: Sequence[Part],
        build: Build,
        *,
        eps: float,
        convs: Mapping[str, int] | None = None,
        output: str = "out_proj",
        norm: str = "norm",
        max_beta: float = 1.0,
    ) -> None:
        """Make the layer.

        ``inputs`` are the matrices of the input product, in the order of its layout. ``convs`` maps
        the names of the convolutions to their numbers of channels; None means one, ``conv1d``.
        ``output`` and ``norm`` name the last product and the norm before it, with epsilon ``eps``.
        ``max_beta`` is the largest step of the delta rule.
        """
        rank = build.rank
        keys, values = (
            (sizes.num_key_heads, sizes.key_dim),
            (sizes.num_value_heads, sizes.value_dim),
        )
        each = sizes.num_value_heads, 1
        inputs = shared(inputs, [keys, keys, values, values, each, each], rank)
        self._projection = Linear(hidden_size, inputs, build)
        outputs = [Part(f"{name}.{output}", hidden_size)]
        self._output = Linear(sizes.value_width, outputs, build, shares_inputs=True)
        self.layers = self._projection, self._output
        convs = convs or {"conv1d": sizes.conv_channels}
        channels = list(convs.values())
        self._convs = dict(zip(convs, rank.cuts(channels, [keys, keys, values]), strict=True))
        self._heads_cut = rank.cut(each)
        self.sizes = sizes = sizes.share(rank.count)
        self._channels = [
            size if cut is None else len(cut)
            for size, cut in zip(channels, self._convs.values(), strict=True)
        ]
        self.name, self.keeps, self.eps = name, sizes.keeps, eps
        heads = sizes.num_value_heads
        self._widths = [sizes.conv_channels, sizes.value_width, heads, heads]
        self.projected_size = sum(self._widths)
        self.mixed_shape = heads, sizes.value_dim
        weights = build.weights
        self._conv = CausalConv(sizes.conv_channels, sizes.conv_width, build)
        self._A_log = weights.empty(heads, dtype=torch.float32)
        self._dt_bias = weights.empty(heads, dtype=torch.float32)
        self._norm_name, self._max_beta = norm, max_beta
        self._norm_weight = weights.empty(sizes.value_dim)
        self._gdn, self._norm = build.kernels["gdn"], build.kernels["norm"]

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        yield from self._projection.parameters()
        weights = self._conv.weight.unsqueeze(1).split(self._channels)
        for (conv, cut), weight in zip(self._convs.items(), weights, strict=True):
            yield f"{self.name}.{conv}.weight", Parameter(weight, cut=cut)
        heads = self._heads_cut
        yield f"{self.name}.A_log", Parameter(self._A_log, "log_decay", cut=heads)
        yield f"{self.name}.dt_bias", Parameter(self._dt_bias, "time_bias", cut=heads)
        yield f"{self.name}.{self._norm_name}.weight", Parameter(self._norm_weight, "norm")
        yield from self._output.parameters()

    def seal(self) -> None:
        super().seal()
        self._norm_weight = self._norm_weight.float()

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._projection(hidden)

    def mix(self, projected: torch.Tensor, inputs: LayerInputs, pools: Pools) -> torch.Tensor:
        """Convolve and scan, starting from each sequence's state and updating it in its slot.
        Returns ``[T, HV, V]``."""
        qkv, _, b, a = projected[: inputs.num_tokens].split(self._widths, dim=-1)
        windows, states = pools

        def mix(part: StepPart, tokens: slice) -> torch.Tensor:
            heads = self._heads(self._conv(qkv[tokens], part, windows))
            return self._scan(heads, a[tokens], b[tokens], part, states)

        return inputs.by_part(mix)

    def _scan(
        self,
        heads: Sequence[torch.Tensor],
        a: torch.Tensor,
        b: torch.Tensor,
        part: StepPart,
        states: torch.Tensor,
    ) -> torch.Tensor:
        gates, max_beta = (a, b, self._A_log, self._dt_bias), self._max_beta
        out: torch.Tensor
        if isinstance(part, PrefillPart):
            gate, beta = self._gdn.gates(*gates, max_beta=max_beta)
            out = self._gdn.chunk_gdn(*heads, gate, beta, states=states, **part.scan_inputs)
        else:
            out = self._gdn.decode_gdn(
                *heads, *gates, states=states, max_beta=max_beta, **part.scan_inputs
            )
        return out

    def _heads(self, qkv: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split into query and key ``[T, H, K]``, and value ``[T, HV, V]``."""
        sizes = self.sizes
        widths = [sizes.key_width, sizes.key_width, sizes.value_width]
        keys = sizes.num_key_heads, sizes.key_dim
        shapes = keys, keys, self.mixed_shape
        parts = zip(qkv.split(widths, dim=-1), shapes, strict=True)
        return [x.view(len(qkv), *shape) for x, shape in parts]

    def finish(self, mixed: torch.Tensor, projected: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, ``[num_rows, H]``."""
        first, width = self._widths[:2]
        z = projected[: len(mixed), first : first + width]
        gated = self._norm.gated_rms_norm(mixed, self._norm_weight, z.view(mixed.shape), self.eps)
        return self._output(pad_rows(gated.flatten(1), len(projected)))
