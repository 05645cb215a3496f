"""Documents as tests: read the code blocks of a Markdown page, run them, and check its links.

A page is run from top to bottom in an empty folder. The language of a block decides:

- ``python`` with prompts (``>>>``) is a doctest; its output must be the output shown.
- ``python`` whose first line is a comment with a file name, as in ``# mine.py``, becomes that file.
- other ``python`` is executed. All Python blocks of a page share one namespace.
- ``console``: each line after ``$`` is a ``hybridcache`` or ``engine`` command, run in this
  process; its output must be the output shown, where ``...`` stands for any text.
- ``sh``: the flags of each ``hybridcache`` and ``engine`` command exist, as do the targets of
  ``make``, the extras of ``pip install`` and the scripts of ``python``. A ``curl`` command to the
  server of the pages is sent, as curl would send it; the answer must be 200.

A block may be indented, as in a list.

An HTML comment on the line before a block changes that: ``<!-- file: NAME -->`` writes the block to
a file, ``<!-- not run: REASON -->`` leaves it out.

After a change that is meant to change figures, ``python -m tests.documents PAGE`` writes them.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from engine.command.cli import main as engine
from hybridcache.lab.cli import main as hybridcache

COMMANDS: dict[str, Callable[[list[str]], int]] = {"engine": engine, "hybridcache": hybridcache}
ROOT = Path(__file__).resolve().parent.parent
SERVER = "http://127.0.0.1:8000"
"""Address of a server in the pages; tests replace it by that of a running one."""
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

_FENCE = re.compile(
    r"^(?: *<!-- *(?P<note>[^\n]*?) *-->\n)?(?P<indent> *)```(?P<language>\w+)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    note: str
    """Content of the HTML comment before it."""


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of ``page`` that name a language, in order."""
    content = page.read_text()
    for found in _FENCE.finditer(content):
        line = content.count("\n", 0, found.start("text"))
        text = textwrap.dedent(found["text"]) if found["indent"] else found["text"]
        yield Block(line, found["language"], text, found["note"] or "")


def needs_server(page: Path) -> bool:
    """Return whether a block that runs speaks to a server."""
    return any(
        SERVER in block.text
        and not block.note
        and (block.language in ("python", "console") or "curl " in block.text)
        for block in blocks(page)
    )


Corrections = list[tuple[str, str]]
"""Pairs of an output that a page shows and the output that was seen."""


def run(
    page: Path, folder: Path, server: str | None = None, corrections: Corrections | None = None
) -> int:
    """Run the blocks of ``page`` in ``folder``, which is the working directory and importable.
    Return how many ran. Raises AssertionError, with page and line, for the first that fails; a
    wrong output is added to ``corrections`` instead, if they are given."""
    namespace: dict[str, Any] = {"__name__": "page"}
    num_run = 0
    known = set(sys.modules)
    try:
        for block in blocks(page):
            where = f"{page.relative_to(ROOT)}, line {block.line + 1}"
            text = block.text if server is None else block.text.replace(SERVER, server)
            kind, _, value = block.note.partition(":")
            if kind == "not run":
                assert value.strip(), f"{where}: a block that is not run needs a reason"
                continue
            if corrections is not None and server is None and SERVER in text:
                continue  # its output is not on the page
            if kind == "file":
                (folder / value.strip()).write_text(text)
                continue
            if block.language == "python":
                _run_python(block, text, namespace, folder, where, corrections)
            elif block.language == "console":
                _run_console(text, where, corrections)
            elif block.language == "sh":
                _check_commands(text, where, server)
            else:
                continue
            num_run += 1
    finally:
        for name in set(sys.modules) - known:
            source = getattr(sys.modules[name], "__file__", None) or ""
            if source.startswith(str(folder)):
                del sys.modules[name]
    return num_run


class _Runner(doctest.DocTestRunner):
    """Runner that collects outputs that differ from those shown."""

    def __init__(self) -> None:
        super().__init__(optionflags=OPTIONS)
        self.corrections: Corrections = []

    def report_failure(self, out: Any, test: Any, example: doctest.Example, got: str) -> None:
        self.corrections.append((example.want, got))
        super().report_failure(out, test, example, got)


def _run_python(
    block: Block,
    text: str,
    namespace: dict[str, Any],
    folder: Path,
    where: str,
    corrections: Corrections | None,
) -> None:
    named = re.match(r"# (\w+\.py)\n", text)
    if named:
        (folder / named[1]).write_text(text)
    elif text.startswith(">>>"):
        report, runner = io.StringIO(), _Runner()
        test = doctest.DocTestParser().get_doctest(text, namespace, where, where, block.line)
        result = runner.run(test, out=report.write, clear_globs=False)
        namespace.update(test.globs)
        if corrections is not None and len(runner.corrections) == result.failed:
            corrections += runner.corrections
        else:
            assert not result.failed, report.getvalue()
    else:
        try:
            exec(compile("\n" * block.line + text, where, "exec"), namespace)
        except Exception as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


def _run_console(text: str, where: str, corrections: Corrections | None) -> None:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.replace("\\\n", " ").partition("\n")
        words = shlex.split(command, comments=True)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            code = COMMANDS[words[0]](words[1:])
        got = shown.getvalue()
        assert code == 0, f"{where}: {command} ended with {code}"
        if doctest.OutputChecker().check_output(expected, got, OPTIONS):
            continue
        assert corrections is not None, f"{where}: {command}\nexpected:\n{expected}\ngot:\n{got}"
        corrections.append((expected, got))


