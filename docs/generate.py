"""Generate the parts of the reference that follow from the code: commands, policies, API.

They are part of the pages, between two comments. After a change of a docstring, an option or a
policy, write them again; ``tests/test_readme.py`` compares.

    python docs/generate.py            # write all pages of docs/reference
    python docs/generate.py cli        # print one part
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hybridcache
import hybridcache.allocators.pools
import hybridcache.radix.api
import hybridcache.radix.tree
import hybridcache.scheduling.request
from hybridcache.command.field_texts import FieldTexts, class_body, documented

PAGES = Path(__file__).resolve().parent / "reference"
GENERATED = (*sorted(PAGES.glob("*.md")), PAGES.parent / "how-to/agents.md")
"""Pages with such parts."""
LIST = re.compile(r"^<!-- list: ([\w-]+) -->\n.*?^<!-- end of list -->$", re.MULTILINE | re.DOTALL)


def insert(page: str) -> str:
    """Return ``page`` with each part between "list: NAME" and "end of list" generated again."""
    return LIST.sub(
        lambda found: (
            f"<!-- list: {found[1]} -->\n\n{PARTS[found[1]]().strip()}\n\n<!-- end of list -->"
        ),
        page,
    )


# --- Commands -----------------------------------------------------------------------------------


class _Found(Exception):
    """Exception with the parser that a command builds."""


def _parser_of(
    main: Callable[[list[str]], int], words: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """Return the parser that ``main`` makes to read ``words``, or that of the command they name.

    A program may add the options of a command only if the command is among its arguments.
    """
    original = argparse.ArgumentParser.parse_known_args

    def give(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Found(self)

    argparse.ArgumentParser.parse_known_args = give  # type: ignore[assignment, method-assign]
    try:
        main([*words])
    except _Found as found:
        parser: argparse.ArgumentParser = found.args[0]
        for word in words:
            choices = (a.choices for a in parser._actions if a.nargs == argparse.PARSER)
            parser = next(dict(choice)[word] for choice in choices if choice)
        return parser
    finally:
        argparse.ArgumentParser.parse_known_args = original  # type: ignore[method-assign]
    raise TypeError("The program parsed its arguments without argparse.")


def _commands(
    parser: argparse.ArgumentParser, name: str, help: str
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield (name, description, parser) of every command without subcommands."""
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not subparsers:
        yield name, parser.description or help, parser
    for action in subparsers:
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for verb, sub in action.choices.items():
            yield from _commands(sub, f"{name} {verb}", helps.get(verb, ""))


def _cell(text: str) -> str:
    """Escape ``text`` for a cell of a table."""
    return _escape(" ".join(text.split())).replace("|", "\\|")


def _escape(text: str) -> str:
    """Escape special characters of Markdown, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*") for part in parts[::2]]
    return "".join(parts)


def _option(action: argparse.Action, parser: argparse.ArgumentParser) -> tuple[str, str]:
    """Return one option's names with its value, as code, and its meaning with its default."""
    formatter = argparse.HelpFormatter(parser.prog)
    value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
    names = list(action.option_strings) or [str(action.metavar or action.dest)]
    if action.option_strings and action.nargs != 0:
        names[-1] += f" {value}"
    shown = ", ".join(f"`{_code(name)}`" for name in names)
    help = (action.help or "") % {
        **{key: val for key, val in vars(action).items() if key != "help"},
        "prog": parser.prog,
    }
    default = action.default
    is_stated = default in (None, False, argparse.SUPPRESS, (), [], "") or "default" in help
    if not is_stated:
        help += f" (default: {default})"
    return shown, help


def cli() -> str:
    """Return every command with its options; those of `engine serve` once."""
    from engine.front.command.cli import main as engine
    from hybridcache.lab.cli import main as laboratory

    parts, printed = list[str](), set[tuple[str, str]]()
    for program, main in (("engine", engine), ("hybridcache", laboratory)):
        for name, description, _ in _commands(_parser_of(main), program, ""):
            parser = _parser_of(main, name.split()[1:])
            parts.append(f"## {name}\n\n{_cell(description)}\n")
            shared = []
            for group in parser._action_groups:
                actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
                actions = [a for a in actions if not isinstance(a, argparse._HelpAction)]
                if not actions:
                    continue
                title = group.title or "options"
                rows = [_option(action, parser) for action in actions]
                if program == "engine":
                    own = [row for row in rows if row not in printed]
                    shared += [row[0] for row in rows if row in printed]
                    printed, rows = printed | {*own}, own
                if not rows:
                    continue
                lines = [f"| {shown} | {_cell(help)} |" for shown, help in rows]
                parts.append("\n".join([f"| {_cell(title)} | meaning |", "|---|---|", *lines, ""]))
            if shared:
                parts.append(f"As in an earlier command: {', '.join(shared)}.\n")
    return "\n".join(parts)


