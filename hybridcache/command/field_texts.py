"""Texts of fields: the strings that follow the fields of a class in its source.

Python drops them. ``help`` and the reference read them from here.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence


def class_body(kind: type[object]) -> list[ast.stmt]:
    """Return the statements of a class, or none if its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return []
    return tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []


def documented(body: Sequence[ast.stmt], owner: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (name, annotation, text) of every public variable in ``body``, or of every attribute
    of ``owner`` that is assigned there. The text is the string that follows, or empty."""
    for index, node in enumerate(body):
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name = ""
        if owner and isinstance(target, ast.Attribute) and ast.unparse(target.value) == owner:
            name = target.attr
        elif not owner and isinstance(target, ast.Name):
            name = target.id
        if not name or name.startswith("_"):
            continue
        after = body[index + 1] if index + 1 < len(body) else None
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = inspect.cleandoc(str(after.value.value))
        yield name, ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else "", text


class FieldTexts:
    """Docstring of a class that includes the texts of its fields, read at its first use."""

    def __init__(self, kind: type[object]) -> None:
        self.own = kind.__doc__ or ""
        """Docstring as written."""
        self._kind = kind
        self._full: str | None = None

    def __get__(self, instance: object, owner: type[object]) -> str:
        if self._full is None:
            lines = []
            for name, kind, text in documented(class_body(self._kind)):
                if kind and text:
                    lines.append(f"    {name}: {textwrap.indent(text, ' ' * 8).strip()}")
                    if hasattr(self._kind, "_fields"):  # Else "Alias for field number 3".
                        vars(self._kind)[name].__doc__ = text
            if lines:
                lines = ["\nFields:", *lines]
            self._full = "\n".join([inspect.cleandoc(self.own), *lines])
        return self._full


def describe_fields(package: str) -> None:
    """Let ``help`` show the fields of all classes in the imported modules of ``package``."""
    for name, module in list(sys.modules.items()):
        if not name.startswith(f"{package}."):
            continue
        for kind in list(vars(module).values()):
            if isinstance(kind, type) and kind.__module__ == name:
                members = vars(kind)
                if "__annotations__" in members and isinstance(members["__doc__"], str):
                    kind.__doc__ = FieldTexts(kind)  # type: ignore[assignment]
