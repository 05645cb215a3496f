"""Refused input: each refusal is one line, names the parameter or its value, and changes nothing.

The parameters are read from the types, so a new parameter is tested without a new case. Bodies of
HTTP requests have the same test in ``tests/engine/front/server/test_bad_input.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import re
import runpy
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine import Engine, EngineConfig, SamplingParams
from engine.config import BUILTIN_DIR
from engine.front.command.cli import FOREIGN
from engine.front.command.cli import main as engine
from engine.front.server.settings import ServerConfig
from engine.weights.checkpoint import RawWeights
from hybridcache import CacheConfig, closed_loop, simulate
from hybridcache.lab import scenario as lab_scenario
from hybridcache.lab.cli import main as hybridcache
from hybridcache.lab.scenario import LOAD, Scenario
from hybridcache.policies.registry import parse_placement
from tests.engine.test_engine import make_engine
from tests.engine.test_hits_change_nothing import ATTENTION_ONLY
from tests.gguf_files import finish, vocabulary, write_gguf
from tests.refused import refused
from tests.selection import ROOT

WRONG: dict[Any, tuple[Any, ...]] = {
    int: ("odd", 1.5, -(2**80), True),
    float: ("odd", math.nan, -math.inf),
    typing.Literal: ("odd", 7, "a\nb"),
}
"""Values that no parameter of a type accepts."""
OTHERS: dict[str, tuple[Any, ...]] = {
    "model": ("",),
    "host": ("",),
    "chat_template": ("",),
    "served_model_name": (("",), ("a\nb",)),
    "chat_template_kwargs": ("odd", "[]"),
    "state_dir": ("",),
    "checkpoint_dtype": ("odd", 5),
    "admission": (5,),
    "draft": ("odd",),
    "stop": ((7,), ("",)),
    "stop_token_ids": (("odd",), (-1,)),
    "cors_origin": tuple(
        (origin,)
        for origin in (
            "foo",
            "https://",
            "https://a/",
            "https://a.b/c",
            "https://me@a.b",
            "",
            "*.a",
        )
    ),
    "router": ("odd",),
    "prefix_cache": ("odd",),
    "memory": ("odd",),
    "eviction": ("odd",),
}
"""Wrong values of parameters whose type does not tell them."""
CONFIGS: tuple[type, ...] = (EngineConfig, SamplingParams, ServerConfig, CacheConfig)
LATER = {"eviction", "model"}
"""Parameters that an engine checks when it loads them. ``test_wrong_flag`` tests these."""


def wrong_values(config: type) -> Iterator[tuple[str, Any]]:
    """Yield (parameter, wrong value) of a class of settings."""
    hints = typing.get_type_hints(config)
    for name in inspect.signature(config).parameters:
        parts = typing.get_args(hints[name])
        kinds = parts if isinstance(hints[name], types.UnionType) else (hints[name],)
        for kind in kinds:
            for value in WRONG.get(typing.get_origin(kind) or kind, ()):
                yield name, value
        yield from ((name, value) for value in OTHERS.get(name, ()))


def check_refusal(message: str, name: str, value: Any) -> None:
    """Check that a message is one line that names the parameter, as field or as flag, or ``value``
    if that is a word."""
    flat = message.replace("-", " ").replace("_", " ")
    is_named = name.replace("_", " ") in flat or (value == "odd" and "odd" in message)
    assert is_named, f"{name}={value!r}: {message}"
    assert len(message.splitlines()) == 1 and len(message) < 1000, message


@pytest.mark.parametrize("config", CONFIGS)
def test_wrong_values_of_settings_are_refused(config: type) -> None:
    base = {"num_kv_tokens": 64, "num_slots": 4} if config is CacheConfig else {}
    for name, value in wrong_values(config):
        if config is EngineConfig and name in LATER and value:
            continue
        with pytest.raises((ValueError, TypeError)) as caught:
            config(**base | {name: value})
            pytest.fail(f"{name}={value!r} is accepted")
        check_refusal(str(caught.value), name, value)


@pytest.mark.parametrize(
    ("make", "word", "right"),
    [
        (CacheConfig, "policy", "eviction"),
        (CacheConfig, "checkpoints", "parse_placement"),
        (CacheConfig, "placement", "parse_placement"),
        (EngineConfig, "policy", "eviction"),
        (EngineConfig, "placement", "checkpoints"),
        (partial(simulate, "short"), "eviction", "policy"),
        (partial(simulate, "short"), "placement", "checkpoints"),
    ],
)
def test_words_of_other_parts_are_refused_with_the_right_one(
    make: Callable[..., Any], word: str, right: str
) -> None:
    refused(f"there is no setting '{word}': .*{right}", make, **{word: "lru"}, kind=TypeError)


def exit_code(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Return the exit code of a command, run in this process."""
    try:
        return command(arguments)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        return stop.code