def agents() -> str:
    """Return the file of each coding agent for the server of the page."""
    from engine.front.command.remote import PLACES, settings

    parts = []
    for agent, place in PLACES.items():
        text = settings(agent, "http://127.0.0.1:8000", "NAME", 131072, None)
        parts.append(f"`~/{place}`:\n\n```{Path(place).suffix[1:]}\n{text}```\n")
    return "\n".join(parts)


def _code(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- Policies -----------------------------------------------------------------------------------


def _table(words: Mapping[str, Any]) -> str:
    lines = ["| name | takes | policy |", "|---|---|---|"]
    for name, word in words.items():
        number = f"`{name}:N`, N: {word.counts}" if word.counts else ""
        policy = word.make.args[0] if isinstance(word.make, partial) else word.make
        lines.append(f"| `{name}` | {number} | {_cell(_plain(_first(policy)))} |")
    return "\n".join(lines) + "\n"


def eviction() -> str:
    """Return the eviction policies."""
    from hybridcache.policies.registry import EVICTION_NAMES

    return _table(EVICTION_NAMES)


def lab_eviction() -> str:
    """Return the eviction policies of simulations only."""
    from hybridcache.lab.rivals.evictions import LAB_NAMES

    return _table(LAB_NAMES)


def placement() -> str:
    """Return the placement policies."""
    from hybridcache.policies.registry import PLACEMENT_NAMES

    return _table(PLACEMENT_NAMES)


def admission() -> str:
    """Return the admission policies."""
    from hybridcache.policies.registry import ADMISSION_NAMES

    return _table(ADMISSION_NAMES)


def rules() -> str:
    """Return the rules and constants of the default pair, from their docstrings."""
    from hybridcache.policies import placement
    from hybridcache.policies.eviction import survival

    rows = []
    for word, policy in (("adaptive", placement.Adaptive), ("survival", survival.Survival)):
        module = sys.modules[policy.__module__]
        rows += [
            (f"*{name}*", word, text[0].upper() + text[1:])
            for name, text in re.findall(
                r"^- \*(.+?)\*: (.+?)(?=^\S|\Z)", _written(policy), re.MULTILINE | re.DOTALL
            )
        ]
        rows += [
            (f"`{name}` = {vars(module)[name]:g}", word, text)
            for name, _, text in documented(ast.parse(inspect.getsource(module)).body)
            if text and isinstance(vars(module)[name], int | float)
        ]
    lines = [f"| {name} | `{word}` | {_cell(_plain(text))} |" for name, word, text in rows]
    return "\n".join(["| rule or constant | policy | meaning |", "|---|---|---|", *lines, ""])


# --- Metrics ------------------------------------------------------------------------------------


def metrics() -> str:
    """Return the metrics of a server whose engine has a host tier and a state folder."""
    from engine import Engine, EngineConfig
    from engine.front.server.metrics import TRANSFERS, Metrics

    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(cache_gib=0.05, host_gib=0.05, state_dir=folder, disk_gib=0.1)
        engine = Engine(config)
        text = Metrics(os.getpid()).render(engine.report()).decode()
        engine.close()
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)", text, re.MULTILINE))
    found = re.findall(r"^# HELP (\w+) (.*)", text, re.MULTILINE)
    rows = [(name, kinds[name], help) for name, help in found]
    rows += [
        (f"engine_{name}_total", "counter, with `--role`", help) for name, _, help in TRANSFERS
    ]
    lines = [f"| `{name}` | {kind} | {_cell(help)} |" for name, kind, help in rows]
    return "\n".join(["| metric | type | meaning |", "|---|---|---|", *lines, ""])


def measures() -> str:
    """Return the metrics of the simulator."""
    from hybridcache.lab.results.report import METRICS

    rows = [f"| `{name}` | {_cell(metric.title)} |" for name, metric in METRICS.items()]
    return "\n".join(["| metric | figure |", "|---|---|", *rows, ""])


def generators() -> str:
    """Return the generators of traces."""
    from hybridcache.lab.traces.generators import GENERATORS

    rows = []
    for name, make in GENERATORS.items():
        options = ", ".join(f"`{option}`" for option in inspect.signature(make).parameters)
        rows.append(f"| `{name}` | {_cell(_plain(_first(make)))} | {options} |")
    return "\n".join(["| generator | trace | options |", "|---|---|---|", *rows, ""])


