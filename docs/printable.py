"""Write docs/report.md as one HTML file and as a PDF: python docs/printable.py [FOLDER].

FOLDER is out/report by default. It needs `pip install -e '.[docs]'`, and the library Pango of the
system.
"""

import re
import sys
from base64 import b64encode
from html import escape
from pathlib import Path

try:
    from docutils.core import publish_string
    from myst_parser.docutils_ import Parser
    from weasyprint import HTML
except (ImportError, OSError) as error:
    needs = "pip install -e '.[docs]', and Pango of the system"
    sys.exit(f"printable.py needs {needs} ({str(error).splitlines()[0]})")

DOCS = Path(__file__).resolve().parent
IMAGE = re.compile(r'(?:src|data)="([^"]+\.svg)"')
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\([\w./#-]+\)")
STYLE = """<style>
@page { size: A4; margin: 22mm 20mm; @bottom-center { content: counter(page); font-size: 9pt } }
html, body, main { background: white; border: 0 }
body { max-width: 44em; margin: auto; padding: 0 1em; font: 10.5pt/1.45 sans-serif }
h1 { font-size: 17pt; max-width: none } h2 { font-size: 13pt; break-after: avoid }
img { display: block; width: 11cm; max-width: 100%; height: auto; margin: 0.6em auto }
p:has(> img) { break-inside: avoid } code, pre { font-size: 9pt; white-space: pre-wrap }
table { border-collapse: collapse } td, th { padding: 2pt 6pt; border: 0.5pt solid #8a9099 }
</style></head>"""


def page(text):
    """Return the report as one HTML page, with its figures inside. Links to other pages, which are
    not there in print, become their text."""
    settings = {
        "initial_header_level": 2,
        "stylesheet_path": "minimal.css",
        "myst_enable_extensions": [],
        "report_level": 3,
        "input_encoding": "unicode",
        "output_encoding": "unicode",
    }
    html = publish_string(
        LINK.sub(r"\1", text),
        source_path=str(DOCS / "report.md"),
        parser=Parser(),
        writer="html5",
        settings_overrides=settings,
    )
    [(author, date)] = re.findall(r"^(The .*), version .*, results until (.*)\.$", text, re.M)
    facts = {"author": author, "dcterms.created": date}.items()
    meta = "".join(f'<meta name="{name}" content="{escape(one)}">' for name, one in facts)
    return IMAGE.sub(embedded, html.replace("</head>", meta + STYLE, 1))


def embedded(found):
    """Return the attribute of an image with its content."""
    content = b64encode((DOCS / found[1]).read_bytes()).decode()
    return f'src="data:image/svg+xml;base64,{content}"'


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS.parent / "out" / "report"
    folder.mkdir(parents=True, exist_ok=True)
    html = page((DOCS / "report.md").read_text(encoding="utf-8"))
    (folder / "report.html").write_text(html, encoding="utf-8")
    HTML(string=html, base_url=str(DOCS)).write_pdf(folder / "report.pdf")
    print(folder / "report.html", folder / "report.pdf")


if __name__ == "__main__":
    main()
