"""Model directories with only a config, which serve token ids, and the sampling defaults of
generation_config.json."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import Engine, EngineConfig, RequestSpec, SamplingParams
from engine.config import BUILTIN_DIR
from engine.front.worker.screen import screen_rows, screen_text
from engine.requests.request import sampling_defaults
from engine.text.tokenizer import IdTokenizer
from engine.text.tokenizer_files import named_eos
from tests.engine.device_models import TINY, write_geometry
from tests.refused import refused

from .conftest import Live, serving

IDS = [5, 17, 250]
RECOMMENDED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True}


def make_engine(directory: Path, **settings: object) -> Engine:
    config = {"load_format": "dummy", "device": "cpu", "cache_gib": 0.02} | settings
    return Engine(EngineConfig(model=str(directory), **config))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_geometry(tmp_path_factory.mktemp("bare"), TINY | {"eos_token_id": 299}))


@pytest.fixture(scope="module")
def live(directory: Path) -> Iterator[Live]:
    with serving(make_engine(directory)) as server:
        yield server


def test_token_ids_are_served_without_a_tokenizer(live: Live) -> None:
    engine = live.engine
    assert isinstance(engine.tokenizer, IdTokenizer)
    assert engine.tokenizer.eos_token_ids == {299} and engine.tokenizer.vocab_size == 300
    screen = screen_text(screen_rows(engine, ""))
    assert "tokenizer    none: prompts and answers are token ids" in screen
    assert f"a step at most; admission by {engine.config.admission}" in screen
    greedy = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    by_id, by_text = (
        live.post("/v1/completions", {"prompt": prompt, "echo": True, **greedy}).json()
        for prompt in (IDS, "5 17 250")
    )
    numbers = by_id["choices"][0]["text"]
    assert numbers.startswith(" 5 17 250 ") and len(numbers.split()) == 7
    assert by_text["choices"][0]["text"] == numbers
    assert engine.tokenizer.encode(numbers)[:3] == IDS
    events = live.post(
        "/v1/completions", {"prompt": IDS, "echo": True, "stream": True, **greedy}
    ).text.split("data: ")[1:-1]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == numbers


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("completions", {"prompt": "Once upon"}, "prompt must be token ids, or a text"),
        ("completions", {"prompt": "5 300"}, "prompt must contain token ids from 0 to 299"),
        ("completions", {"prompt": "5 99999999999"}, "prompt must be token ids, or a text"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "5"}]},
            "cannot chat: use /v1/completions",
        ),
    ],
)
def test_text_without_a_tokenizer_is_refused_in_one_sentence(
    live: Live, path: str, body: dict[str, object], sentence: str
) -> None:
    answer = live.post(f"/v1/{path}", body)
    assert answer.status_code == 400 and sentence in answer.json()["error"]["message"]


def test_sampling_defaults_come_from_the_model(tmp_path: Path) -> None:
    path = Path(write_geometry(tmp_path, TINY))
    (path / "generation_config.json").write_text(json.dumps(RECOMMENDED | {"eos_token_id": [7]}))
    engine = make_engine(path)
    assert engine.sampling_defaults == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    screen = screen_text(screen_rows(engine, ""))
    assert (
        "sampling     temperature 0.6, top_p 0.95, top_k 20, unless a request sets them" in screen
    )
    used: list[SamplingParams] = []
    make = engine.make
    engine.make = lambda spec: (  # type: ignore[method-assign]
        used.append(spec.sampling) or make(spec)
    )
    with serving(engine) as live:
        for body in ({}, {"temperature": 0, "top_k": 5}, {"top_p": 1, "temperature": None}):
            answer = live.post("/v1/completions", {"prompt": IDS, "max_tokens": 1, **body})
            assert answer.status_code == 200
    assert [(p.temperature, p.top_k, p.top_p) for p in used] == [
        (0.6, 20, 0.95),
        (0, 5, 0.95),
        (0.6, 20, 1),
    ]
    engine = make_engine(path)
    request = engine.make(engine.validate(RequestSpec(IDS)))
    assert (request.params.temperature, request.params.top_k) == (0.6, 20)
    (path / "generation_config.json").write_text("[1]")
    refused("is not an object in JSON", make_engine, path)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"top_k": -1}, {}),
        ({"top_k": -1.0}, {}),
        ({"top_k": 0, "top_p": None}, {}),
        ({"top_k": 20.0, "top_p": 1}, {"top_k": 20, "top_p": 1}),
        ({"temperature": 0.0, "do_sample": True}, {"temperature": 0}),
        ({"temperature": 1, "min_p": 0}, {"temperature": 1, "min_p": 0}),
        ({"top_k": 20.5}, "top_k must be an integer"),
        ({"top_k": "20"}, "top_k must be an integer"),
        ({"top_k": -2}, "top_k must be an integer"),
        ({"top_p": 0}, "top_p must be a finite number"),
        ({"temperature": True}, "temperature must be a finite number"),
        ({"repetition_penalty": [1.1]}, "repetition_penalty must be a finite number"),
    ],
    ids=str,
)
def test_sampling_defaults_of_trainers_are_read_or_the_file_is_named(
    tmp_path: Path, written: dict[str, Any], expected: dict[str, float] | str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    config = EngineConfig(model=str(tmp_path))
    if isinstance(expected, dict):
        found = sampling_defaults(config)
        assert found == expected and not isinstance(found.get("top_k"), float)
        return
    path = re.escape(str(tmp_path / "generation_config.json"))
    refused(f"{path}: {expected}.*sampling_defaults='none'", sampling_defaults, config)
    assert sampling_defaults(EngineConfig(model=str(tmp_path), sampling_defaults="none")) == {}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("<|im_end|>", {258}),
        (["<|im_end|>", 7, None], {258, 7}),
        ([7.0], {7}),
        (-1, set()),
        ([], set()),
        ("<|end|>", "got '<|end|>'"),
        (["no such"], "got 'no such'"),
        (7.5, "got 7.5"),
        (True, "got True"),
        ({"id": 7}, "got {'id': 7}"),
    ],
    ids=str,
)
def test_end_tokens_are_ids_or_texts(tmp_path: Path, named: Any, expected: set[int] | str) -> None:
    shutil.copy(BUILTIN_DIR / "tokenizer.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    if isinstance(expected, set):
        assert named_eos(tmp_path) == expected
        return
    path = re.escape(str(tmp_path / "generation_config.json"))
    refused(f"{path}: eos_token_id .*{re.escape(expected)}", named_eos, tmp_path)
