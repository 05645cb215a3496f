"""Count the prompt tokens that scripted agents with tools cause to be computed again.

python -m experiments.run_agent

The agents use the clients of OpenAI and Anthropic. Templates treat reasoning like those of Qwen3,
Qwen3-Coder and Qwen3.5. Answers differ from the server's own rendering in tokenization and JSON,
like those of a model.

Each conversation runs three times. Returned answers are tokenized again, replayed as they were
sampled, or replayed together with the reasoning that templates drop. ``new`` counts tokens added by
the client since the last answer. ``beyond`` counts the other computed tokens.
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
from experiments.system.agents.clients import AGENTS, ServedRequest
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
    parser.add_argument("--loops", type=int, default=3, help="tool calls before an answer")
    parser.add_argument("--templates", type=Path, help="folder with NAME.jinja (default: built in)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (default: a small one)")
    options = parser.parse_args()
    records = list(run_all(options.loops, options.templates, options.tokenizer))
    path = provenance.RESULTS / "run_agent.jsonl"
    provenance.write_json_lines(path, records, {"loops": options.loops})
    print(table(records))


def run_all(
    num_loops: int, templates: Path | None = None, tokenizer_file: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Yield one record per client, template, thinking mode and treatment of answers."""
    for client, (name, template) in product(AGENTS, _templates(templates).items()):
        for thinks in (True, False) if "think" in template else (False,):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = HFTokenizer(make_model_dir(Path(folder), template, tokenizer_file))
            new: list[int] | None = None
            for mode, config in MODES.items():
                requests = list(converse(tokenizer, client, thinks, config, num_loops))
                if new is None:
                    # This mode drops nothing, so a prompt's tokens beyond the last answer are new.
                    ends = [0, *(request.context_len for request in requests)]
                    new = [request.prompt_len - ends[i] for i, request in enumerate(requests)]
                yield {"client": client} | record(name, thinks, mode, requests, new)


def _templates(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return TEMPLATES
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    return {name: text for name, text in files.items() if "<tool_call>" in text}


def record(
    template: str, thinks: bool, mode: str, requests: list[ServedRequest], new: list[int]
) -> dict[str, Any]:
    """Return the record of a conversation, with the computed tokens of each request."""
    computed = [request.prompt_len - request.cached_len for request in requests]
    beyond = [cost - added for cost, added in zip(computed, new, strict=True)]
    return {
        "template": template,
        "thinks": thinks,
        "mode": mode,
        "requests": len(requests),
        "prompt_tokens": [request.prompt_len for request in requests],
        "computed": computed,
        "new": new,
        "beyond": beyond,
        "causes": [request.cause for request in requests],
    }


def converse(
    tokenizer: HFTokenizer, client: str, thinks: bool, config: ServerConfig, num_loops: int
) -> Iterator[ServedRequest]:
    """Yield the requests of one agent, each after its answer."""
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
                request, num_calls = agent.ask(len(ids))
                assert num_calls == len(turn.calls), turn
                agent.results([call.result for call in turn.calls])
                yield request


def table(records: list[dict[str, Any]]) -> str:
    """Return the table of the largest and mean recomputation per conversation, without first
    requests."""
    header = ["client", "template", "thinking", "answers", "requests", "new", "computed"]
    rows = []
    for entry in records:
        beyond = entry["beyond"][1:]
        causes = {
            cause for cause, cost in zip(entry["causes"][1:], beyond, strict=True) if cost > 64
        }
        rows.append(
            [
                entry["client"],
                entry["template"],
                "on" if entry["thinks"] else "off",
                entry["mode"],
                str(entry["requests"]),
                str(sum(entry["new"][1:])),
                str(sum(entry["computed"][1:])),
                str(max(beyond)),
                f"{sum(beyond) / len(beyond):.0f}",
                str(sum(cost > 64 for cost in beyond)),
                ", ".join(sorted(map(str, causes))),
            ]
        )
    return text_table([*header, "beyond: max", "mean", "above 64", "causes above 64"], rows)


if __name__ == "__main__":
    main()
