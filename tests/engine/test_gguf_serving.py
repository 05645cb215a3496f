"""The engine on GGUF files of the built-in model: what it answers, and what hits change."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import pytest
import torch

from engine import Engine, EngineConfig, SamplingParams
from engine.config import BUILTIN_DIR
from engine.weights.model_config import ModelError
from experiments import texts
from tests.engine.device_models import write_checkpoint
from tests.engine.small_models import Driver, random_tokens
from tests.engine.test_hits_change_nothing import HYBRID
from tests.engine.weights.test_ranks import run_ranks
from tests.gguf_files import vocabulary, write_gguf
from tests.refused import refused
from tests.selection import is_quick

GREEDY = SamplingParams(max_tokens=12, temperature=0, logprobs=3)
BEGINNING = "The same beginning, again and again. " * 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    for kind in ("F32", "Q8_0", "Q4_0"):
        path = folder / f"{kind}.gguf"
        write_gguf(gguf, BUILTIN_DIR, path, kind, vocabulary(BUILTIN_DIR, "gpt-2"))
    return {path.stem: path for path in folder.iterdir()}


def engine_of(path: Path, **settings: object) -> Engine:
    return Engine(EngineConfig(model=str(path), device="cpu", **({"cache_gib": 0.1} | settings)))


def test_word_problems_are_solved_as_in_full_precision(files: dict[str, Path]) -> None:
    """Files of few bits solve as many problems, within 2 points, or within two problems of a short
    run."""
    rng = random.Random(7)
    problems = [texts.few_shot(rng, 4) for _ in range(8 if is_quick() else 200)]
    solved = {}
    for kind, path in files.items():
        engine = engine_of(path, dtype="float32" if kind == "F32" else "bfloat16")
        params = SamplingParams(max_tokens=60, temperature=0, stop=["\n"])
        outputs = engine.generate([prompt for prompt, _ in problems], params)
        engine.close()
        pairs = zip(outputs, problems, strict=True)
        solved[kind] = sum(output.text.strip() == problem.working for output, (_, problem) in pairs)
    assert solved["F32"] > len(problems) // 5, solved
    for kind in ("Q8_0", "Q4_0"):
        assert abs(solved[kind] - solved["F32"]) <= max(2, len(problems) // 50), solved


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"draft": "mtp"}, {"draft": "tree"}, {"host_gib": 0.1, "cache_gib": 0.004}],
    ids=["plain", "mtp", "tree", "host"],
)
def test_hits_are_exact(kind: str, settings: dict[str, object], files: dict[str, Path]) -> None:
    engine = engine_of(files[kind], **settings)
    prompts = [BEGINNING + word for word in ("one", "two")]
    cold = engine.generate(prompts[:1], GREEDY)
    engine.generate([f"{number} " + BEGINNING for number in range(4)], GREEDY)
    hit = engine.generate(prompts[:1], GREEDY)
    engine.close()
    assert cold[0].cached_len == 0 and hit[0].cached_len >= 256
    assert cold[0].token_ids == hit[0].token_ids and cold[0].logprobs == hit[0].logprobs


@pytest.mark.full("Q4_0")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_ranks_have_whole_blocks(kind: str, files: dict[str, Path], tmp_path: Path) -> None:
    """Hits are exact with two ranks, as threads. Blocks that they would split are refused."""
    tokens = random_tokens(150, 3)

    def ranks(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
        config = EngineConfig(model=str(path), device="cpu", cache_gib=0.1)
        return run_ranks(2, config, lambda runner: Driver(runner).cold_and_mixed(tokens))

    with pytest.raises(ModelError, match="--tp would split blocks of 32 columns that share a scal"):
        ranks(files[kind])
    sizes = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 64}
    sizes |= {"shared_expert_intermediate_size": 64, "mlp_only_layers": []}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 32}
    config = HYBRID | {"vocab_size": 320, "num_key_value_heads": 2} | sizes | heads
    write_checkpoint(tmp_path, config)
    path = tmp_path / f"{kind}.gguf"
    write_gguf(gguf, tmp_path, path, kind, vocabulary(BUILTIN_DIR, "gpt-2"))
    first, second = ranks(path)
    assert all(map(torch.equal, first, second))
    assert torch.equal(first[1][1:], first[0][64:])


def test_a_store_belongs_to_one_file(files: dict[str, Path], tmp_path: Path) -> None:
    """A restart reuses what the same file has stored; another file does not."""
    found = {}
    for run in ("first", "again"):
        engine = engine_of(files["Q4_0"], state_dir=str(tmp_path / "store"))
        [found[run]] = engine.generate([BEGINNING], GREEDY)
        engine.close()
    assert found["first"].cached_len == 0 and found["again"].cached_len >= 256
    refused("differs in weights", engine_of, files["Q8_0"], state_dir=str(tmp_path / "store"))
    assert found["again"].logprobs == found["first"].logprobs


def test_thoughts_and_tools_work_from_the_template_of_a_file(files: dict[str, Path]) -> None:
    for kind in ("F32", "Q4_0"):
        engine = engine_of(files[kind])
        original = Engine(EngineConfig(cache_gib=0.05, device="cpu"))
        own, expected = engine.tokenizer, original.tokenizer
        assert own.chat_template is not None and expected.chat_template is not None
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        chat = [{"role": "user", "content": "What do you keep?"}]
        options = {"tools": tools, "add_generation_prompt": True}
        rendered = expected.chat_template.render(chat, **options)
        assert own.chat_template.render(chat, **options) == rendered
        assert own.chat_template.thinks == expected.chat_template.thinks
        assert own.encode(rendered) == expected.encode(rendered)
        engine.close()
        original.close()
