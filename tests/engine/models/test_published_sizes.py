"""Bit-exact hits at the layer sizes of published models, with few layers and experts and random
weights. A library chooses its kernels by the sizes, so small models alone prove little."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
import transformers

from engine import EngineConfig
from engine.engine import load_runner
from engine.runner.backends import override_all
from engine.weights.products import Linear
from tests.engine import families
from tests.engine.device_models import QWEN3_NEXT_80B
from tests.engine.runner.test_exactness import assert_hits_are_exact, threads
from tests.engine.small_models import Driver, random_tokens

FAMILIES = families.find()
SIZES = {
    "kimi_linear": {  # Kimi-Linear-48B-A3B
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "linear_attn_config": {
            "num_heads": 32,
            "head_dim": 128,
            "short_conv_kernel_size": 4,
            "full_attn_layers": [2],
            "kda_layers": [1],
        },
        "num_hidden_layers": 2,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "qwen3_next": {
        name: QWEN3_NEXT_80B[name]
        for name in QWEN3_NEXT_80B
        if name.endswith(("_size", "heads", "_dim", "only_layers")) and name != "vocab_size"
    },
    "granite_moe_hybrid": {  # granite-4.0-h-tiny
        "hidden_size": 1536,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
    },
    "nemotron_h": {  # Nemotron-3-Nano-30B-A3B
        "hidden_size": 2688,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "intermediate_size": 1856,
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
    },
    "olmo_hybrid": {  # Olmo-Hybrid-7B
        "hidden_size": 3840,
        "intermediate_size": 11008,
        "num_attention_heads": 30,
        "num_key_value_heads": 30,
        "linear_num_key_heads": 30,
        "linear_num_value_heads": 30,
        "linear_key_head_dim": 96,
        "linear_value_head_dim": 192,
    },
    "falcon_h1": {  # Falcon-H1-1.5B
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_d_ssm": 3072,
        "mamba_n_heads": 48,
        "mamba_d_head": 64,
        "mamba_d_state": 256,
        "mamba_n_groups": 1,
    },
    "jamba": {  # Jamba-Reasoning-3B
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_attention_heads": 20,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "mamba_d_state": 16,
        "mamba_dt_rank": 160,
        "num_experts": 1,
    },
    "lfm2": {  # LFM2-1.2B
        "hidden_size": 2048,
        "intermediate_size": 12288,
        "block_multiple_of": 256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3_5": {  # Qwen3.5-2B
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
    },
    "qwen3": {  # Qwen3-1.7B
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 1,
    },
    "lfm2_moe": {  # LFM2-8B-A1B, with the experts of the small model
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
ROWS = (*range(1, 18), 31, 32, 33, 63, 64, 65, 97, 127, 128, 129)


FORMATS = (("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4"))


def cases():
    """Yield each family in each format, with both backends and both numbers of threads.

    A family and format has two of the four pairs of backend and threads, the next one the others:
    only combinations of all four values are left out.
    """
    for place, name in enumerate(SIZES):
        for number, (dtype, quantization) in enumerate(FORMATS):
            odd = (place + number) % 2
            for backend, num_threads in (("native", 2 - odd), ("reference", 1 + odd)):
                if (quantization, backend) == ("int4", "reference"):
                    continue  # There is none.
                word = f"{num_threads}-{backend}-{dtype}-{quantization}-{name}"
                yield pytest.param(name, dtype, quantization, backend, num_threads, id=word)


@pytest.mark.full("2-native-bfloat16-int8-granite_moe_hybrid")
@pytest.mark.parametrize(("name", "dtype", "quantization", "backend", "num_threads"), cases())
@torch.inference_mode()
def test_hits_are_exact(name, dtype, quantization, backend, num_threads, monkeypatch, tmp_path):
    """Native kernels are those of a machine with a compiler; without one, both are references."""
    made = []
    make = Linear.__init__

    def noted(self, in_features, parts, build, **options):
        make(self, in_features, parts, build, **options)
        made.append((self, in_features, build.weights.dtype))

    monkeypatch.setattr(Linear, "__init__", noted)
    config_class = getattr(transformers, FAMILIES[name].classes[0])
    config_class(**(FAMILIES[name].config | SIZES[name])).save_pretrained(tmp_path)
    gc.collect()
    with threads(num_threads):
        runner = load_runner(
            EngineConfig(
                model=str(tmp_path),
                load_format="dummy",
                device="cpu",
                dtype=dtype,
                quantization=quantization,
                kernels=override_all("reference") if backend == "reference" else "",
                cache_gib=1.0,
            )
        )
        assert runner.exactness.digest and runner.exactness.different == ()
        seen, whole_products = set(), [one for one in made if hasattr(one[0], "_product")]
        for linear, in_features, own_dtype in whole_products:
            x = torch.randn(130, in_features).to(own_dtype)
            whole = linear(x)
            size = in_features, whole.shape, own_dtype
            for count in ROWS if size not in seen else ():  # Layers repeat sizes.
                assert torch.equal(linear(x[:count]), whole[:count]), count
                assert torch.equal(linear(x[-count:]), whole[-count:]), count
            seen.add(size)
        prompts = [random_tokens(length, seed=length) for length in (150, 97, 33)]
        assert_hits_are_exact(Driver(runner), prompts, np.random.default_rng(0), 64)
