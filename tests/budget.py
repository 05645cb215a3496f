"""Budget of the repository: a price for each capability, settings, and functions of three walks.

    python -m tests.budget            print the numbers and their differences from the budget
    python -m tests.budget --update   store them in tests/budget.json (lines by tens) and the page

A line of code has a token that is no comment and no docstring, so that no reason is cut to meet a
number. Each file of the product belongs to the core or to one capability. A walk is the set of
functions of the repository that one piece of work calls. Kernels are the references, so that the
number does not depend on compiler and processor. Comprehensions do not count: since Python 3.12
most of them are no functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import io
import json
import re
import sys
import threading
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from engine import AsyncEngine, Engine, EngineConfig, SamplingParams
from engine.front.command import cli
from engine.front.server.app import create_app
from engine.front.server.settings import ServerConfig
from engine.runner.backends import override_all
from tests.radix.serving import hybrid, publish
from tests.selection import ROOT

STORE = ROOT / "tests" / "budget.json"
PAGE = ROOT / "docs" / "architecture.md"
PRODUCT = ("hybridcache", "engine", "kernels", "experiments")
ENDINGS = (".py", ".cpp", ".h", ".js", ".css", ".html")
CACHE = "hybridcache/"
RADIX = f"{CACHE}radix/"
FRONT = "engine/front/"
CAPABILITIES = {
    "core: the cache with LRU, and scheduling": f"{CACHE}__init__.py {CACHE}config.py "
    f"{CACHE}command/field_texts.py {RADIX}tokens.py {RADIX}tree.py {RADIX}protocol.py "
    f"{RADIX}api.py {RADIX}cache.py {RADIX}lease.py {RADIX}__init__.py "
    f"{CACHE}allocators/* {CACHE}scheduling/__init__.py "
    f"{CACHE}scheduling/planner.py {CACHE}scheduling/cache_manager.py "
    f"{CACHE}scheduling/loading.py {CACHE}scheduling/request.py "
    f"{CACHE}policies/registry.py {CACHE}policies/eviction/lru.py "
    f"{CACHE}policies/eviction/priority_classes.py",
    "core: the engine with one family": "engine/core.py engine/engine.py engine/config.py "
    "engine/errors.py engine/messages.py engine/interrupts.py engine/__init__.py engine/requests/* "
    "engine/schedule/scheduler.py engine/schedule/report.py engine/runner/model_runner.py "
    "engine/runner/steps.py engine/runner/memory.py engine/runner/build.py "
    "engine/runner/loading.py engine/runner/sampler.py "
    "engine/runner/device.py engine/runner/backends.py "
    "engine/layers/attention.py engine/layers/blocks.py engine/layers/inputs.py "
    "engine/layers/experts.py engine/layers/recurrent.py engine/layers/rotary.py "
    "engine/models/__init__.py engine/models/decoder.py engine/models/qwen3_next.py",
    "tiers, restart, warm state": f"{RADIX}offload.py {RADIX}tiers.py {RADIX}warm_state.py "
    "engine/plugins/tiers/*",
    "debug caches": f"{RADIX}debug.py",
    "disaggregation": "engine/plugins/disaggregation/*",
    "replicas, routers, events": f"{FRONT}worker/replicas.py {CACHE}adapters/routing/* "
    f"{CACHE}adapters/events.py {CACHE}lab/runs/fleet.py experiments/studies/router.py",
    "tensor parallel": "engine/plugins/tensor_parallel/* engine/weights/ranks.py",
    "drafts": "engine/plugins/speculation/* engine/schedule/drafting.py engine/runner/predictor.py "
    "engine/runner/verification.py engine/layers/prediction.py "
    "experiments/benchmarks/speculation.py",
    "narrow checkpoints": f"{CACHE}geometry/checkpoints.py kernels/state_copy/narrow.py "
    "experiments/studies/checkpoint_dtype.py",
    "conversion": f"{FRONT}command/convert.py engine/weights/forms/model_slim.py",
    "grammars": "engine/plugins/guided/* engine/text/grammar.py",
    "calls of tools": f"{FRONT}server/tool_calls/*",
    "Responses API": f"{FRONT}server/endpoints/responses.py",
    "Anthropic API": f"{FRONT}server/endpoints/anthropic.py",
    "explanations": f"{FRONT}server/endpoints/explain.py",
    "live page": f"{FRONT}cache_watch.py {CACHE}adapters/watch/* {CACHE}adapters/__init__.py "
    f"{FRONT}server/endpoints/observe.py",
    "metrics": f"{FRONT}server/metrics.py",
    "recording proxy": f"{FRONT}command/record.py {FRONT}command/proxy.py",
    "chats: server, templates, answers": f"{FRONT}* engine/text/answers.py engine/text/bounded.py",
    "GGUF": f"{CACHE}geometry/gguf*.py engine/weights/gguf* engine/text/gguf_tokenizer.py "
    "kernels/linear/blocks.py kernels/linear/groups.py kernels/linear/native_groups.cpp",
    "other quantised files": "engine/weights/forms/* kernels/linear/grouped.py "
    "kernels/linear/words.py engine/weights/scheme.py",
    "int8 and fp8 products": "kernels/linear/eight_bits.py kernels/linear/int8.py kernels/amx.h",
    "weights, tokenizers, templates": "engine/weights/* engine/text/*",
    "GPU scripts": "experiments/gpu/*",
    "Kimi Linear": "kernels/kda/* kernels/mla/* engine/models/kimi_linear.py "
    f"{CACHE}geometry/families/kimi_linear.py",
    "Jamba": f"kernels/mamba1/* engine/models/jamba.py {CACHE}geometry/families/jamba.py",
    "Mamba-2 families": "kernels/mamba2/* engine/models/nemotron_h.py engine/models/granite* "
    f"engine/models/falcon_h1.py {CACHE}geometry/families/nemotron_h.py "
    f"{CACHE}geometry/families/granite* {CACHE}geometry/families/falcon_h1.py",
    "other families": "engine/models/*",
    "kernels": "kernels/*",
    "SGLang backend": f"{CACHE}sglang/* experiments/benchmarks/sglang.py",
    "content check for vLLM": f"{CACHE}vllm/check/*",
    "vLLM scheduler": f"{CACHE}vllm/* experiments/studies/vllm.py",
    "survival": f"{CACHE}policies/eviction/survival.py",
    "adaptive placement": f"{CACHE}policies/placement.py",
    "other evictions": f"{CACHE}policies/eviction/* {CACHE}lab/rivals/evictions.py",
    "admission": f"{CACHE}policies/admission.py {CACHE}scheduling/sessions.py "
    f"{RADIX}client_sessions.py "
    "experiments/studies/admission.py experiments/studies/overload.py",
    "policies of users": f"{CACHE}policies/*",
    "optimum": f"{CACHE}lab/rivals/optimum.py",
    "rebuilt systems": f"{CACHE}lab/rivals/* experiments/studies/peers.py "
    "experiments/studies/yardsticks.py",
    "board of policies": f"{CACHE}lab/board/* experiments/studies/leaderboard.py",
    "traces": f"{CACHE}lab/traces/* {CACHE}adapters/client_habits.py",
    "simulator": f"{CACHE}lab/*",
    "geometry, command": f"{CACHE}geometry/* {CACHE}command/* {CACHE}__main__.py",
    "benchmarks beside others": "experiments/benchmarks/* experiments/run_sharegpt.py",
    "studies, page, reproduction": "experiments/*",
    "start of the engine": "engine/__main__.py engine/setup.py engine/plugins/__init__.py "
    "engine/schedule/__init__.py engine/runner/__init__.py engine/layers/__init__.py",
}
"""Names and patterns of files. A file belongs to the first capability that names it."""
TESTS = {
    "core: the cache with LRU, and scheduling": "radix/test_[aciglorms]* radix/serving.py "
    "radix/twins.py radix/test_tokens.py allocators/* scheduling/test_scheduling.py "
    "plain_cache.py faults/test_cache_faults.py endurance/cache.py",
    "debug caches": "radix/test_debug.py",
    "tiers, restart, warm state": "radix/* engine/plugins/tiers/* endurance/stores.py",
    "disaggregation": "engine/plugins/disaggregation/*",
    "live page": "adapters/watch/* adapters/test_segments.py engine/front/server/test_page*",
    "replicas, routers, events": "adapters/* engine/front/worker/test_fleet.py "
    "engine/front/worker/test_on_ray.py lab/runs/test_fleet.py lab/runs/test_on_ray.py",
    "tensor parallel": "engine/plugins/tensor_parallel/* engine/weights/test_ranks.py",
    "drafts": "engine/plugins/speculation/* engine/drafted.py engine/runner/test_prediction.py "
    "engine/runner/test_verify.py engine/runner/test_head_loading.py",
    "narrow checkpoints": "engine/test_checkpoint_dtype.py kernels/state_copy/*",
    "conversion": "engine/front/command/test_convert.py",
    "grammars": "engine/plugins/guided/*",
    "calls of tools": "engine/front/server/tool_calls/* engine/front/server/test_tools.py "
    "endurance/grammars.py",
    "Responses API": "engine/front/server/endpoints/test_responses.py",
    "Anthropic API": "engine/front/server/endpoints/test_messages.py",
    "explanations": "engine/front/server/endpoints/test_explanations.py",
    "metrics": "engine/front/server/test_grafana.py",
    "recording proxy": "engine/front/command/test_record.py",
    "chats: server, templates, answers": "engine/front/* engine/text/test_outputs.py "
    "endurance/[chfw]* engine/requests/*",
    "GGUF": "gguf_files.py engine/test_gguf_serving.py engine/weights/test_gguf* "
    "engine/weights/gguf* engine/models/test_beside_llama.py kernels/linear/test_blocks.py "
    "kernels/linear/test_groups.py",
    "other quantised files": "engine/weights/forms/*",
    "weights, tokenizers, templates": "engine/weights/* engine/text/*",
    "GPU scripts": "experiments/gpu/*",
    "Kimi Linear": "engine/families/kimi_linear.py kernels/mla/* kernels/launches/mla.py",
    "Jamba": "engine/families/jamba.py",
    "Mamba-2 families": "engine/families/nemotron_h.py engine/families/falcon_h1.py "
    "engine/families/granite_moe_hybrid.py",
    "other families": "engine/families/* engine/models/*",
    "core: the engine with one family": "engine/* faults/* endurance/faults.py endurance/torn.py "
    "oracle.py stub_device.py served.py",
    "kernels": "kernels/*",
    "SGLang backend": "sglang/*",
    "vLLM scheduler": "vllm/*",
    "admission": "policies/test_admission.py scheduling/*",
    "survival": "policies/eviction/test_hazards.py policies/test_regret.py",
    "adaptive placement": "policies/test_placement.py",
    "other evictions": "policies/eviction/* policies/test_promises.py policies/test_session_end.py",
    "policies of users": "policies/*",
    "optimum": "lab/rivals/test_optimum.py",
    "rebuilt systems": "lab/rivals/*",
    "board of policies": "lab/board/*",
    "traces": "lab/traces/*",
    "simulator": "lab/*",
    "geometry, command": "geometry/*",
    "benchmarks beside others": "experiments/benchmarks/* experiments/test_run_sharegpt.py",
    "studies, page, reproduction": "experiments/*",
    "all: house, budget, replay, mutants, endurance": "*",
}
"""Tests of each capability, under ``tests/``, by the same rule. A capability without an entry has
its tests in the files of the one that it extends."""
SUMS = {
    "lines of the core": "lines: core",
    "lines of the product": "lines: ",
    "lines of tests": "tests: ",
}
"""Sums of the prices whose names begin so. They are not stored, so that two changes of different
prices do not conflict."""
COUNTED = tuple(f"{ROOT / package}/" for package in ("hybridcache", "engine", "kernels"))
NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


@cache
def code_lines(file: Path) -> int:
    """Return the lines with code: without docstrings, comments and blank lines."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        text = re.sub(r"/\*.*?\*/|<!--.*?-->", "", text, flags=re.S)
        lines = (line.strip() for line in text.splitlines())
        return sum(bool(line) and not line.startswith("//") for line in lines)
    found, statement = set[int](), list[tokenize.TokenInfo]()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            statement.append(token)
        elif token.type == tokenize.NEWLINE:
            if any(one.type != tokenize.STRING for one in statement):
                for one in statement:
                    found.update(range(one.start[0], one.end[0] + 1))
            statement = []
    return len(found)


