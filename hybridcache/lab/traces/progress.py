"""Progress bars of long calls, in terminals and notebooks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Here and not in a call, in which it would make Python repeat the warnings given so far.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # in notebooks without ipywidgets the bar is plain text
    from tqdm.auto import tqdm

Progress = Callable[[int, int], None] | bool | None
"""Argument of functions that take long: a function of (done, all); False for no progress; None for
a bar if the output is a terminal or a notebook."""


@contextmanager
def shown_progress(
    progress: Progress, unit: str, name: str | None = None
) -> Iterator[Callable[[int, int], None]]:
    """Yield the function to call with (done, all); 0 if the number of all is unknown. A bar appears
    after half a second."""
    if progress is False:
        yield lambda done, total: None
        return
    if callable(progress):
        yield progress
        return
    is_off = False if "ipykernel" in sys.modules else None  # A notebook's output is no terminal.
    with tqdm(unit=f" {unit}", desc=name, disable=is_off, delay=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total or None
            bar.update(done - bar.n)

        yield show