def test_wrong_values_of_a_scenario_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    hints = typing.get_type_hints(Scenario, localns=vars(lab_scenario))
    for one in dataclasses.fields(Scenario)[1:]:
        kinds = {hints[one.name], *typing.get_args(hints[one.name])}
        if bool in kinds:
            continue
        is_load = one.metadata["group"] == LOAD
        value: Any = -1 if kinds & {int, float} else "odd"
        with pytest.raises((ValueError, OSError)) as caught:
            run = closed_loop if is_load else simulate
            run("short?head=3", **{"gib": 1.0} | {one.name: value})
            pytest.fail(f"{one.name}={value!r} is accepted")
        check_refusal(str(caught.value), one.name, value)
        flag = f"--{one.name.replace('_', '-')}=odd"
        command = ["simulate", "--trace=short?head=3", "--closed-loop" if is_load else "--gib=1"]
        assert exit_code(hybridcache, [*command, flag]) == 2, flag
        check_refusal(capsys.readouterr().err, one.name, "odd")
    refused("odd", simulate, "odd", kind=OSError)


REMEDY = re.compile(
    r"\b(must|may|use|set|send|give|pass|write|install|upgrade|add|remove|drop|leave|shorten|convert|"
    r"export|requires?|needs?|needed|supported|cannot|again|has no)\b",
    re.IGNORECASE,
)
"""Words of a sentence that says what to do, or what is expected."""
OURS = {"EngineStopped", "OSError", "RuntimeError"}
"""Errors that no value of a caller causes."""


def sentences(room: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) of the errors that the code of a folder raises, {} for each value."""
    for file in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                said = node.exc.args[0]
                parts = said.values if isinstance(said, ast.JoinedStr) else [said]
                if all(isinstance(part, ast.Constant | ast.FormattedValue) for part in parts):
                    texts = [getattr(part, "value", "") for part in parts]
                    texts = [text if isinstance(text, str) else "{}" for text in texts]
                    yield ast.unparse(node.exc.func).rpartition(".")[2], "".join(texts)


@pytest.mark.parametrize("room", ["hybridcache", "engine", "kernels"])
def test_every_refusal_is_one_sentence_with_the_value_or_a_remedy(room: str) -> None:
    found = [*sentences(room)]
    odd = [text for _, text in found if re.search(r"\n|  |^ | $|!$", text) or len(text) > 400]
    whole = [text for kind, text in found if text.endswith(".") and kind not in OURS]
    odd += [text for text in whole if "{}" not in text and not REMEDY.search(text)]
    assert odd == [] and len(found) > 10


FLAGS = {
    "serve": (EngineConfig, ServerConfig),
    "generate": (EngineConfig, SamplingParams),
    "chat": (EngineConfig, SamplingParams),
}


@pytest.mark.parametrize("verb", FLAGS)
def test_wrong_flag_of_the_engine_is_refused(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No model is loaded: a flag that is accepted by mistake fails at the missing model."""
    assert exit_code(engine, [verb, "--help"]) == 0
    known = capsys.readouterr().out
    tried = [pair for config in FLAGS[verb] for pair in wrong_values(config)]
    tried += [(name, "odd") for name in ("admission", "checkpoints", "kernels")]
    first = ["--port", "0"] if verb == "serve" else ["x"] if verb == "generate" else []
    num_tried = 0
    for name, value in dict(tried).items():
        flag = "--" + name.replace("_", "-")
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        is_loaded = name in ("eviction", "admission", "checkpoints", "kernels")
        if f" {flag} " not in known or text in ("", "7") or (is_loaded and verb != "chat"):
            continue
        model = ["--cache-gib", "0.05"] if is_loaded else ["--model", "/no"]
        assert exit_code(engine, [verb, *first, *model, f"{flag}={text}"]) == 2, flag
        check_refusal(capsys.readouterr().err, name, value)
        num_tried += 1
    assert num_tried > 20


