"""Does the server do what its OpenAPI document says? schemathesis (installed apart: ``pip install
schemathesis`` into an environment of its own) makes requests from the document, right ones and
wrong ones, against a server on the oracle; every check of its own is on. A right request may be
answered 400 as well, which it would not have: a document can not say what the tokens of a text are.
A check of ours lets that pass only for a reason in ``REASONS``.

    python -m experiments.system.check_schema --schemathesis PATH/bin/schemathesis --seeds 1,2,3

Each seed is a run of its own, which a line of the results counts as soon as it is over.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.provenance import RESULTS, write_json_lines

REASONS = (
    "maximum context length is",
    "A salt must not contain",
    "names different salts",
    "token ids from 0 to",
    "must be ids from 0 to",
    "token ids must be from",
    "Previous response with id",
    "the prompt is empty",
    "at least 1; 0 requires prompt_logprobs",
    "template rejects",
    "no content to continue",
    "this grammar cannot be used",
    "no answer fits this grammar",
    "can have only one form",
    "no other form of the answer",
    "JSON schema",
    "multipleOf",
    "a grammar must",
    "a regular expression may have",
    "texts, none of them empty",
    "encoded in UTF-8",
    "cannot be combined",
    "must not be above max_tokens",
    "'top_logprobs' requires",
    "are different limits",
    "'stream_options' requires a streamed answer",
    "requires a 'schema'",
    "'json_schema.schema'",
    "'tool_choice'",
    "must be one of",
    "There is no tool",
    "schema can not be",
    "A tool must have",
    "parameters",
    "Send either",
    "continues the last message",
    "continues an answer",
    "answers are more than the queue",
    "more than",
    "The last message is the assistant's",
    "tool_use",
    "must be in a message of",
    "supports text only",
    "is not served",
    "is not supported",
    "must not have other fields",
    "'input' is empty",
    "are not served",
    "are not supported",
    "must follow",
    "grammar",
)
"""Parts of sentences that refuse what the document allows."""
SETTINGS = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", "400", "404", "429"]
"""
HOOKS = """
import schemathesis
from schemathesis import GenerationMode

REASONS = {reasons!r}


@schemathesis.check
def a_right_request_is_refused_for_what_it_says(ctx, response, case):
    mode = case.meta.generation.mode if case.meta is not None else None
    if mode == GenerationMode.POSITIVE and response.status_code == 400:
        error = response.json()["error"]["message"]
        assert any(reason in error for reason in REASONS), error
"""


@contextlib.contextmanager
def oracle_server() -> Iterator[str]:
    """A server on a runner that computes nothing; its address."""
    from engine import Engine, EngineConfig
    from engine.testing.oracle import OracleRunner
    from engine.testing.oracle_sampler import OracleSampler
    from engine.text.tokenizer import ByteTokenizer
    from experiments.system.served import serving

    engine = Engine(
        EngineConfig(max_queue=256),
        runner=OracleRunner(16_384, 32, max_model_len=512),
        sampler=OracleSampler(),
        tokenizer=ByteTokenizer(),
    )
    with serving(engine) as (_, port):
        yield f"http://127.0.0.1:{port}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--schemathesis", default="schemathesis", help="the program")
    parser.add_argument("--examples", type=int, default=300, help="of each operation and phase")
    parser.add_argument("--phases", default="examples,coverage,fuzzing")
    parser.add_argument("--only", help="only operations with a path that matches this expression")
    parser.add_argument("--seeds", default="1", help="such as 1,2,3; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS / "check_schema.jsonl")
    options = parser.parse_args()
    runs = []
    for seed in map(int, options.seeds.split(",")):
        runs.append(check(options, seed))
        num_cases = sum(run["cases"] for run in runs)
        num_failures = sum(run["exit"] != 0 for run in runs)
        total = {"runs": len(runs), "cases": num_cases, "runs_with_findings": num_failures}
        print(json.dumps(total), flush=True)
        write_json_lines(options.out, [total, *runs])
    return int(num_failures > 0)


def check(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run schemathesis once, and return its result."""
    with tempfile.TemporaryDirectory() as folder, oracle_server() as address:
        report, hooks = Path(folder) / "report.json", Path(folder) / "schema_hooks.py"
        (Path(folder) / "schemathesis.toml").write_text(SETTINGS)
        hooks.write_text(HOOKS.format(reasons=REASONS))
        command = [options.schemathesis, "run", f"{address}/openapi.json", "--checks", "all"]
        command += ["--continue-on-failure"]
        command += ["--phases", options.phases, "--max-examples", str(options.examples)]
        command += ["--seed", str(seed), "--report-json-path", str(report), "--no-color"]
        command += ["--suppress-health-check", "all", "--max-failures", "60", "--warnings", "off"]
        command += ["--request-timeout", "30", "--exclude-path-regex", "/v1/cache/events"]
        if options.only:
            command += ["--include-path-regex", options.only]
        places = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": places, "SCHEMATHESIS_HOOKS": "schema_hooks"}
        code = subprocess.run(command, env=environment, cwd=folder).returncode
        found = json.loads(report.read_text()) if report.exists() else {}
    cases = found.get("test_cases", {})
    return {
        "seed": seed,
        "exit": code,
        "schemathesis": found.get("schemathesis_version"),
        "operations": found.get("operations", {}).get("tested", 0),
        "cases": cases.get("generated", 0),
        "failures": cases.get("unique_failures", 0),
        "errors": cases.get("errored", 0),
        "seconds": round(found.get("running_time", 0)),
        "phases": {name: phase["status"] for name, phase in found.get("phases", {}).items()},
    }


if __name__ == "__main__":
    sys.exit(main())
