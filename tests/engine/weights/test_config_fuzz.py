"""Random changes of one key in a config.json.

The engine must compute the same as transformers, or refuse in one sentence that names the key, or
the tensors of another shape.

Mutations are independent of the keys that the engine reads. Keys come from:

- transformers' config class of the family, and the aliases in its ``attribute_map``;
- the rotary keys;
- all attributes that transformers reads while it loads and runs the model;
- another family.

Values come from operators for each type.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import EngineConfig
from engine.engine import load_runner
from engine.weights.model_config import ModelError
from tests.engine.small_models import FAMILIES, Driver, make_oracle

IS_FULL = os.environ.get("HYBRIDCACHE_TESTS") == "all"
NUM_MUTATIONS = 2000 if IS_FULL else 2 * len(FAMILIES)
NUM_TOKENS = 80
ROPE_TYPES = ("default", "linear", "yarn", "llama3", "dynamic", "longrope", "proportional", "mrope")
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
ROPE_PARTS: dict[str, list[Any]] = {
    "rope_theta": [10_000.0, 500.0, 1e6, 10, None],
    "factor": [1.0, 2.0, 4, 8.0, 0.5, None],
    "partial_rotary_factor": [0.25, 0.5, 1.0, 0.3, None],
    "original_max_position_embeddings": [16, 32, 64, 4096, None],
    "attention_factor": [1.0, 1.3, None],
    "beta_fast": [32, 8.0, None],
    "beta_slow": [1, 2.0, None],
    "low_freq_factor": [1.0, 2],
    "high_freq_factor": [4.0, 3],
    "mscale": [1.0, 0.7, 0],
    "mscale_all_dim": [1.0, 0.5],
    "truncate": [True, False],
    "short_factor": [[1.0] * 16],
    "long_factor": [[2.0] * 16],
    "mrope_section": [[1, 1, 2]],
    "full_attention": [{"rope_type": "default", "rope_theta": 10_000.0}],
    "finetuned": [True],
}
NEEDED = {
    "linear": ["factor"],
    "dynamic": ["factor"],
    "yarn": ["factor", "original_max_position_embeddings"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    "longrope": ["short_factor", "long_factor", "original_max_position_embeddings"],
}


@dataclass
class Case:
    """Files of one family as transformers writes them, and the keys of transformers."""

    directory: Path
    model_class: Any
    config: dict[str, Any]
    keys: list[str]
    """Keys of the text part."""
    aliases: dict[str, str]
    defaults: dict[str, Any]
    logits: torch.Tensor
    """Logits of the unchanged files."""

    @property
    def text(self) -> str | None:
        """Key of the text part, or None if the config has no parts."""
        return "text_config" if "text_config" in self.config else None


def keys_read_by_transformers(directory: Path, model_class: Any) -> set[str]:
    """Return the attributes that transformers reads in a config to load and run the model."""
    from transformers.configuration_utils import PreTrainedConfig

    seen: set[str] = set()
    original = PreTrainedConfig.__getattribute__

    def look_up(self: Any, name: str) -> Any:
        if "configuration_" not in Path(sys._getframe(1).f_code.co_filename).name:
            seen.add(name)
        return original(self, name)

    PreTrainedConfig.__getattribute__ = look_up
    try:
        model = model_class.from_pretrained(directory, dtype=torch.float32)
        with torch.inference_mode():
            model(torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    finally:
        PreTrainedConfig.__getattribute__ = original
    kind = type(model.config)
    return {name for name in seen if not name.startswith("_") and not hasattr(kind, name)}


def make_case(family: str, directory: Path, tokens: list[int]) -> Case:
    import transformers

    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    model = make_oracle(family)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    text_class = type(model.config.get_text_config())
    others = sorted({families.classes[0] for families in FAMILIES.values()})
    other = getattr(transformers, random.Random(family).choice(others))
    fields = {field.name: field.default for field in dataclasses.fields(text_class)}
    borrowed = {field.name: field.default for field in dataclasses.fields(other)}
    keys = {*fields, *text_class.attribute_map, *text_class.attribute_map.values()}
    keys |= (
        keys_read_by_transformers(directory, type(model))
        | set(ROPE_KEYS)
        | set(config.get("text_config", config))
    )
    keys |= set(random.Random(family).sample(sorted(borrowed), 8))
    defaults = {n: v for n, v in (borrowed | fields).items() if v is not dataclasses.MISSING}
    aliases = text_class.attribute_map
    return Case(directory, type(model), config, sorted(keys), aliases, defaults, logits)


def change(value: Any, rng: random.Random) -> Any:
    """Return another value, mostly of the same type."""
    if rng.random() < 0.12:
        return rng.choice([None, True, 0, 1, -1, 2.5, "x", [], {}, [value], str(value)])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, 2 * value, value // 2, 0, 1, 3, float(value)])
    if isinstance(value, float):
        return rng.choice([2 * value, value / 2, 0.9 * value, value + 0.1, 0.0, -value, 1.0, 2])
    if isinstance(value, str):
        return rng.choice([value.upper(), "gelu", "relu", "auto", "rope", ""])
    if isinstance(value, list) and value:
        place, part = rng.randrange(len(value)), rng.choice(value)
        return rng.choice(
            [
                value[::-1],
                value[:-1],
                [*value, part],
                [],
                [*value[:place], part, *value[place + 1 :]],
                [*value[:place], change(value[place], rng), *value[place + 1 :]],
            ]
        )
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        rest = {name: part for name, part in value.items() if name != key}
        return rest if rng.random() < 0.3 else value | {key: change(value[key], rng)}
    return rng.choice([0, 1, 2, 8, True, False, 0.5, "auto", []])


def rope_section(rng: random.Random) -> dict[str, Any]:
    """Return random parameters of a rotary embedding: most of the required ones, and others."""
    kind = rng.choice(ROPE_TYPES)
    parts = [name for name in NEEDED.get(kind, ()) if rng.random() < 0.9]
    parts += rng.sample(sorted(ROPE_PARTS), rng.randrange(4))
    name = rng.choice(["rope_type", "rope_type", "rope_type", "type"])
    return {name: kind} | {part: rng.choice(ROPE_PARTS[part]) for part in parts}


def mutate(case: Case, rng: random.Random) -> tuple[set[str], dict[str, Any]]:
    """Return names, one of which a refusal must contain, and the changed config."""
    config = copy.deepcopy(case.config)
    text = config[case.text] if case.text and rng.random() < 0.8 else config
    operator = rng.choice(["drop", "change", "change", "change", "change", "alias", "add", "rope"])
    if operator == "rope":
        key = rng.choice(["rope_parameters", "rope_scaling", "rope_scaling", *ROPE_KEYS[2:]])
        value = rng.choice(ROPE_PARTS[key]) if key in ROPE_PARTS else rope_section(rng)
        text[key] = value
        if rng.random() < 0.3:
            text["original_max_position_embeddings"] = rng.choice([16, 48])
        parts = set(value) if isinstance(value, dict) else set()
        kind = str(value.get("rope_type", value.get("type"))) if isinstance(value, dict) else key
        parts |= {key, kind, "original_max_position_embeddings", *NEEDED.get(kind, ())}
        return parts, config
    aliased = [name for pair in case.aliases.items() for name in pair]
    if operator == "alias" and aliased:
        key = rng.choice(aliased)
        other = case.aliases.get(key) or next(n for n, to in case.aliases.items() if to == key)
        value = text.get(other, text.get(key, case.defaults.get(other)))
        if rng.random() < 0.3:
            text.pop(other, None)
        text[key] = change(value, rng) if rng.random() < 0.7 else value
        return {key, other}, config
    if operator == "add":
        absent = [key for key in case.keys if key not in text]
        key = rng.choice(absent)
        text[key] = change(case.defaults.get(key), rng)
        return {key, case.aliases.get(key, key)}, config
    key = rng.choice(sorted(text))
    value = text.pop(key)
    names = {key, case.aliases.get(key, key), *(n for n, to in case.aliases.items() if to == key)}
    if operator == "drop":
        return names, config
    text[key] = change(value, rng)
    if isinstance(value, dict):
        names |= set(value)
    return names, config


@torch.inference_mode()
def reference(case: Case, directory: Path, tokens: list[int]) -> torch.Tensor | None:
    """Return transformers' logits, or None if it refuses, fails, or initialises missing weights."""
    try:
        model, info = case.model_class.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            return None
        follow_published_time_limits(model)
        return model(torch.tensor([tokens]), use_cache=False, return_dict=True).logits[0]
    except Exception:
        return None