def test_the_line_that_serves_has_flags_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"grid": 32, "host_gib": 2.0, "disk_gib": 2.0}
    settings["checkpoint_dtype"] = "int8"
    result = simulate(
        "short?head=60", gib=1, policy=["lru", "fifo"], bound=False, seeds=2, **settings
    )
    flags = re.findall("--[a-z-]+", result.verdict())
    assert exit_code(engine, ["serve", "--help"]) == 0
    known = capsys.readouterr().out
    assert len(flags) == 8 and [flag for flag in flags if f" {flag} " not in known] == []


def test_settings_that_require_others_or_name_no_kernel_are_refused() -> None:
    for given, message in {
        "state_dir_mismatch": ("empty", "state_dir_mismatch requires --state-dir."),
        "fetch_above": (3, "fetch_above requires --prefill."),
        "transfer_timeout_s": (3.0, "transfer_timeout_s requires --role."),
        "kernels": ("attention=banana", "banana"),
    }.items():
        with pytest.raises(ValueError, match=message[1]):
            Engine(EngineConfig(cache_gib=0.05, **{given: message[0]}))
    refused("'adaptive,' has an empty name", parse_placement, "adaptive,")


SERVE, GENERATE = "serve --port 0 --model /no", "generate x"
COMMANDS = {
    "frobnicate": "'frobnicate'",
    "sevre --port 1": "invalid choice: 'sevre', did you mean 'serve'?",
    "serve --modle x": "--modle",
    "serve --port 0 --kv-gib x": "--kv-gib",
    "serve --port 0 --disk-gib 1": "--disk-gib requires --state-dir.",
    "serve --port 0 --router text": "router and ray need --replicas",
    "serve --port 0 --replicas 2 --state-dir x": "--replicas cannot share a --state-dir",
    "serve --salt-by-key": "--salt-by-key needs --api-key-file",
    "serve --host no.such.host.invalid": "Cannot listen on no.such.host.invalid:8000",
    "serve --port 0 --model /no/such/model": "/no/such/model is not a model: use",
    f"{GENERATE} --device banana": "unknown device 'banana'",
    f"{GENERATE} --cache-gib 0.0001": "at least 256 tokens and 3 states, 0.001 GiB, are needed",
    f"{GENERATE} --cache-gib 100000": "--cache-gib: 100,000.0 GiB are needed, but",
    f"{GENERATE} --cache-gib 0.1 --max-running 100000000": "GiB cannot be allocated on cpu",
    f"{GENERATE} --max-tokens 10000000": "its answer needs 10000000 more: shorten the prompt or",
    **{
        f"{GENERATE} --prefix-cache none {flag}": f"{flag.split()[0]} requires --prefix-cache"
        for flag in ("--exact", "--eviction lru", "--checkpoints end", "--checkpoint-dtype int8")
    },
    f"{SERVE} --max-running 0": "--max-running must be",
    f"{SERVE} --token-budget 0": "--token-budget must be",
    f"{SERVE} --served-model-name ": "'' has an empty name",
    f"{SERVE} --checkpoints adaptive,": "'adaptive,' has an empty name",
    f"{SERVE} --cors-origin *,": "'*,' has an empty name",
    "serve --page-size=4": "use EngineConfig(page_size=...)",
    "serve --no-warm-up": "use EngineConfig(warm_up=...)",
    "serve --body-timeout-s=4": "use ServerConfig(body_timeout_s=...)",
    "serve --graphs=most": "invalid choice: 'most'",
    "serve --port 0 no:model": "no:model is a name of Ollama's library",
    "serve --port 0 --model no:model": "no:model is a name of Ollama's library",
    "serve --port 0 a/b --model c/d": "MODEL is a/b and --model is c/d",
}
"""Commands whose values do not fit the machine, the model or each other, and words of the error."""


