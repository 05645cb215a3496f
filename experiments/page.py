"""The results pages: a finding, a figure and a folded table per section, all from result files.

``results_page.md`` is the template of the results. Each ``<!-- page: NAME -->`` begins
``results-NAME.md``; the text before the first one is ``results.md``. Each ``<!-- result: NAME -->``
becomes the section of that name: the finding in one sentence, the figure, the command, and the
table in ``<details>``. In ``report.md``, the template of the report, ``<!-- finding: NAME -->`` and
``<!-- figure: NAME -->`` become the finding of a section, the latter below its figure, with its
cells if the section names them.
The figures are SVG files with colours for light and dark pages, drawn from the same tables.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path

from experiments import provenance, sections
from experiments.provenance import ROOT
from experiments.sections import Section, svg
from experiments.tables import Column, Table

TEMPLATE = ROOT / "experiments" / "results_page.md"
REPORT = ROOT / "experiments" / "report.md"
CITATION = ROOT / "CITATION.cff"
SAID = re.compile(r"<!-- (finding|figure): ([\w ]+) -->")
BEGIN = re.compile(r"^<!-- page: ([\w-]+) -->\n(# .*)\n", re.MULTILINE)
NOTE = (
    "\n<!-- Generated from experiments/{} by "
    "`python -m experiments.reproduce --page`. Do not edit. -->\n"
)
TERMS = "\nTerms, intervals and the default model: [results](results.md).\n"
SECTIONS: dict[str, Section] = {}
"""Sections of all modules of ``experiments.sections``."""
for _module in pkgutil.iter_modules(sections.__path__):
    SECTIONS |= import_module(f"{sections.__name__}.{_module.name}").SECTIONS


def render(name: str, section: Section, figures: dict[Path, str], origin: str) -> str:
    """Return a section as Markdown with the ``origin`` of its results, and add its figure to
    ``figures``."""
    try:
        table = section.table()
    except FileNotFoundError as error:
        return missing(error)
    path = figure_of(name)
    alt = f"Figure of {section.figure.axis}, by {table.columns[0].name}."
    figures[path] = svg(section.figure.draw(table))
    return "\n\n".join(
        (
            f"**{section.finding(table)}**",
            f"![{alt}](../experiments/figures/{path.name})",
            f"`python -m experiments.reproduce --part {section.part}` (commit {origin})",
            f"<details><summary>Table</summary>\n\n{table.markdown()}\n\n</details>",
        )
    )


def missing(error: FileNotFoundError) -> str:
    """Return the text of a section without results."""
    return f"No results yet: `{Path(error.filename or str(error)).name}`."


def figure_of(name: str) -> Path:
    """Return the path of the figure of a section."""
    return provenance.FIGURES / f"results_{name.replace(' ', '_')}.svg"


def report(template: str, origin: Callable[[str], str]) -> str:
    """Return the report with the findings of all results, each with the name of its part, and with
    author, version, and the ``origin`` of each part."""
    cited: dict[str, str] = {}
    numbers = count(1)

    def said(found: re.Match[str]) -> str:
        section = SECTIONS[found[2]]
        try:
            finding = section.finding(section.table()).removesuffix(".")
        except FileNotFoundError as error:
            return missing(error)
        text = f"{finding} (`{section.part}`)."
        cited[section.part] = origin(section.part)
        if found[1] == "finding":
            return text
        path = figure_of(found[2])
        more = f" {section.cells()}" if section.cells else ""
        text = f"*Figure {next(numbers)}. {text}{more}*"
        return f"![{section.figure.axis}](../experiments/figures/{path.name})\n\n{text}"

    text, citation = SAID.sub(said, template), CITATION.read_text(encoding="utf-8").strip()
    names, version = (re.findall(rf"{key}: (.*)", citation) for key in ("- name", "\nversion"))
    dates = {place.rpartition(", ")[2] for place in cited.values()}
    authors = (
        f"{', '.join(names)}, version {version[0]}, results until {max(dates, default='none')}"
    )
    rows = [[f"`{part}`", place] for part, place in sorted(cited.items())]
    for mark, inserted in (
        ("authors", authors.replace('"', "") + "."),
        ("parts", Table([Column("part"), Column("commit, date")], rows).markdown()),
        ("citation", f"```yaml\n{citation}\n```"),
    ):
        text = text.replace(f"<!-- {mark} -->", inserted)
    title, _, body = text.partition("\n")
    return f"{title}\n{NOTE.format(REPORT.name)}{body.rstrip()}\n"


def pages(
    template: Path, parts: Table, origin: Callable[[str], str]
) -> tuple[dict[str, str], dict[Path, str]]:
    """Return the pages by file name and the figures by path. ``parts`` is the table of all parts,
    and ``origin`` returns commit and date of a part's results by its name."""
    text = template.read_text(encoding="utf-8")
    figures: dict[Path, str] = {}
    for name, section in SECTIONS.items():
        mark = f"<!-- result: {name} -->"
        if mark in text:
            text = text.replace(mark, render(name, section, figures, origin(section.part)))
    text = text.replace("<!-- result: parts -->", parts.markdown())
    first, *rest = BEGIN.split(text)
    written, rows = {}, []
    for name, title, body in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        file = f"results-{name}.md"
        written[file] = f"{title}\n{NOTE.format(TEMPLATE.name)}{TERMS}{body.rstrip()}\n"
        headings = "; ".join(re.findall(r"^## (.*)", body, re.MULTILINE))
        rows.append([f"[{title.rpartition(': ')[2]}]({file})", headings])
    index = Table([Column("page"), Column("sections")], rows).markdown()
    title, _, body = first.replace("<!-- result: pages -->", index).partition("\n")
    written["report.md"] = report(REPORT.read_text(encoding="utf-8"), origin)
    return {
        "results.md": f"{title}\n{NOTE.format(TEMPLATE.name)}{body.rstrip()}\n"
    } | written, figures