def follow_published_time_limits(model: Any) -> None:
    """Apply ``time_step_limit`` as in the published code of Nemotron-H.

    transformers uses ``time_step_min``; it is not the reference here (docs/engine/models.md).
    """
    if model.config.get_text_config().model_type == "nemotron_h":
        for module in model.modules():
            if hasattr(module, "time_step_limit"):
                module.time_step_limit = tuple(model.config.time_step_limit)


def compare(case: Case, names: set[str], directory: Path, tokens: list[int]) -> str:
    """Return the outcome of the mutation in ``directory``; faults start with "wrong".

    transformers refuses some values of keys that have no effect (``pad_token_id``, ``dtype``), and
    integers in place of floats. The engine may serve these, with the logits of the unchanged config
    or with those that transformers computes from the floats.
    """
    expected = reference(case, directory, tokens)
    try:
        ours = engine_logits(directory, tokens)
    except ModelError as error:
        message = str(error)
        is_sentence = message.endswith(".") and "\n" not in message and len(message) < 2000
        if is_sentence and "tensors do not match its config.json" in message:
            return "refused: tensors do not match"
        if not is_sentence or not any(name in message for name in names):
            return f"wrong: does not name {names}: {message}"
        return "refused" if expected is None else "refused, though transformers serves it"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    if expected is not None:
        return judge(ours, expected, "equal")
    verdict = judge(ours, case.logits, "equal to the unchanged, transformers refuses it")
    if not verdict.startswith("wrong"):
        return verdict
    path = directory / "config.json"
    path.write_text(json.dumps(as_floats(json.loads(path.read_text()), case.config)))
    expected = reference(case, directory, tokens)
    if expected is None:
        return "wrong: served, though transformers refuses it"
    return judge(ours, expected, "equal to a float, transformers refuses the integer")


