"""How much of an agent's prompt is computed again? Scripted agents with tools, through the openai
client, over templates that treat reasoning as Qwen3's, Qwen3-Coder's and Qwen3.5's do.

python -m experiments.run_agent

Every answer is sampled as a model may: another tokenization and other JSON than the server would
write. Each conversation runs three times: answers that come back are tokenized anew, are replayed
as they were sampled, and are replayed with the reasoning that templates drop. ``new`` is what the
client added since the last answer, ``beyond`` what was computed beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai

from engine.server.config import ServerConfig
from engine.text.hugging_face import HFTokenizer
from experiments import provenance
from experiments.agents import scripts
from experiments.agents.scripted import ScriptedEngine
from experiments.agents.templates import TEMPLATES
from experiments.agents.tokenizers import make_model_dir, sampled_like
from hybridcache.lab.report import text_table

MODES = {
    "replayed, thoughts kept": ServerConfig(preserve_thinking=True),
    "replayed": ServerConfig(),
    "tokenized anew": ServerConfig(replay_mib=0),
}
Message = dict[str, Any]


class Asked(NamedTuple):
    """One request of an agent, and what it cost."""

    prompt_len: int
    cached_len: int
    known_len: int
    """Tokens of the prompt and its answer that were computed."""
    cause: str | None


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
    """A record for each template, with thinking and without, and each way to treat answers."""
    for name, template in _templates(templates).items():
        for thinks in (True, False) if "think" in template else (False,):
            with tempfile.TemporaryDirectory() as folder:
                tokenizer = HFTokenizer(make_model_dir(Path(folder), template, tokenizer_file))
            new: list[int] | None = None
            for mode, config in MODES.items():
                asked = list(converse(tokenizer, name, thinks, config, num_loops))
                if new is None:
                    # Nothing is dropped here: what a prompt has more than the one before is new.
                    known = [0, *(one.known_len for one in asked)]
                    new = [one.prompt_len - known[at] for at, one in enumerate(asked)]
                yield record(name, thinks, mode, asked, new)


def _templates(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return TEMPLATES
    files = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    return {name: text for name, text in files.items() if "<tool_call>" in text}


def record(
    template: str, thinks: bool, mode: str, asked: list[Asked], new: list[int]
) -> dict[str, Any]:
    """What a conversation cost, request by request."""
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
    tokenizer: HFTokenizer, template: str, thinks: bool, config: ServerConfig, num_loops: int
) -> Iterator[Asked]:
    """One agent's requests, each after its answer."""
    source = tokenizer.chat_template
    assert source is not None
    form = "hermes" if "<function=" not in source.source else "coder"
    form = "thinking" if form == "coder" and "<think>" in source.source else form
    variables = {} if thinks else {"enable_thinking": False}
    engine = ScriptedEngine(tokenizer, num_kv_tokens=65536, num_slots=256)
    messages: list[Message] = [{"role": "system", "content": scripts.SYSTEM}]
    earlier: str | None = None
    with engine.serving(config) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for question, turns in scripts.questions(num_loops):
            messages.append({"role": "user", "content": question})
            for turn in turns:
                header = source.render(
                    [{"role": "user", "content": ""}],
                    add_generation_prompt=True,
                    variables=variables,
                ).rpartition("<|im_start|>")[2]
                text = scripts.written(turn, form, thinks, header)
                ids = sampled_like(tokenizer, text, len(engine.sampler.scripts))
                compared = {"comparison_response_id": earlier} if earlier else {}
                answer = client.chat.completions.create(
                    model=engine.engine.model_name,
                    messages=messages,
                    tools=scripts.TOOLS,
                    seed=engine.sampler.add(ids),
                    max_tokens=len(ids),
                    extra_body={
                        "chat_template_kwargs": variables,
                        "prompt_cache_options": compared,
                    },
                )
                said = answer.choices[0].message
                assert len(said.tool_calls or ()) == len(turn.calls), said
                messages.append(_echo(said))
                messages += [
                    {"role": "tool", "tool_call_id": call.id, "content": told.result}
                    for call, told in zip(said.tool_calls or (), turn.calls, strict=True)
                ]
                yield _asked(answer)
                earlier = answer.id


def _echo(said: Any) -> Message:
    """An answer as a client sends it back, its JSON parsed and written again."""
    message: Message = {"role": "assistant", "content": said.content or ""}
    if thoughts := getattr(said, "reasoning_content", None):
        message["reasoning_content"] = thoughts
    if said.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(json.loads(call.function.arguments), sort_keys=True),
                },
            }
            for call in said.tool_calls
        ]
    return message


def _asked(answer: Any) -> Asked:
    usage = answer.usage
    told = getattr(answer, "cache_explanation", None) or {}
    known_len = usage.prompt_tokens + usage.completion_tokens - 1
    cached_len = usage.prompt_tokens_details.cached_tokens
    return Asked(usage.prompt_tokens, cached_len, known_len, told.get("cause"))


def table(records: list[dict[str, Any]]) -> str:
    """The worst and the mean of every conversation, after its first request."""
    head = ["template", "thinking", "answers are", "requests", "new", "computed", "beyond: worst"]
    rows = []
    for one in records:
        beyond = one["beyond"][1:]
        causes = {cause for cause, cost in zip(one["causes"][1:], beyond, strict=True) if cost > 64}
        rows.append(
            [
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
    return text_table([*head, "mean", "above 64", "causes of these"], rows)


if __name__ == "__main__":
    main()