# --- Library ------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Return a docstring with single backticks, as Markdown has them."""
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


def _written(thing: Any) -> str:
    """Return the docstring of ``thing`` without the fields that ``help`` adds."""
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else None
    return inspect.cleandoc(own.own) if isinstance(own, FieldTexts) else inspect.getdoc(thing) or ""


def _first(thing: Any) -> str:
    """Return the first paragraph of a docstring."""
    return _written(thing).split("\n\n")[0]


SECTION = re.compile(r"(Args|Raises|Returns|Yields):\n")


def _body(thing: Any) -> str:
    """Return a docstring as Markdown: paragraphs, lists of arguments and errors, doctests as
    code."""
    parts = []
    for part in _written(thing).split("\n\n"):
        section = SECTION.match(part)
        if part.lstrip().startswith(">>>"):
            parts.append(f"```python\n{textwrap.dedent(part)}\n```")
        elif section is not None:
            items = re.split(r"\n(?=\S)", textwrap.dedent(part[section.end() :]))
            lines = (" ".join(item.split()).partition(": ") for item in items)
            listed = (f"- `{name}`: {_escape(_plain(text))}" for name, _, text in lines)
            parts.append(f"{section[1]}:\n\n" + "\n".join(listed))
        else:
            parts.append(_escape(_plain(part)))
    return "\n\n".join(parts)


LIMITED = re.compile(r"\"?Annotated\[(.*?), (?:[A-Z_]+|Limits\(.*?\))\]\"?")
"""Annotation of a setting with limits. The reference shows its type."""


def _signature(thing: Any) -> str:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"ForwardRef\((['\"])(.+?)\1\)", r"\2", str(signature))
    text = LIMITED.sub(r"\1", text)
    text = re.sub(r"(: |-> )'(.+?)'", r"\1\2", text)  # annotations are strings, defaults stay
    text = re.sub(r"<function \S+ at 0x\w+>", "<function>", text)
    text = re.sub(r"^\((?:self|cls)(?:, )?", "(", text)
    return text.removesuffix(" -> None") if inspect.isclass(thing) else text


def _fields(thing: type) -> Iterator[tuple[str, str]]:
    """Yield the fields and attributes of a class, with their types, and the strings that follow
    them, or the help of their flags. An attribute of ``__init__`` is public with such a string."""
    body, known = class_body(thing), getattr(thing, "__dataclass_fields__", {})
    for name, kind, text in documented(body):
        if kind and name not in INTERNAL:
            text = text or (known[name].metadata.get("help", "") if name in known else "")
            yield f"{name}: " + LIMITED.sub(r"\1", kind), _plain(text)
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for name, _, text in documented(node.body, "self"):
                if text:
                    yield name, _plain(text)


INTERNAL = {"rows_moved", "steps"}
"""Public members that only the cache itself calls."""


def _members(thing: type) -> dict[str, Any]:
    """Return the public methods and properties that a class defines, itself or in a base without a
    public name."""
    found, bases = {}, [base for base in thing.__mro__[1:] if base.__name__.startswith("_")]
    for name, value in (pair for one in (*bases, thing) for pair in vars(one).items()):
        raw = getattr(value, "__func__", value)
        is_member = inspect.isfunction(getattr(raw, "fget", raw))  # No field that is computed.
        if is_member and not name.startswith("_") and name not in INTERNAL:
            found[name] = raw
    return found


def _class(name: str, thing: type) -> str:
    parts = [f"### {name}"]
    text = _body(thing)
    is_made_by_users = not (getattr(thing, "_is_protocol", False) or "Made by" in text)
    if is_made_by_users:
        parts.append(f"`{name.rpartition('.')[2]}{_signature(thing)}`")
    parts.append(text)
    init = vars(thing).get("__init__")
    if is_made_by_users and inspect.isfunction(init) and init.__doc__:
        parts.append(_body(init))
    described = {*hybridcache.__all__, "WaitingRequest"}
    bases = [base.__name__ for base in thing.__bases__ if base.__name__ in described]
    if bases:
        parts.append(f"It has the members of {' and '.join(f'`{base}`' for base in bases)}.")
    rows = [
        f"| `{_code(field)}` | {_cell(help)} |"
        for field, help in (*_fields(thing), *_properties(thing))
    ]
    if rows:
        parts.append("\n".join(["| attribute | meaning |", "|---|---|", *rows]))
    for member, raw in _members(thing).items():
        if not isinstance(raw, property):
            title = f"#### {name.rpartition('.')[2]}.{member}"
            parts += [title, f"`{member}{_signature(raw)}`", _body(raw)]
    return "\n\n".join(parts)