@pytest.mark.parametrize(("command", "said"), COMMANDS.items())
def test_impossible_command_is_refused(
    command: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(engine, command.split(" ")) == 2
    error = capsys.readouterr().err.removeprefix("loading the model ...\n")
    assert said in error and len(error.splitlines()) == 1 and "Traceback" not in error, error


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([], {}, "prompt"),
        ([1, 320], {}, "prompt must contain token ids from 0 to 319 (got 320)"),
        ([-1, 2**70], {}, "token ids"),
        ([[1], [2, 3]], {}, "prompt must be a text or a flat list of token ids"),
        ([1.5], {}, "token ids"),
        ("text", {}, "tokenizer"),
        ([1], {"sampling": SamplingParams(stop=("x",))}, "stop"),
        ([1] * 5000, {}, "context length"),
        ([1] * 4090, {"sampling": SamplingParams(max_tokens=7)}, "context length"),
        ([1], {"sampling": SamplingParams(max_tokens=0)}, "max_tokens"),
        *(([1], {"prompt_logprobs": one}, "prompt_logprobs") for one in (-1, 2.0, True)),
        ([1], {"namespace": True}, "namespace"),
        ([1], {"namespace": [1]}, "namespace"),
    ],
)
def test_impossible_request_is_refused(prompt: Any, options: dict[str, Any], named: str) -> None:
    made = make_engine()
    before = made.report()
    with pytest.raises(ValueError) as caught:
        made.submit(prompt, **options)
    assert named in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert made.report() == before and not made.has_work()


# --- Models ---------------------------------------------------------------------------------------


ANSWERED = "2 generated"


def write(path: Path, arch: str, **metadata: Any) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    finish(writer)