def engine_logits(directory: Path, tokens: list[int]) -> torch.Tensor:
    options = {"device": "cpu", "dtype": "float32", "cache_gib": 0.02}
    options |= {"max_running": 2, "max_model_len": 2 * NUM_TOKENS}
    runner = load_runner(EngineConfig(model=str(directory), **options))
    return Driver(runner).cold(tokens, all_logits=True)


def judge(ours: torch.Tensor, theirs: torch.Tensor, verdict: str) -> str:
    """Return ``verdict`` if the logits are close, or a text that starts with "wrong".

    The tolerance is 1e-4, relative to the largest logit if that is above 1. Logits that are not
    finite in both count as equal: no request gets a token from them.
    """
    if not theirs.isfinite().all():
        return (
            verdict if not ours.isfinite().all() else "wrong: transformers' logits are not finite"
        )
    scale = max(1.0, float(theirs.abs().max()))
    difference = float((ours - theirs).abs().max()) / scale
    return (
        verdict if difference < 1e-4 else f"wrong: logits differ by {difference:.2g} of {scale:.3g}"
    )


def as_floats(value: Any, like: Any) -> Any:
    """Return ``value`` with floats in place of integers if ``like``, or an entry of the list, is a
    float."""
    if isinstance(value, dict):
        like = like if isinstance(like, dict) else {}
        return {name: as_floats(part, like.get(name)) for name, part in value.items()}
    if isinstance(value, list):
        examples = [*value, *like] if isinstance(like, list) else value
        typical = next((part for part in examples if isinstance(part, float)), None)
        return [as_floats(part, typical) for part in value]
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_integer and isinstance(like, float) else value


def test_changed_key_agrees_with_transformers_or_is_refused(family, tmp_path) -> None:
    files, mutated = tmp_path / "files", tmp_path / "mutated"
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 199, (NUM_TOKENS,), generator=generator).tolist()
    case = make_case(family, files, tokens)
    assert judge(engine_logits(files, tokens), case.logits, "equal") == "equal"
    mutated.mkdir()
    os.link(files / "model.safetensors", mutated / "model.safetensors")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(-(-NUM_MUTATIONS // len(FAMILIES))):
        names, config = mutate(case, random.Random(f"{family} {number}"))
        (mutated / "config.json").write_text(json.dumps(config))
        verdict = compare(case, names, mutated, tokens)
        counts[verdict] += 1
        if verdict.startswith("wrong"):
            changes = {
                key: config.get(key, "(dropped)")
                for key in {*config, *case.config}
                if json.dumps(config.get(key, "-")) != json.dumps(case.config.get(key, "-"))
            }
            wrong.append(f"{family} {number}: {json.dumps(changes)[:600]}: {verdict}")
    assert not wrong, "\n".join(wrong)
    if IS_FULL:  # Most mutations must not be refusals.
        assert counts["equal"] > counts.total() / 5, counts