def _properties(thing: type) -> Iterator[tuple[str, str]]:
    """Yield the properties of a class, with their types, and their docstrings."""
    for name, raw in _members(thing).items():
        if isinstance(raw, property):
            kind = _signature(raw.fget).rpartition(" -> ")[2]
            yield f"{name}: {kind}", _plain(inspect.getdoc(raw) or "")


OTHER = "Types in these signatures"
SECTIONS = (
    ("Settings", ("engine.config", "engine.front.server.settings")),
    ("Engine", "engine"),
    ("Cache", "hybridcache.radix.cache"),
    ("Leases", "hybridcache.radix.lease"),
    ("Policies", ("hybridcache.policies", "hybridcache.radix")),
    ("Simulator", "hybridcache.lab"),
    ("Model sizes and times", "hybridcache.geometry"),
)
"""Sections with prefixes of modules. The first match counts; other names belong to the cache."""


@cache
def api() -> dict[str, list[str]]:
    """Return the public names of ``hybridcache`` and ``engine`` with their docstrings, by
    section."""
    import engine

    parts: dict[str, list[str]] = {"Cache": []}
    names = [(package, name) for package in (hybridcache, engine) for name in package.__all__]
    for package, name in sorted(names, key=lambda one: (one[0] is engine, one[1])):
        thing = getattr(package, name)
        module = getattr(thing, "__module__", "hybridcache.lab")
        title = next((title for title, prefix in SECTIONS if module.startswith(prefix)), "Cache")
        if not module.startswith(("hybridcache", "engine")) and not isinstance(thing, Mapping):
            text = f"### {name}\n\n`{_code(str(thing))}`"
        elif inspect.isclass(thing):
            text = _class(name, thing)
        elif callable(thing):
            text = f"### {name}\n\n`{name}{_signature(thing)}`\n\n{_body(thing)}"
        else:
            known = ", ".join(f"`{key}`" for key in thing) if isinstance(thing, Mapping) else ""
            text = f"### {name}\n\n{known or _cell(str(thing))}"
        parts.setdefault(title, []).append(text)
    parts["Boundaries, statistics, step plans, loads"] = _listed(STEPS)
    parts["Scheduling"] = _listed(SCHEDULING)
    parts["Events and routing"] = _listed(EVENTS)
    parts["Restart"] = _listed(RESTART)
    parts["Results and figures"] = _results()
    parts["Leaderboard"] = _listed(LEADERBOARD)
    parts[OTHER] = _others("\n".join(text for texts in parts.values() for text in texts))
    return parts


API_PAGES = {
    "cache": ("Cache",),
    "lease": ("Leases", "Restart"),
    "types": ("Boundaries, statistics, step plans, loads", OTHER),
    "policies": ("Policies",),
    "scheduling": ("Scheduling",),
    "adapters": ("Events and routing",),
    "simulator": ("Simulator", "Model sizes and times", "Leaderboard"),
    "results": ("Results and figures",),
    "engine": ("Engine",),
    "settings": ("Settings",),
}
"""Pages ``api-NAME.md`` and their sections."""


def api_page(name: str) -> str:
    """Return the sections of one page."""
    return "\n\n".join(f"## {title}\n\n" + "\n\n".join(api()[title]) for title in API_PAGES[name])


def api_index() -> str:
    """Return a table of the pages and their names."""
    rows = []
    for page, titles in API_PAGES.items():
        found = re.findall(
            r"^### (\S+)", "\n".join("\n".join(api()[title]) for title in titles), re.M
        )
        names = ", ".join(f"`{name.rpartition('.')[2]}`" for name in found)
        rows.append(f"| [{page}](api-{page}.md) | {names} |")
    return "\n".join(["| page | names |", "|---|---|", *rows])


STEPS = {
    "hybridcache.allocators.moves": ("Move", "Copy", "Drop", "RowWrite", "StepMemory"),
    "hybridcache.radix.api": ("CacheStats", "Losses", "Listener"),
    "hybridcache.radix.offload": ("path_of", "Exchange", "PrefillTimes"),
    "hybridcache.radix.protocol": ("PromptBoundaries", "LoadRule", "PolicyError"),
}
"""Names of boundaries and results, and for an engine with an arena or tiers."""

