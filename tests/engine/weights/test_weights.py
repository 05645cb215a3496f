"""Checkpoints: published layouts, faults named in one sentence, reproducible dummy weights."""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as serialized
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config

from engine.front.command.cli import main as engine_main
from engine.models import read_model
from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.weights.checkpoint import Dummy, WeightsError
from engine.weights.layer_names import model_name
from engine.weights.model_config import ModelError, read_config
from engine.weights.parameters import Build, WeightSpec
from engine.weights.tensor_files import find_files, open_file
from hybridcache.geometry.gguf import GgufFile
from hybridcache.lab.cli import main as lab_main
from tests.engine.device_models import TINY
from tests.engine.small_models import Driver, load, random_tokens
from tests.engine.weights import checkpoints
from tests.refused import refused


def check_same_logits(path, model, drivers):
    driver = drivers(model)
    tokens = random_tokens(70, seed=1)
    expected = driver.cold(tokens)
    other = type(driver)(load(path))
    assert torch.equal(other.cold(tokens), expected)


def test_sharded_checkpoint(checkpoint, drivers):
    path, tensors = checkpoint("qwen3_next")
    names = sorted(tensors)
    shards = {f"model-{i}.safetensors": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, path / file)
    (path / "model.safetensors").unlink()
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    check_same_logits(path, "qwen3_next", drivers)
    (path / "model-1.safetensors").unlink()
    refused(r"missing: model-1\.safetensors", load, path, kind=WeightsError)


@pytest.mark.parametrize("case", ["both", "stale index", "others", "others only", "shards"])
def test_files_are_those_that_transformers_reads(case, tmp_path):
    """The folders that people have: two sets of weights, an index that was left, files of trainers
    and of other libraries."""
    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    old, new = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    old.save_pretrained(tmp_path, max_shard_size="2KB")
    if case == "both":
        save_file(new.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    elif case == "stale index":
        new.save_pretrained(tmp_path)
    elif case.startswith("others"):
        for path in tmp_path.glob("*.safetensors*"):
            path.unlink()
        for name in ("consolidated.safetensors", "optimizer.safetensors"):
            save_file({"state.0": torch.zeros(3)}, tmp_path / name, {"format": "pt"})
        if case == "others":
            new.save_pretrained(tmp_path)
    else:
        save_file({"a": torch.zeros(3)}, tmp_path / "model-00000-of-1.safetensors")
    if case == "others only":
        refused(r"model\.safetensors", AutoModelForCausalLM.from_pretrained, tmp_path, kind=OSError)
        with pytest.raises(WeightsError, match=r"found consolidated\.safetensors, optimizer"):
            find_files(tmp_path)
        return
    found = {}
    for file in find_files(tmp_path):
        found |= open_file(file)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
WHOLE = serialized({"a": torch.arange(5.0)})
VAST = b'{"a": {"dtype": "I8", "shape": [1099511627776], "data_offsets": [0, 1099511627776]}}'
VAST = len(VAST).to_bytes(8, "little") + VAST
FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "pointer": (POINTER, r"is a pointer of Git LFS, .*git lfs pull"),
    "short": (WHOLE[:-1], rf"is truncated: it has {len(WHOLE) - 1} bytes instead of {len(WHOLE)}"),
    "long": (WHOLE + b"x", rf"is damaged: it has {len(WHOLE) + 1} bytes instead of {len(WHOLE)}"),
    "header": (WHOLE[:20], r"is truncated, or not safetensors: its header would have"),
    "damaged": (WHOLE[:8] + b"x" + WHOLE[9:], "its header is not that of safetensors"),
    "pickle": (b"PK\x03\x04" + bytes(90), "is a file of PyTorch or a ZIP archive, not safetensors"),
    "gguf": (b"GGUF" + bytes(90), "is a GGUF file, not safetensors"),
    "page": (
        b"<!DOCTYPE html><html>404</html>",
        "is a web page or XML, perhaps the error of a dow",
    ),
    "vast": (VAST, r"^the weights need 1,024\.0 GiB .*Cannot allocate.*: use a smaller model"),
    "limited": (VAST, r"^the weights need 1,024\.0 GiB .*Cannot allocate.*: use a smaller model"),
}
"""Contents of a file, and the true reason of its refusal."""


