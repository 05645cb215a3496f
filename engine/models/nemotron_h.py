"""Nemotron-H: every layer is one block, either a Mamba-2 mixer, attention, an MLP or experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from engine.layers.blocks import MLP, FeedForward, FeedForwardStep, Mixer, MixerStep
from engine.layers.experts import RoutedExperts
from engine.models.decoder import Decoder, Step
from engine.weights.model_config import ACTIVATIONS, Served
from engine.weights.products import Experts, Linear, Part, expert_names
from hybridcache.geometry.mixers import AttentionSizes, MambaSizes
from hybridcache.geometry.sizes import ExpertsSizes, LayerSizes, MixerSizes, MLPSizes


class NemotronH(Decoder):
    """Decoder without rotation in attention: the state space layers provide positions."""

    model_types = ("nemotron_h",)
    own_keys = (
        *("use_bias", "use_conv_bias", "mlp_bias", "time_step_limit"),
        *("norm_topk_prob", "routed_scaling_factor"),
    )
    served: ClassVar[Served] = {
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ACTIVATIONS,
        "sliding_window": (None,),
        "n_group": (1,),
        "topk_group": (1,),
    }
    eps_key, rope_defaults = "layer_norm_epsilon", None
    embedding_name = "backbone.embeddings"
    layers_name = "backbone.layers"
    norm_name = "backbone.norm_f"

    def steps(self, name: str, sizes: LayerSizes) -> Sequence[Step]:
        before, block = self.norm_of(f"{name}.norm"), f"{name}.mixer"
        if sizes.mixers:
            return [MixerStep(self.mixer(block, sizes.mixers[0]), before=before)]
        assert sizes.mlp is not None
        return [FeedForwardStep(self.mlp(block, sizes.mlp), before=before)]

    def mixer(self, name: str, sizes: MixerSizes) -> Mixer:
        own = self.config.own
        if isinstance(sizes, AttentionSizes):
            return self.attention(name, sizes, bias=False)
        assert isinstance(sizes, MambaSizes)
        return self.mamba2(name, sizes, own["use_bias"], conv_bias=own["use_conv_bias"])

    def mlp(self, name: str, sizes: MLPSizes | ExpertsSizes) -> FeedForward:
        if isinstance(sizes, MLPSizes):
            return self.squared_relu(name, sizes.intermediate)
        hidden, build = self.config.hidden_size, self.build
        names = expert_names(f"{name}.experts.{{}}", "up_proj", "down_proj")
        narrow = widen = None
        if sizes.width:
            bias = self.config.own["mlp_bias"]
            inner = Part(f"{name}.fc1_latent_proj", sizes.width)
            outer = Part(f"{name}.fc2_latent_proj", hidden)
            narrow = Linear(hidden, [inner], build, bias=bias)
            widen = Linear(sizes.width, [outer], build, bias=bias)
        return RoutedExperts(
            self.sigmoid_router(name, sizes, "gate.e_score_correction_bias"),
            Experts(f"{name}.experts", sizes.width or hidden, sizes, names, build),
            build,
            shared=self.squared_relu(f"{name}.shared_experts", sizes.shared_intermediate),
            narrow=narrow,
            widen=widen,
        )

    def squared_relu(self, name: str, intermediate_size: int) -> MLP:
        """Return an MLP without a gate."""
        config = self.config
        return MLP(
            name,
            config.hidden_size,
            intermediate_size,
            self.build,
            inputs=["up_proj"],
            bias=config.own["mlp_bias"],
            gated=False,
        )
