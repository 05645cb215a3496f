"""Tests of README and documentation: code blocks run, links have targets, the reference is
complete."""

from __future__ import annotations

import importlib.util
import inspect
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import httpx
import pytest

import engine
import hybridcache
from engine import Engine, EngineConfig
from engine.models import families
from experiments.studies import headroom
from experiments.studies.headroom import FACTS
from hybridcache import CacheConfig
from hybridcache.adapters.routing.registry import ROUTERS
from hybridcache.lab.results.report import METRICS
from hybridcache.lab.results.result import RequestRecord
from hybridcache.lab.rivals.evictions import ALL_NAMES
from hybridcache.lab.rivals.systems import BASELINES
from hybridcache.lab.runs.fleet import FleetConfig
from hybridcache.lab.traces import READERS
from hybridcache.lab.traces.generators import GENERATORS
from hybridcache.policies.placement import ANSWER_END, BACK, HEAD, REJOIN
from hybridcache.policies.registry import ADMISSION_NAMES, EVICTION_NAMES, PLACEMENT_NAMES
from hybridcache.scheduling.planner import StepPlanner
from tests import documents, served
from tests.documents import ROOT
from tests.refused import refused

README = ROOT / "README.md"
LAB = ROOT / "hybridcache/lab/README.md"
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "packages")
PAGES = [README, *DOCS]
PACKAGES = [
    path
    for folder in ("engine", "hybridcache", "kernels")
    for path in sorted((ROOT / folder).rglob("README.md"))
]
"""README files of the packages."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a server with the built-in model."""
    with served.serving(Engine(EngineConfig(cache_gib=0.125))) as (_, port):
        yield f"http://127.0.0.1:{port}"


API = {*(ROOT / "docs" / "reference").glob("api*.md")}
"""Page of docstrings, whose examples run as doctests of their modules."""


@pytest.mark.parametrize(
    "page",
    [*(page for page in PAGES if page not in API), pytest.param(LAB, marks=pytest.mark.full)],
    ids=name_of,
)
def test_code_blocks_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    server = request.getfixturevalue("server") if documents.needs_server(page) else None
    documents.run(page, tmp_path, server)


@pytest.mark.parametrize("page", [*PAGES, *PACKAGES], ids=name_of)
def test_links_have_targets(page: Path) -> None:
    assert documents.broken_links(page) == []


@pytest.mark.parametrize("page", PACKAGES, ids=name_of)
def test_commands_on_package_pages_exist(page: Path) -> None:
    for block in documents.blocks(page):
        if block.language == "sh":
            documents.check_command(block.text)


def test_readme_is_short_and_every_column_of_a_table_has_a_heading() -> None:
    assert len(README.read_text().splitlines()) <= 120
    for page in PAGES:
        heads = re.findall(r"^(\|.*\|)\n\| ?-", page.read_text(), re.MULTILINE)
        empty = [head for head in heads if re.search(r"\|\s*\|", head)]
        assert empty == [], page


def test_readme_counts_policies_and_rebuilt_systems() -> None:
    counts = f"{len(ALL_NAMES)} eviction policies, {len(BASELINES)} configurations of rebuilt"
    assert counts in README.read_text()


@pytest.mark.parametrize("page", sorted((ROOT / "docs/tutorials").glob("*.md")), ids=name_of)
def test_tutorials_say_how_long_they_take(page: Path) -> None:
    """At 190 words a minute."""
    minutes = math.ceil(len(page.read_text().split()) / 190)
    said = ("Zero", "One", "Two", "Three", "Four", "Five", "Six")[minutes]
    assert re.search(rf"^{said} minutes to read", page.read_text(), re.M)


def test_each_family_has_names_to_copy_and_each_variable_a_row() -> None:
    how_to, models = ROOT / "docs/how-to", (ROOT / "docs/engine/models.md").read_text()
    models = models.partition("\n## ")[0]
    names = (how_to / "which-model.md").read_text()
    listed = re.findall(r"^\| `.*\| ([A-Z][\w.-]*(?: (?:\d|[A-Z]\w+))?)(?=[ ,])", models, re.M)
    assert len(listed) == 10
    for family in listed:
        [row] = re.findall(rf"^\| {family}[ ,].*\|$", names, re.M)
        assert re.search(r"`[\w.-]+/[\w.-]+`", row) and re.search(r"-GGUF:Q\w+`|none", row)
    variables = {*re.findall(r'"(HYBRIDCACHE_[A-Z_]+)"', "\n".join(sources("engine", "kernels")))}
    assert variables <= {*re.findall(r"^\| `(\w+)`", (how_to / "deploy.md").read_text(), re.M)}


def sources(*folders: str) -> Iterator[str]:
    for folder in folders:
        yield from (file.read_text() for file in ROOT.glob(f"{folder}/**/*.py"))


def test_quoted_symptoms_are_texts_of_the_sources() -> None:
    texts = "\n".join(sources("engine", "kernels", "hybridcache"))
    texts = re.sub(r'"\s*\n\s*f?"', "", texts)
    page = (ROOT / "docs/how-to/troubleshooting.md").read_text()
    symptoms = re.findall(
        r"`([^`]+)`", "\n".join(re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE))
    )
    parts = [part.strip() for symptom in symptoms for part in symptom.split("...")]
    assert len(parts) > 20 and [part for part in parts if part not in texts] == []


