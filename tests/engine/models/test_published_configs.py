"""Published config.json files of models that are too large to load here, and refused variants."""

from __future__ import annotations

import dataclasses

import pytest
from huggingface_hub.dataclasses import type_validator
from transformers import CONFIG_MAPPING

from engine.models import families
from hybridcache.geometry.config_format import fits
from hybridcache.geometry.families import COMPOSITES, modules, read
from hybridcache.geometry.sizes import MOST_LAYERS, ExpertsSizes, MLPSizes, SizesError


@pytest.mark.parametrize("model_type", sorted(families()))
def test_fields_have_the_names_types_and_defaults_of_transformers(model_type) -> None:
    text_type = model_type if model_type not in COMPOSITES else f"{model_type}_text"
    text_class = CONFIG_MAPPING[text_type]
    theirs = {field.name: field for field in dataclasses.fields(text_class)}
    ours = modules()[model_type].FORMATS[model_type]
    assert set(ours.fields) <= set(theirs)
    for name, field in ours.fields.items():
        default = theirs[name].default
        assert field.default == (list(default) if isinstance(default, tuple) else default), name
        for value in (7, 0.5, True, "auto", None, ["x"], [7], [0.5], {}):
            if fits(value, field.kind):
                takes_floats = "float" in str(field.kind)  # transformers refuses integers here.
                whole = {str(7): 7.0, str([7]): [7.0]} if takes_floats else {}
                type_validator(name, whole.get(str(value), value), theirs[name].type)
    pairs = {frozenset(pair) for pair in text_class.attribute_map.items()}
    our_aliases = {frozenset(pair) for pair in ours.aliases.items()}
    assert {pair for pair in pairs if pair & set(ours.fields)} <= our_aliases
    types = {"layer_types": ["conv"] * 32} if model_type == "lfm2_moe" else {}
    assert len(read({"model_type": model_type, **types})[0].layers) > 3


def test_layers_up_to_the_limit_have_experts_at_their_step() -> None:
    config = {"model_type": "qwen3_next", "decoder_sparse_step": 2}
    layers = read(config | {"num_hidden_layers": MOST_LAYERS})[0].layers
    assert len(layers) == MOST_LAYERS
    assert [type(layer.mlp) for layer in layers[:4]] == [MLPSizes, ExpertsSizes] * 2
    with pytest.raises(SizesError, match=f"at most {MOST_LAYERS}"):
        read(config | {"num_hidden_layers": MOST_LAYERS + 1})