@pytest.mark.parametrize("fault", FAULTS)
def test_refusals_of_files_have_the_true_reason(fault, tmp_path):
    content, reason = FAULTS[fault]
    (tmp_path / "model.safetensors").write_bytes(content)
    if content == VAST:  # A sparse file.
        os.truncate(tmp_path / "model.safetensors", len(content) + (1 << 40))
    if fault == "vast" and Path("/proc/sys/vm/overcommit_memory").read_text() == "1\n":
        pytest.skip("This system maps files that are larger than its memory.")
    soft, most = limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39 if fault == "limited" else soft, most))
    try:
        with pytest.raises(WeightsError, match=reason) as error:
            [path] = find_files(tmp_path)
            open_file(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "\n" not in str(error.value) and "model.safetensors" in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "a.gguf"])
def test_files_that_are_no_files_are_refused_as_what_they_are(name, tmp_path):
    def refusal() -> str:
        with pytest.raises(ModelError) as error:
            if name.endswith(".gguf"):
                GgufFile(tmp_path / name)
            for path in find_files(tmp_path):
                open_file(path)
        return str(error.value)

    (tmp_path / name).symlink_to(tmp_path / "blob")
    assert f"{name} is a link to {tmp_path / 'blob'}, which does not exist" in refusal()
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert f"{name} is a folder" in refusal()
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)  # To open it would wait.
    assert f"{name} is not a regular file" in refusal()
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    assert "cannot be read: Too many levels" in refusal()