def test_readme_policy_can_be_simulated(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(# mine\.py\n.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(block)
    command = [Path(sys.executable).with_name("hybridcache"), "simulate", "--trace", "short"]
    command += ["--model", "qwen3-next", "--gib", "1,2", "--policy", "lru,mine:CheapestFirst"]
    command += ["--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine:CheapestFirst" in done.stdout


@pytest.mark.full
def test_tutorials_and_policies_pass_strict_type_checks(tmp_path: Path) -> None:
    """As files of a user, whose type checker reads the annotations of the installed package."""
    for name in ("embed-the-cache", "own-policy"):
        page = (ROOT / f"docs/tutorials/{name}.md").read_text()
        for name, text in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", page, re.DOTALL):
            (tmp_path / name).write_text(text)
    files = [*tmp_path.glob("*.py"), *(ROOT / "examples/policies").glob("*.py")]
    assert {"toy.py", "second_chance.py"} <= {path.name for path in files}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--follow-imports=silent",
    ]
    done = subprocess.run(
        [*command, f"--cache-dir={tmp_path}", *map(str, files)],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# --- The reference ------------------------------------------------------------------------------


def reference(name: str) -> str:
    return (ROOT / "docs" / "reference" / f"{name}.md").read_text()


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    """The generator of the reference."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["generate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documented_endpoints_match_the_server(server: str) -> None:
    served = {
        f"{verb.upper()} {path}"
        for path, verbs in httpx.get(f"{server}/openapi.json").json()["paths"].items()
        for verb in verbs
    }
    documented = set(re.findall(r"`((?:GET|POST|DELETE) [^`]+)`", reference("http")))
    assert documented - {"GET /"} == served


def test_server_metrics_are_documented(server: str) -> None:
    lines = httpx.get(f"{server}/metrics").text
    assert "_created" not in lines
    served = set(re.findall(r"^# HELP (\w+) ", lines, re.MULTILINE))
    documented = reference("metrics")
    assert served <= set(re.findall(r"`(engine_\w+)`", documented))
    assert not [name for name in METRICS if f"| `{name}` |" not in documented]


@pytest.mark.parametrize(
    "name", [*(path.stem for path in sorted(API)), "cli", "metrics", "policies", "traces"]
)
def test_lists_of_the_reference_are_up_to_date(
    name: str, generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = reference(name)
    assert generate.LIST.search(page)
    of_tests = CacheConfig.__init__.__defaults__ or ()  # with debug=True, see conftest.py
    monkeypatch.setattr(CacheConfig.__init__, "__defaults__", (*of_tests[:-1], False))
    assert page == generate.insert(page), "run: python docs/generate.py"


def test_reference_has_every_option_policy_and_name() -> None:
    cli = reference("cli")
    assert {"## engine serve", "## hybridcache trace stats"} <= set(cli.splitlines())
    for option in ("--cache-gib", "--admission", "--closed-loop", "--write-scenario FILE", "--to"):
        assert f"`{option}" in cli
    policies = reference("policies")
    for names in (EVICTION_NAMES, PLACEMENT_NAMES, ADMISSION_NAMES):
        assert [name for name in names if f"| `{name}` " not in policies] == []
    api = "".join(path.read_text() for path in sorted(API))
    assert {f"### {name}\n" in api for name in (*hybridcache.__all__, *engine.__all__)} == {True}
    for name in ("SimulationResult", "OptimumResult", "ClosedLoopResult", "board"):
        assert re.search(rf"^### hybridcache\.[\w.]+\.{name}$", api, re.MULTILINE), name
    loop = inspect.getdoc(StepPlanner) or ""
    for module, name in re.findall(r"^>>> from (hybridcache\.\S+) import (\w+)$", loop, re.M):
        assert f"### {module}.{name}\n" in api, "a docstring imports a name without a reference"
    for name in ("EventStream", "Router", "RequestFields"):
        assert re.search(rf"^### hybridcache\.[\w.]+\.{name}$", api, re.MULTILINE), name
    assert "- `max_running`: most running requests." in api
    assert all(f"`{column}`" in api for column in ("control_us", "seconds_saved", "lost_refused"))


def test_pages_of_the_api_are_short_and_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    for page in API:
        assert len(page.read_text().split()) <= 3_500, page.name
        assert f"\nreference/{page.stem}\n" in index


@pytest.mark.parametrize(
    "page",
    [
        "docs/tutorials/embed-the-cache.md",
        "docs/how-to/embed.md",
        "README.md",
        "examples/04_minimal_engine.py",
    ],
)
def test_embedding_pages_import_only_public_names(page: str, generate: ModuleType) -> None:
    found = re.findall(
        r"^(?:>>> )?from (hybridcache\S*) import (\([^)]*\)|.*)", (ROOT / page).read_text(), re.M
    )
    assert found
    for module, names in found:
        public = hybridcache.__all__ if module == "hybridcache" else generate.STEPS[module]
        assert {*re.findall(r"\w+", names)} <= {*public}


@pytest.mark.parametrize(
    ("names", "page"),
    [
        (READERS, "traces"),
        (GENERATORS, "traces"),
        (BASELINES, "simulator"),
        (ROUTERS, "simulator"),
        ([one.name for one in fields(FleetConfig)], "simulator"),
        (families(), "../engine/models"),
        ((ANSWER_END[0], BACK, HEAD, REJOIN), "../concepts/placement"),
        (RequestRecord._fields, "../how-to/explain-a-difference"),
        ([name for name, of in vars(headroom).items() if of in FACTS], "../results-headroom"),
    ],
    ids=[
        "readers",
        "generators",
        "baselines",
        "routers",
        "fleets",
        "families",
        "labels",
        "columns",
        "facts",
    ],
)
def test_registered_names_are_in_the_reference(names: Iterable[str], page: str) -> None:
    documented = set(re.findall(r"`([\w-]+)`", reference(page)))
    assert set(names) - documented == set()


def test_a_report_without_its_packages_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docutils.core", None)
    said = refused(
        "needs pip install -e .*docs.*Pango",
        runpy.run_path,
        f"{ROOT}/docs/printable.py",
        kind=SystemExit,
    )
    assert "docutils.core" in said
