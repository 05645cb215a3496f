"""Count the prompt tokens that agents compute again: scripted agents with tools, with the clients
of OpenAI and Anthropic, and templates that treat reasoning like those of Qwen3, Qwen3-Coder and
Qwen3.5.

python -m experiments.run_agent

Answers have another tokenization and other JSON than the server would write, as those of a model
may have. Each conversation runs three times: answers that come back are tokenized again, are
replayed as they were sampled, and are replayed with the reasoning that templates drop. ``new``
counts the tokens that the client added since the last answer, ``beyond`` the others that were
computed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from engine import server_config
from engine.server.settings import ServerConfig
from engine.text.hugging_face import HFTokenizer
from experiments import provenance
from experiments.system.agents import scripts
from experiments.system.agents.clients import AGENTS, Asked
from experiments.system.agents.scripted import ScriptedEngine
from experiments.system.agents.templates import TEMPLATES
from experiments.system.agents.tokenizers import make_model_dir, sampled_like
from hybridcache.lab.report import text_table

MODES = {
    "replayed, thoughts kept": server_config(preserve_thinking=True),
    "replayed": ServerConfig(),
    "tokenized anew": server_config(replay_mib=0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loops", type=int, default=3, help="calls of tools before an answer")
    parser.add_argument("--templates", type=Path, help="folder with NAME.jinja in place of ours")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json in place of a small one")
    options = parser.parse_args()
    records = list(run_all(options.loops, options.templates, options.tokenizer))
    path = provenance.RESULTS / "run_agent.jsonl"
    provenance.write_json_lines(path, records, {"loops": options.loops})
    print(table(records))


def run_all(
    num_loops: int, templates: Path | None = None, tokenizer_file: Path | None = None
) -> Iterator[dict[str, Any]]:
    """A record for each client and template, with thinking and without, and each way to treat
    answers."""
    for client, (name, template) in product(AGENTS, _templates(templates).items()):
        for thinks in (True, False) if "think" in template else (False,):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = HFTokenizer(make_model_dir(Path(folder), template, tokenizer_file))
            new: list[int] | None = None
            for mode, config in MODES.items():
                asked = list(converse(tokenizer, client, thinks, config, num_loops))
                if new is None:
                    # Nothing is dropped here: what a prompt has more than the one before is new.
                    known = [0, *(one.known_len for one in asked)]
                    new = [one.prompt_len - known[at] for at, one in enumerate(asked)]
                yield {"client": client} | record(name, thinks, mode, asked, new)


def _templates(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return TEMPLATES
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    return {name: text for name, text in files.items() if "<tool_call>" in text}


def record(
    template: str, thinks: bool, mode: str, asked: list[Asked], new: list[int]
) -> dict[str, Any]:
    """Return the computed tokens of a conversation, request by request."""
    computed = [one.prompt_len - one.cached_len for one in asked]
    beyond = [cost - added for cost, added in zip(computed, new, strict=True)]
    return {
        "template": template,
        "thinks": thinks,
        "mode": mode,
        "requests": len(asked),
        "prompt_tokens": [one.prompt_len for one in asked],
        "computed": computed,
        "new": new,
        "beyond": beyond,
        "causes": [one.cause for one in asked],
    }


def converse(
    tokenizer: HFTokenizer, client: str, thinks: bool, config: ServerConfig, num_loops: int
) -> Iterator[Asked]:
    """One agent's requests, each after its answer."""
    source = tokenizer.chat_template
    assert source is not None
    form = "hermes" if "<function=" not in source.source else "coder"
    form = "thinking" if form == "coder" and "<think>" in source.source else form
    variables = {} if thinks else {"enable_thinking": False}
    engine = ScriptedEngine(tokenizer, num_kv_tokens=65536, num_slots=256)
    with engine.serving(config) as url:
        agent = AGENTS[client](url, engine.engine.model_name, thinks)
        for question, turns in scripts.questions(num_loops):
            agent.question(question)
            for turn in turns:
                header = source.render(
                    [{"role": "user", "content": ""}],
                    add_generation_prompt=True,
                    variables=variables,
                ).rpartition("<|im_start|>")[2]
                text = scripts.written(turn, form, thinks, header)
                ids = sampled_like(tokenizer, text, len(engine.sampler.scripts))
                engine.sampler.add(ids)
                asked, num_calls = agent.ask(len(ids))
                assert num_calls == len(turn.calls), turn
                agent.results([call.result for call in turn.calls])
                yield asked


def table(records: list[dict[str, Any]]) -> str:
    """The worst and the mean of every conversation, after its first request."""
    head = [
        "client",
        "template",
        "thinking",
        "answers are",
        "requests",
        "new",
        "computed",
    ]
    rows = []
    for one in records:
        beyond = one["beyond"][1:]
        causes = {cause for cause, cost in zip(one["causes"][1:], beyond, strict=True) if cost > 64}
        rows.append(
            [
                one["client"],
                one["template"],
                "on" if one["thinks"] else "off",
                one["mode"],
                str(one["requests"]),
                str(sum(one["new"][1:])),
                str(sum(one["computed"][1:])),
                str(max(beyond)),
                f"{sum(beyond) / len(beyond):.0f}",
                str(sum(cost > 64 for cost in beyond)),
                ", ".join(sorted(map(str, causes))),
            ]
        )
    return text_table([*head, "beyond: worst", "mean", "above 64", "causes of these"], rows)


if __name__ == "__main__":
    main()