CONFIG = json.dumps(ATTENTION_ONLY)
NO_TENSORS = b"\2\0\0\0\0\0\0\0{}"
DIRECTORIES: list[tuple[str, bytes | None, str]] = [
    ("{broken", None, "config.json"),
    ("{}", None, "config.json has no 'model_type'"),
    (CONFIG.replace("qwen3", "bert"), None, "'bert' are not supported; supported are"),
    (CONFIG.replace('layers": 2', 'layers": "2"'), None, "config.json must be an integer (got"),
    (CONFIG[:-1] + ', "dtype": "int3"}', NO_TENSORS, "dtype 'int3' in config.json"),
    (CONFIG, None, "safetensors"),
    (CONFIG, b"\x10\0\0", "model.safetensors"),
    (CONFIG, b"\xff" * 100, "model.safetensors"),
    (CONFIG, NO_TENSORS, "model.embed_tokens.weight"),
]
"""Broken directories of models: config.json, weights, and words of the error."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the built-in model as a GGUF file, and with files that are no such models."""
    folder = tmp_path_factory.mktemp("models")
    for number, (config, weights, _) in enumerate(DIRECTORIES):
        (folder / f"{number}").mkdir()
        (folder / f"{number}/config.json").write_text(config)
        if weights is not None:
            (folder / f"{number}/model.safetensors").write_bytes(weights)
    words = vocabulary(BUILTIN_DIR, "qwen2")
    write_gguf(gguf, BUILTIN_DIR, folder / "ok.gguf", "Q4_0", words)
    write_gguf(gguf, BUILTIN_DIR, folder / "bare.gguf", "Q4_0")
    write_gguf(
        gguf, BUILTIN_DIR, folder / "t5.gguf", "Q4_0", words | {"tokenizer.ggml.model": "t5"}
    )
    write(folder / "llama.gguf", "llama")
    write(folder / "tower.gguf", "clip")
    write(folder / "lora.gguf", "qwen3", general__type="adapter")
    content = (folder / "ok.gguf").read_bytes()
    (folder / "cut.gguf").write_bytes(content[:200_000])
    (folder / "blob").write_bytes(content)
    (folder / "text.gguf").write_text("text")
    (folder / "plain.txt").write_text("text")
    (folder / "lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("empty", "two", "one"):
        (folder / name).mkdir()
    for name in ("two/a-Q8_0", "two/b-Q8_0", "one/a"):
        (folder / f"{name}.gguf").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("none.gguf", "none.gguf does not exist: correct the path, or download it."),
        ("none", "none is not a model: use a directory with config.json or a GGUF file, the file"),
        ("empty", "empty is not a model: use"),
        ("plain.txt", "plain.txt is not a model: use"),
        ("text.gguf", "text.gguf is not a GGUF file: it does not begin with GGUF."),
        ("lfs.gguf", "lfs.gguf is a pointer of Git LFS, not the weights: run `git lfs pull`."),
        ("cut.gguf", "cut.gguf is truncated or damaged (it has 195.3 KiB of 2.7 MiB): download it"),
        ("two", "two has several models: choose one of a-Q8_0.gguf, b-Q8_0.gguf."),
        ("tower.gguf", "tower.gguf is not a model but a file of the kind 'mmproj': name the file"),
        ("lora.gguf", "lora.gguf is not a model but a file of the kind 'adapter': name the file"),
        ("llama.gguf", "'llama' in llama.gguf are not supported; supported are falcon-h1, granite"),
        ("t5.gguf", "in t5.gguf is of the kind 't5', which is not supported: name the directory"),
        ("bare.gguf", "prompt must be token ids, or a text of them as numbers, because this model"),
        ("ok.gguf --tokenizer bare.gguf", "bare.gguf has no tokenizer: name a directory or GGUF"),
        ("ok.gguf --max-model-len 10000000", "tokens: lower it, or raise --cache-gib."),
        ("ok.gguf --revision main", "--revision main needs a model of the hub, as in --model OR"),
        *((f"{number}", words) for number, (*_, words) in enumerate(DIRECTORIES)),
        *((usable, ANSWERED) for usable in ("one", "blob", "bare.gguf --tokenizer builtin")),
        *((f"ok.gguf {more}", ANSWERED) for more in ("--dtype float32", "--quantization int8")),
        *((usable, ANSWERED) for usable in ("t5.gguf --tokenizer ok.gguf", "ok.gguf --draft mtp")),
    ],
)
def test_models_answer_or_are_refused_in_one_sentence(
    arguments: str,
    message: str,
    models: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(models)
    small = ["--cache-gib", "0.05", "--max-tokens", "2", "--device", "cpu", "Ada has 5 apples."]
    code = exit_code(engine, ["generate", "--model", *arguments.split(), *small])
    said = capsys.readouterr().err
    assert message in said and code == (0 if message == ANSWERED else 2)
    if message != ANSWERED:
        [line] = said.splitlines()
        assert line.endswith(".") and ". " not in line.replace(". In Python, ", ", or in Python, ")


def test_weights_larger_than_the_memory_are_refused_before_they_are_read(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("engine.runner.device.host_free_bytes", lambda: 1 << 20)
    monkeypatch.setattr(RawWeights, "fill", lambda *_: pytest.fail("weights are read"))
    assert exit_code(engine, ["generate", "--model", f"{models}/ok.gguf", "x"]) == 2
    assert re.search(
        r"the weights need [2-9]\.\d MiB, but 1\.0 MiB of the memory of cpu are available: use",
        capsys.readouterr().err,
    )


def test_gguf_files_are_not_converted(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", f"{models}/ok.gguf", str(tmp_path / "out"), "--to", "int8"]
    assert exit_code(engine, command) == 2
    assert "ok.gguf is a GGUF file: convert the model in full" in capsys.readouterr().err


def test_flags_of_other_programs_name_those_of_the_engine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert exit_code(engine, ["serve", "--help"]) == 0
    known = {*re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out)}
    for flag, said in FOREIGN.items():
        assert exit_code(engine, ["serve", "some/model", flag, "7"]) == 2
        message = capsys.readouterr().err
        assert said in message and len(message.splitlines()) == 1
        assert {*re.findall(r"--[a-z][a-z0-9-]*", said)} <= known and flag not in known
    texts = "\n".join(file.read_text() for file in BUILTIN_DIR.parents[1].rglob("*.py"))
    python = re.findall(r'In Python, "\s*"EngineConfig\((\w+)=', texts)
    assert python and known.isdisjoint("--" + name.replace("_", "-") for name in python)
    assert exit_code(engine, ["generate", "--api-key", "7"]) == 2  # It has no --api-key-file.
    assert "use --api-key-file" not in capsys.readouterr().err


def test_a_check_without_vllm_says_so_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # Absent, also if it is installed.
    monkeypatch.delitem(sys.modules, "hybridcache.vllm.check", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("hybridcache.vllm.check", run_name="__main__")
    assert "needs vLLM in this environment" in str(stop.value)
    assert len(str(stop.value).splitlines()) == 1