def corrected(expected: str, got: str) -> str:
    """Return ``got`` with as much of it left out as ``expected`` leaves out at its end and start.
    Raises ValueError if ``expected`` leaves out text elsewhere."""
    shown, lines = expected.splitlines(), got.splitlines()
    tail = shown[-1:] == ["..."]
    head = shown[:1] == ["..."]
    kept = shown[head : len(shown) - tail]
    if any("..." in line for line in kept) or (head and tail and kept[0] not in lines):
        raise ValueError(f"Correct this output by hand; it is now:\n{got}")
    first = 0 if not head else lines.index(kept[0]) if tail else len(lines) - len(kept)
    lines = lines[first : first + len(kept)] if head or tail else lines
    return "\n".join([*["..."] * head, *lines, *["..."] * tail]) + "\n"


def update(page: Path) -> int:
    """Write the outputs seen now into ``page``. Return how many changed."""
    corrections: Corrections = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sys.path.insert(0, folder)
        run(page, Path(folder), corrections=corrections)
    text = page.read_text()
    for expected, got in corrections:
        assert text.count(expected) == 1, f"{page}: this output occurs more than once:\n{expected}"
        text = text.replace(expected, corrected(expected, got))
    page.write_text(text)
    return len(corrections)


def check_command(command: str) -> None:
    """Raise AssertionError unless the flags of a ``hybridcache`` or ``engine`` command exist."""
    _check_commands(command, command)


def _check_commands(text: str, where: str, server: str | None = None) -> None:
    for words in _commands(text):
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]
        if not words:
            continue
        if words[0] == "curl":
            _run_curl(words[1:], where, server)
        elif words[0] in COMMANDS:
            _check_flags(words, where)
        elif words[0] == "pip":
            _check_install(words, where)
        elif words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            missing = {word for word in words[1:] if "=" not in word} - set(targets)
            assert not missing, f"{where}: the Makefile has no target {missing}"
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if "/" in word), where
        elif words[0] == "python":
            name = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
            assert (ROOT / name).exists(), f"{where}: there is no {name}"
        else:
            assert words[0] in ("cd", "git", "ray", "export"), f"{where}: {words[0]}?"


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command; a quoted word may have several lines."""
    command = ""
    for line in text.replace("\\\n", " ").splitlines():
        command += line
        try:
            yield shlex.split(command, comments=True)
            command = ""
        except ValueError:  # a quotation that is still open
            command += "\n"
    assert not command, f"a quotation is never closed: {command}"


def _run_curl(words: list[str], where: str, server: str | None) -> None:
    """Send the request of a ``curl`` command if it goes to ``server``; its options must be known
    here in any case. As with curl, a body without a header for its type is a form."""
    method, body, headers, urls = None, None, {}, []
    rest = iter(words)
    for word in rest:
        if word == "-H":
            name, _, value = next(rest).partition(":")
            headers[name.strip().lower()] = value.strip()
        elif word == "-d":
            body = next(rest)
        elif word == "-X":
            method = next(rest)
        elif word not in ("-s", "-N"):
            assert not word.startswith("-"), f"{where}: an option of curl that is not known: {word}"
            urls.append(word)
    [url] = urls
    if server is None or not url.startswith(server):
        return
    if body is not None:
        headers.setdefault("content-type", "application/x-www-form-urlencoded")
    method = method or ("GET" if body is None else "POST")
    answer = httpx.request(method, url, headers=headers, content=body, timeout=60)
    assert answer.status_code == 200, f"{where}: curl {url}: {answer.status_code} {answer.text}"


def _check_flags(words: list[str], where: str) -> None:
    """Check that the flags of one command are among those that its ``--help`` shows."""
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    depth = 3 if words[:2] == ["hybridcache", "trace"] else 2
    verb = [word for word in words[1:depth] if not word.startswith("--")]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        COMMANDS[words[0]]([*verb, "--help"])
    assert ended.value.code == 0, f"{where}: there is no {' '.join(words[:depth])}"
    unknown = flags - set(re.findall(r"--[a-z0-9-]+", shown.getvalue()))
    assert not unknown, f"{where}: {' '.join(words[:depth])} has no {', '.join(sorted(unknown))}"


def _check_install(words: list[str], where: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        found = re.fullmatch(r"(?:\.|hybrid-radix-(?:cache|engine))\[(.*)\]", word)
        for extra in found[1].split(",") if found else ():
            assert extra in project["optional-dependencies"], f"{where}: no extra {extra!r}"


# --- Links --------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of ``page``, as GitHub and MyST write them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Return the links of ``page`` that lead to no file or heading of the repository, and the
    paths in code font that name a missing file."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    targets += re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)
    broken = []
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file.parent == ROOT / "docs" / "examples":  # copied there when the site is built
            file = ROOT / "examples" / file.name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    paths = re.findall(r"`((?:engine|hybridcache|kernels|experiments|examples)/[\w./-]+)`", text)
    return broken + [path for path in paths if not (ROOT / path).exists()]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {update(Path(name).resolve())} outputs changed")