SCHEDULING = {
    "hybridcache.scheduling.planner": ("StepPlanner", "AdmissionReport"),
    "hybridcache.scheduling.loading": ("Loader", "PrefixLoad"),
    "hybridcache.scheduling.cache_manager": (
        "CacheManager",
        "MemorySizes",
    ),
    "hybridcache.scheduling.request": ("ScheduledRequest", "RequestFields", "AdmissionPolicy"),
    "hybridcache.policies.registry": ("make_admission",),
}
"""Names for an engine that uses the scheduler."""

EVENTS = {
    "hybridcache.adapters.events": (
        *("EventStream", "KVStored", "KVSplit", "KVRemoved", "CheckpointStored"),
        *("CheckpointRemoved", "Mirror", "MirrorMatch", "EventsLost"),
    ),
    "hybridcache.adapters.routing.outbox": ("Outbox", "EventBatch"),
    "hybridcache.adapters.routing.protocol": ("Router", "RouteRequest", "Choice", "ReplicaSpec"),
    "hybridcache.adapters.routing.registry": ("find_router",),
}
"""Names that follow the changes of a cache, and choose replicas by them."""

RESTART = {
    "hybridcache.radix.warm_state": ("write_memory", "pack", "unpack", "WarmState"),
    "hybridcache.radix.tiers": ("TieredRadixCache",),
}
"""Names that save and restore the state of a cache."""

RESULTS = {
    "hybridcache.lab.scenario": ("Scenario",),
    "hybridcache.lab.runs.simulate": ("SimulationResult", "OptimumResult"),
    "hybridcache.lab.results.result": ("RunResult", "SessionResult", "ClosedLoopRun"),
    "hybridcache.lab.runs.closed_loop": ("ClosedLoopResult",),
    "hybridcache.lab.rivals.optimum": ("Optimum",),
    "hybridcache.policies.eviction.scored": ("SampledPolicy",),
}
"""Names in results, and tools that users import from their modules."""

LEADERBOARD = {"hybridcache.lab.board": ("board", "Split", "Cell", "Board", "data_hash")}
"""Names that rank a policy."""


def _listed(modules: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names that users import from ``modules``."""
    texts = []
    for module, names in modules.items():
        for name in names:
            thing = getattr(import_module(module), name)
            full = f"{module}.{name}"
            is_class = inspect.isclass(thing)
            body = f"### {full}\n\n`{name}{_signature(thing)}`\n\n{_body(thing)}"
            texts.append(_class(full, thing) if is_class else body)
    return texts


def _results() -> list[str]:
    """Return the names of ``RESULTS``, with the columns of ``to_dicts``."""
    texts = _listed(RESULTS)
    [row] = hybridcache.simulate("short?head=2", gib=1, progress=False).to_dicts()
    columns = ", ".join(f"`{column}`" for column in row)
    texts.append(
        "### Columns of SimulationResult.to_dicts\n\n"
        f"{columns}. Rates are shares of 1, times are in seconds, `control_us` is in microseconds "
        "per request, `lost_` columns are tokens. The fields of RunResult have the meanings."
    )
    return texts


def _others(page: str) -> list[str]:
    """Return the classes that ``page`` names in code and does not describe yet."""
    code = " ".join(re.findall(r"^(?:\| )?`([^`]+)`(?: \||$)", page, re.MULTILINE))
    listed = (
        name for part in (STEPS, SCHEDULING, EVENTS) for names in part.values() for name in names
    )
    shown = {*hybridcache.__all__, *OF_FILES, *listed}
    named = set(re.findall(r"\b[A-Z]\w+", code)) - shown
    texts = []
    for module in (
        hybridcache.radix.api,
        hybridcache.allocators.pools,
        hybridcache.radix.tree,
        hybridcache.scheduling.request,
    ):
        for name, thing in vars(module).items():
            is_own = getattr(thing, "__module__", "") == module.__name__
            if is_own and inspect.isclass(thing) and name in named:
                texts.append(_class(f"{module.__name__}.{name}", thing))
    return texts


OF_FILES = {"RadixTree", "ItemBytes"}
"""Types that only the readers of warm states pass to the cache."""


PARTS: dict[str, Callable[[], str]] = {
    "agents": agents,
    "cli": cli,
    "eviction": eviction,
    "simulated": lab_eviction,
    "placement": placement,
    "admission": admission,
    "rules": rules,
    "metrics": metrics,
    "measures": measures,
    "generators": generators,
    "api": api_index,
    **{f"api-{name}": partial(api_page, name) for name in API_PAGES},
}
"""Generated parts by name."""


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(PARTS[sys.argv[1]]())
    else:
        for path in GENERATED:
            path.write_text(insert(path.read_text()))
