"""A served Hugging Face directory: tokenizer, template, name and dummy weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine import Engine, EngineConfig
from tests.engine.test_hits_change_nothing import HYBRID

from .conftest import Live, serving

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
CONFIG = HYBRID | {"vocab_size": 512, "max_position_embeddings": 4096, "eos_token_id": 0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-hybrid"
    path.mkdir()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|im_end|>", "<|im_start|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[tokenizers.AddedToken(mark, special=True) for mark in marks],
    )
    backend.train_from_iterator(["the cat sat on the mat, naïve 😀\n"] * 4, trainer)
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def live(directory: Path) -> Iterator[Live]:
    config = EngineConfig(model=str(directory), load_format="dummy", cache_gib=0.02)
    with serving(Engine(config)) as server:
        yield server


def test_model_name_is_that_of_the_directory(live: Live) -> None:
    [card] = live.client.models.list().data
    assert (card.id, card.max_model_len) == ("tiny-hybrid", 4096)


def test_streamed_text_equals_the_whole_text(live: Live) -> None:
    options = {"model": "tiny-hybrid", "prompt": "the cat 😀", "max_tokens": 60, "temperature": 1.5}
    for seed in range(3):
        whole = live.client.completions.create(seed=seed, **options).choices[0].text
        events = live.client.completions.create(seed=seed, stream=True, **options)
        assert "".join(event.choices[0].text for event in events) == whole


def test_next_turn_resumes_at_the_last_stable_boundary(live: Live) -> None:
    chat = [
        {"role": "system", "content": "the cat sat on the mat " * 20},
        {"role": "user", "content": "on the mat? " * 30},
    ]
    options = {"model": "tiny-hybrid", "max_tokens": 3, "temperature": 0}
    first = live.client.chat.completions.create(messages=chat, **options)
    boundaries = live.post("/tokenize", {"messages": chat}).json()["boundaries"]
    assert boundaries[-1] == first.usage.prompt_tokens - 2, (
        "the next prompt lacks <think> and a line break"
    )
    chat += [{"role": "assistant", "content": "the cat"}, {"role": "user", "content": "sat?"}]
    second = live.client.chat.completions.create(messages=chat, **options)
    assert second.usage.prompt_tokens_details.cached_tokens == boundaries[-1] // 64 * 64 > 0
    live.check_conserved()
