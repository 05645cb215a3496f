"""Chromium fixtures for the tests of this folder."""

from .browser import chromium, errors, tab

__all__ = ["chromium", "errors", "tab"]
