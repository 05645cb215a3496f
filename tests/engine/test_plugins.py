"""Tests of the engine's interfaces for plugins, logit rules and dialects."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import json, sys
def loaded():
    parts = [m.split(".") for m in sys.modules if m.startswith("engine.plugins.")]
    return sorted({part[2] for part in parts if len(part) > 3})  # not for settings only
from engine import Engine, EngineConfig, SamplingParams
engine = Engine(EngineConfig(cache_gib=0.02, max_running=2))
engine.generate(["one"], SamplingParams(max_tokens=2))
seen = [loaded()]
has_triton = "triton.language" in sys.modules
from engine.front.async_engine import AsyncEngine
from engine.front.command import cli
from engine.front.server import app
from engine.front.server.settings import ServerConfig
cli._parser(["serve"])
app.Access(ServerConfig())
seen.append(loaded())
print(json.dumps([*seen, has_triton]))
"""


def test_plugins_and_triton_are_imported_at_first_use() -> None:
    """Check that neither an engine nor a server loads a plugin without its settings."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    of_engine, of_server, has_triton = json.loads(done.stdout.splitlines()[-1])
    assert of_engine == [] and not has_triton
    assert of_server == []