def files_of_capabilities(
    table: dict[str, str], *folders: str, below: Path = ROOT
) -> dict[str, list[Path]]:
    """Return the files of each capability of ``table``, whose patterns are of paths below
    ``below``. Raises ValueError if no capability has a file."""
    found: dict[str, list[Path]] = {name: [] for name in table}
    files = (file for folder in folders for file in sorted((below / folder).rglob("*")))
    for file in files:
        path = file.relative_to(below).as_posix()
        if file.suffix not in ENDINGS or "__pycache__" in path or "/levels/" in path:
            continue
        names = (
            name
            for name, patterns in table.items()
            if any(fnmatch.fnmatch(path, pattern) for pattern in patterns.split())
        )
        if (name := next(names, None)) is None:
            raise ValueError(f"{path} belongs to no capability of tests/budget.py")
        found[name].append(file)
    return found


def num_lines() -> dict[str, int]:
    """Return the lines of code of each capability and of its tests, and their sums."""
    product = files_of_capabilities(CAPABILITIES, *PRODUCT)
    tests = files_of_capabilities(TESTS, "", below=STORE.parent)
    found = {
        f"{kind}: {name}": sum(map(code_lines, files))
        for kind, table in (("lines", product), ("tests", tests))
        for name, files in table.items()
    }
    return found | {
        name: sum(number for one, number in found.items() if one.startswith(start))
        for name, start in SUMS.items()
    }


