"""Fixtures with a real Chromium. Tests are skipped if none is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Start a browser. Module scope, because playwright's event loop disturbs other tests."""
    playwright = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is not installed (pip install playwright; Chromium must be on the PATH)",
    )
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium cannot be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """Yield an empty page, and fail the test if a script of the page failed."""
    errors: list[str] = []
    page = chromium.new_page(viewport={"width": 1200, "height": 800})
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(120_000)
    yield page
    page.close()
    assert errors == []
