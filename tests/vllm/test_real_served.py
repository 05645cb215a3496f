"""``vllm serve`` over HTTP with our scheduler: front end, engine core and worker in processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.real_engine import words, write_model

PATIENCE_S = 400
"""Time for the start. It takes half a minute on two idle cores."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command: list[str | Path] = [Path(sys.executable).with_name("vllm"), "serve"]
    command += [write_model(folder / "model"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "tiny", "--dtype", "bfloat16", "--enforce-eager"]
    command += ["--max-model-len", "2048", "--max-num-batched-tokens", "512", "--max-num-seqs", "8"]
    command += ["--num-gpu-blocks-override", "60", "--prefix-match-unit", "64"]
    command += ["--scheduler-cls", "hybridcache.vllm.HybridScheduler"]
    command += ["--additional-config", '{"hybridcache": {"placement": "adaptive"}}']
    command += ["--enable-prompt-tokens-details"]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(folder / "counters"),
    }
    (folder / "counters").mkdir()
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE_S
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                ended = process.poll() is not None
                assert not ended and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def post(url: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"model": "tiny", "temperature": 0, **body}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        found: dict[str, Any] = json.load(response)
        return found


def cached(answer: dict[str, Any]) -> int:
    details = answer["usage"]["prompt_tokens_details"]
    return 0 if details is None else details["cached_tokens"]


def test_a_chat_hits_its_own_answers(server: str) -> None:
    """The second turn resumes inside the first one's answer, the repeated prompt before its end."""
    source = words(11)
    prompt = [*islice(source, 500)]
    ask = {"max_tokens": 90, "ignore_eos": True, "return_token_ids": True}
    first = post(f"{server}/v1/completions", prompt=prompt, **ask)
    assert cached(first) == 0
    answer = first["choices"][0]["token_ids"]
    assert len(answer) == 90
    second = post(f"{server}/v1/completions", prompt=[*prompt, *answer, *islice(source, 40)], **ask)
    assert cached(second) == 576  # The last multiple of 64 before 590.
    again = post(f"{server}/v1/completions", prompt=prompt, **ask)
    assert 0 < cached(again) < 500
    assert again["choices"][0]["token_ids"] == answer


def test_chat_messages_and_metrics(server: str) -> None:
    text = " ".join(f"w{token}" for token in islice(words(12), 300))
    messages = [{"role": "user", "content": text}]
    counts = [
        cached(post(f"{server}/v1/chat/completions", messages=messages, max_tokens=4))
        for _ in range(2)
    ]
    assert counts[0] == 0 and counts[1] >= 192
    with urllib.request.urlopen(f"{server}/metrics", timeout=30) as response:
        metrics = response.read().decode()

    def counted(name: str) -> float:
        line = next(one for one in metrics.splitlines() if one.startswith(name))
        return float(line.split()[-1])

    hits = counted("vllm:prefix_cache_hits_tot")
    assert hits >= 576 + counts[1]
    assert counted('hybridcache_prompt_tokens_total{cause="cached"') == hits
