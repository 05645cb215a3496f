"""The toy form of the how-to page is one of the forms."""

from __future__ import annotations

import pytest

from engine.front.server.tool_calls.form import forms

from .templates import TOY


@pytest.fixture(autouse=True)
def toy_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forms(), TOY.NAME, TOY)
