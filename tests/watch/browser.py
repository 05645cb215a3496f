"""A real Chromium for tests; where there is none, they are skipped with a sentence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser of playwright's; a module long, for its event loop is in the way of others."""
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed: pip install playwright, and a Chromium on the PATH",
    )
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium starts here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def errors() -> list[str]:
    """What the pages of a test complained about."""
    return []


@pytest.fixture
def tab(chromium: Any, errors: list[str]) -> Iterator[Any]:
    """An empty page; the test fails if its scripts did."""
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(20_000)
    yield page
    page.close()
    assert errors == []