def num_settings() -> int:
    """Return the number of settings of `engine serve`: its flags, and the names of `--set`."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.main(["serve", "--help"])
    flags = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text.getvalue(), re.M))
    names = re.search(r"one of: ([^;]*);", text.getvalue())
    return len(flags - {"--help"}) + (len(names[1].split(",")) if names else 0)


def num_arrows() -> int:
    """Return the pairs of folders or files at the top of ``hybridcache`` of which one imports the
    other."""
    root, pairs = ROOT / "hybridcache", set[tuple[str, str]]()
    for file in root.rglob("*.py"):
        own = file.relative_to(root).parts[0].removesuffix(".py")
        found = re.findall(r"^ *from hybridcache\.(\w+)", file.read_text(), re.M)
        pairs |= {(own, other) for other in found if other != own}
    return len(pairs)


class Walk:
    """Functions that are called from ``start`` to ``stop``, in this thread and in threads that
    began after the object was made."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, int], str] = {}
        """(file, first line) -> qualified name, in the order of the first calls."""
        self.is_open = False
        threading.setprofile(self._note)

    def start(self) -> None:
        self.functions, self.is_open = {}, True
        sys.setprofile(self._note)

    def stop(self) -> int:
        """Return the number of functions."""
        self.is_open = False
        sys.setprofile(None)
        return len(self.functions)

    def _note(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        is_counted = self.is_open and code.co_name not in COMPREHENSIONS
        if is_counted and event == "call" and code.co_filename.startswith(COUNTED):
            place = code.co_filename, code.co_firstlineno
            self.functions.setdefault(place, code.co_qualname)


def cache_walk(walk: Walk) -> int:
    """Count match, lock, allocation, insert and eviction."""
    cache = hybrid(num_slots=4, grid=64, eviction="survival", debug=False)
    walk.start()
    for number in range(6):
        prompt = np.arange(200 + 64 * (number % 2), dtype=np.int32) + 1000 * (number // 2)
        match = cache.match(prompt)
        handle = cache.lock(match.node)
        cache.touch(match)
        publish(cache, prompt, [len(prompt) // 64 * 64], match=match)
        cache.unlock(handle)
    cache.evict(num_tokens=300)
    return walk.stop()


def small_engine() -> Engine:
    config = EngineConfig(cache_gib=0.05, device="cpu", kernels=override_all("reference"), step_s=0)
    return Engine(config)


def generate_walk(walk: Walk) -> int:
    """Count ``Engine.generate`` of one cold prompt of token ids."""
    engine, prompt = small_engine(), list(range(1, 250)) * 2
    engine.generate([prompt], SamplingParams(max_tokens=4))
    walk.start()
    engine.generate([[7, *prompt]], SamplingParams(max_tokens=4))
    return walk.stop()


def chat_walk(walk: Walk) -> int:
    """Count from a POST in this process to the first streamed text. The first step waits until the
    server waits for it; the second for that text, and the text for the second step. So the number
    depends neither on time nor on the tokens that are drawn, whose bytes are known before. The
    least of three chats counts, after two: timers of the server may fire in one."""
    engine, may_step, is_waiting = small_engine(), threading.Event(), threading.Event()
    is_idle, step, run_idle_tasks = threading.Event(), engine.step, engine.run_idle_tasks
    assert engine.tokenizer is not None
    for token_id in range(engine.tokenizer.vocab_size):
        for starts_text in (False, True):
            engine.tokenizer.token_bytes(token_id, starts_text)

    def one_step() -> Any:
        is_idle.clear()
        is_waiting.set()
        may_step.wait()
        is_waiting.clear()
        if walk.is_open:
            may_step.clear()
        return step()

    def idle_tasks() -> float | None:
        rest_s = run_idle_tasks()
        is_idle.set()
        return rest_s

    engine.step, engine.run_idle_tasks = one_step, idle_tasks  # type: ignore[method-assign]

    async def chat(app: Any, text: str) -> None:
        body = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 300}
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")]}
        parts = [{"type": "http.request", "body": json.dumps(body).encode()}]
        arrived = asyncio.Event()

        async def receive() -> Any:
            if not parts:
                await arrived.wait()
            return parts.pop() if parts else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if walk.is_open and re.search(rb'"content": ?"[^"]', message.get("body", b"")):
                is_waiting.wait()
                walk.stop()
                may_step.set()
                arrived.set()

        await asyncio.to_thread(is_idle.wait)
        may_step.clear()
        walk.start()
        answering = asyncio.ensure_future(app(scope, receive, send))
        for _ in range(100):  # The server awaits nothing but its own tasks, and then the step.
            await asyncio.sleep(0)
        may_step.set()
        await answering

    async def chats() -> int:
        app = create_app(AsyncEngine(engine), ServerConfig())
        async with app.router.lifespan_context(app):
            walks = []
            for number in range(5):
                await chat(app, f"{number} Tell me a story.")
                walks.append(walk.functions)
        walk.functions = min(walks[2:], key=len)
        return len(walk.functions)

    return asyncio.run(chats())


def measure(walks: dict[str, dict[tuple[str, int], str]] | None = None) -> dict[str, int]:
    """Return today's numbers. ``walks`` gets the functions of each walk."""
    found, walk = num_lines() | {"settings of engine serve": num_settings()}, Walk()
    found["imports between parts of hybridcache"] = num_arrows()
    try:
        for count in (cache_walk, generate_walk, chat_walk):
            found[f"functions of {count.__name__}"] = count(walk)
            if walks is not None:
                walks[count.__name__] = walk.functions
    finally:
        threading.setprofile(None)
    return found


def compare(found: dict[str, int], budget: dict[str, int]) -> list[str]:
    """Return a line for each number, with its difference from the budget."""
    both = [(name, found.get(name, 0), budget.get(name, 0)) for name in found | budget]
    return [
        f"{name:48} {number:7,} of {most:7,} {number - most:+6,}" for name, number, most in both
    ]


def read_store() -> dict[str, int]:
    """Return the limits. Those of the core and of the product are sums of prices."""
    limits: dict[str, int] = json.loads(STORE.read_text())
    for name, start in SUMS.items():
        limits[name] = sum(price for one, price in limits.items() if one.startswith(start))
    return limits


def rises(prices: dict[str, int]) -> list[str]:
    """Return a line for each price above that of the store, and for more than 20 lines the rule."""
    rule, before = " - more than 20 needs an equal fall or an issue that grants it", read_store()
    more = ((name, price - before.get(name, 0)) for name, price in prices.items())
    return [f"raised by {n:,}: {name}{rule * (n > 20)}" for name, n in more if n > 0]


def main() -> None:
    found = measure()
    if "--update" in sys.argv:
        tens = {
            name: -(-n // 10) * 10 if name[:5] in ("lines", "tests") else n
            for name, n in found.items()
        }
        for name, start in SUMS.items():
            tens[name] = sum(n for one, n in tens.items() if one.startswith(start))
        print(*rises(tens), sep="\n")
        kept = json.dumps({name: tens[name] for name in tens if name not in SUMS}, indent=1)
        STORE.write_text(f"{kept}\n")
        page = PAGE.read_text()
        for name, most in tens.items():
            page = re.sub(rf"^\| {name} \| [\d,]+ \|$", f"| {name} | {most:,} |", page, flags=re.M)
        PAGE.write_text(page)
    limits = read_store()
    print("\n".join(compare(found, limits)))
    if above := [name for name, number in found.items() if number > limits.get(name, 0)]:
        raise SystemExit(f"{len(above)} above the limit, see CONTRIBUTING.md: {'; '.join(above)}")


if __name__ == "__main__":
    main()
