"""Chromium fixtures for the tests of this folder."""

from .browser import chromium, tab

__all__ = ["chromium", "tab"]