def test_an_indexed_file_that_is_a_dangling_link_is_named(tmp_path):
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").symlink_to("../blobs/4f1c")
    with pytest.raises(WeightsError, match=r"model-1\.safetensors is a link to \.\./blobs/4f1c"):
        [path] = find_files(tmp_path)
        open_file(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.gguf"])
def test_files_of_other_users_are_refused_with_their_rights(name):
    """Root can read everything, so it acts as another user here."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(b"x")
        read = {
            "config.json": lambda: read_config(path.parent),
            "model.gguf": lambda: GgufFile(path),
        }
        path.parent.chmod(0o755)
        closed = {path: "-rw-------", path.parent: "drwx------"}
        for place, rights in closed.items():
            before = place.stat().st_mode
            place.chmod(0o600 if place == path else 0o700)
            user = os.geteuid()
            if user:
                place.chmod(0)
                rights = rights[0] + 9 * "-"
            else:
                os.seteuid(65534)
            try:
                with pytest.raises(ModelError) as error:
                    read.get(name, lambda: open_file(path))()
            finally:
                os.seteuid(user)
                place.chmod(before)
            assert f"{place} has the rights {rights} and belongs to user {user}" in str(error.value)


def test_commands_name_the_first_folder_that_is_closed(capsys):
    """Whatever file they look for in it, or would write there."""
    with tempfile.TemporaryDirectory() as top:  # For its user alone.
        user = os.geteuid()
        Path(top).chmod(0 if user else 0o700)
        try:
            os.seteuid(user or 65534)
            for path in (top, f"{top}/model"):
                assert engine_main(["generate", "x", "--model", path]) == 2
            assert engine_main(["convert", "builtin", f"{top}/out", "--to", "int8"]) == 2
            assert lab_main(["trace", "stats", f"{top}/t.jsonl"]) == 2
        finally:
            os.seteuid(user)
            Path(top).chmod(0o700)
    said = capsys.readouterr().err.splitlines()
    assert [f"{top} has the rights d" in line for line in said] == 4 * [True]


@pytest.mark.parametrize(
    ("name", "is_ignored"),
    [
        ("model.rotary_emb.inv_freq", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("model.language_model.layers.3.self_attn.rotary_emb.cos_cached", True),
        ("model.position_ids", True),
        ("model.rotary_embedding.inv_freq", False),
        ("model.layers.0.self_attn.odd.weight", False),
    ],
)
def test_buffers_in_files_are_ignored(name, is_ignored, checkpoint, drivers):
    """Old programs saved frequencies, which transformers ignores."""
    path, tensors = checkpoint("qwen3")
    save_file(tensors | {name: torch.ones(4)}, path / "model.safetensors")
    if is_ignored:
        check_same_logits(path, "qwen3", drivers)
        assert (
            "buffers in its files (rotary_emb, position_ids) are ig"
            in load(path).loaded.weights_note
        )
    else:
        refused("1 unexpected", load, path, kind=WeightsError)


def test_names_of_heads_have_no_prefix() -> None:
    names = "language_model.lm_head.weight", "lm_head.weight"
    assert [*map(model_name, names)] == 2 * ["lm_head.weight"]


@pytest.mark.parametrize("stacked", [True, False])
def test_separate_and_stacked_experts(stacked, checkpoint, drivers):
    path, tensors = checkpoint("qwen3_5_moe")
    change = checkpoints.stack_experts if stacked else checkpoints.split_experts
    changed = change(checkpoints.split_experts(tensors))
    assert any(name.endswith(".experts.gate_up_proj") for name in changed) == stacked
    save_file(changed, path / "model.safetensors")
    check_same_logits(path, "qwen3_5_moe", drivers)


TIED = [("qwen3", "model.embed_tokens.weight"), ("lfm2", "model.embed_tokens.weight")]


@pytest.mark.parametrize(("kind", "embedding"), TIED)
@pytest.mark.parametrize("files", ["separate head", "copy", "no head"])
def test_tied_head_with_and_without_its_tensor(kind, embedding, files, checkpoint):
    """As in transformers, a tied model uses a separate head if its files have one."""
    path, tensors = checkpoint(kind)
    tokens = random_tokens(70, seed=1)
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    shared = tensors[embedding]
    tensors["lm_head.weight"] = shared.flip(0) if files == "separate head" else shared.clone()
    if files == "no head":
        del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0]
    logits = Driver(load(path)).cold(tokens, all_logits=True)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


NAMES = ["model.embed_tokens.weight", "model.layers.3.self_attn.q_proj.weight", "model.norm.weight"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_nan_and_infinite_weights_are_refused(name, bad, dtype, checkpoint):
    """The check covers tensors with reordered rows and with another dtype."""
    path, tensors = checkpoint("qwen3_next")
    tensors[name].view(-1)[-1] = bad
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"{re.escape(name)} contains NaN or infinite numbers"):
        load(path, dtype=dtype)


def test_dummy_weights_depend_only_on_the_seed(checkpoint, drivers):
    path, _ = checkpoint("qwen3_next")
    (path / "model.safetensors").unlink()
    make = type(drivers("qwen3_next"))
    tokens = random_tokens(20, seed=2)
    first, repeated, other = (
        make(load(path, load_format="dummy", seed=seed)).cold(tokens) for seed in (3, 3, 4)
    )
    assert torch.equal(first, repeated)
    assert not torch.equal(first, other)
    assert first.isfinite().all()


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5"])
def test_gates_of_8_bit_models_keep_full_precision(model_type):
    family, config = read_model(TINY | {"model_type": model_type})
    kernels = Kernels(Device.resolve("cpu"))
    hidden = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    num_gates, projected = 2 * TINY["linear_num_value_heads"], []
    for quantization in (None, "int8"):
        place = WeightSpec(torch.device("cpu"), torch.float32, quantization)
        mixer = family(config, Build(kernels, place), Dummy(0).fill).mixers[0].block
        projected.append(mixer.project(hidden).tensor_split([-num_gates], dim=1))
    (mixed, gates), (rounded, rounded_gates) = projected
    torch.testing.assert_close(rounded_gates, gates, rtol=1e-5, atol=1e-6)
    assert (rounded - mixed).abs().max() > 1e-4 * mixed.abs().max()


def test_weights_that_do_not_fit_the_memory_are_refused_with_their_sizes():
    with pytest.raises(ModelError, match=r"none left for one of 65536 x 1099511627776\."):
        WeightSpec(torch.device("cpu"), torch.float32).empty(1 << 16, 1 << 40)
