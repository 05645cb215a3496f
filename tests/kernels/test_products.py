"""Library products between tokens and logits, each with the reason why its bits do not depend on
the batch. A new one must be listed, or replaced by code with a fixed order of summation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCTS = {
    *("matmul", "mm", "bmm", "mv", "dot", "einsum", "tensordot", "bilinear"),
    *("addmm", "addmm_", "addbmm", "addbmm_", "baddbmm", "baddbmm_", "addmv", "addmv_"),
    *("linear", "scaled_dot_product_attention", "conv1d", "solve_triangular", "solve", "inverse"),
    *("_int_mm", "_linear_pointwise", "@"),
}

ROWS = "linear.prepacked.by_blocks passes 16 rows at a time"
TILE = "one tile: the shape is that of the heads and the tile"
TOKEN = "one token of one sequence: the shape is that of the heads"
INTEGERS = "sums of integers are exact in any order"
POSITION = "one sequence: the shape depends on the position only"
REASONS = {
    "attention/reference.py decode_attention scaled_dot_product_attention": POSITION,
    "attention/reference.py verify_attention scaled_dot_product_attention": POSITION,
    "attention/reference.py _prefill_one scaled_dot_product_attention": (
        "keys up to the end of an absolute block of 256 positions, queries in whole tiles of 64"
    ),
    "gdn/reference.py _solve_tiles bmm": TILE,
    "gdn/reference.py _solve_tiles solve_triangular": TILE,
    "gdn/reference.py write_and_read bmm": TOKEN,
    "gdn/reference.py write_and_read baddbmm_": TOKEN,
    "kda/reference.py _solve_tiles solve_triangular": TILE,
    "kda/reference.py _multiply_pairs bmm": TILE,
    "linear/int8.py multiply_by_spans @": INTEGERS,
    "linear/int8.py is_exact @": INTEGERS,
    "linear/int8.py __call__ _int_mm": INTEGERS,
    "linear/int8.py is_exact _int_mm": INTEGERS,
    "linear/int8.py product_of_many _int_mm": INTEGERS,
    "linear/int8.py single_rows _int_mm": INTEGERS,
    "linear/prepacked.py __init__ _linear_pointwise": ROWS,
    "linear/reference.py linear linear": ROWS,
    "linear/reference.py linear_fp8 @": "float64 sums of 128 products of fp8 are exact (49 bits)",
    "mamba2/reference.py chunk_mamba2 bmm": TILE,
    "mamba2/reference.py chunk_mamba2 baddbmm_": TILE,
    "mamba2/reference.py _weigh bmm": TILE,
    "mamba2/reference.py _advance baddbmm": TOKEN,
    "mamba2/reference.py _advance baddbmm_": TOKEN,
    "mla/reference.py multiply_heads bmm": ROWS,
    "tiles.py add_products baddbmm_": TILE,
    "tiles.py scan baddbmm": TILE,
    "tiles.py scan bmm": TILE,
    "tiles.py scan baddbmm_": TILE,
}


def files() -> Iterator[Path]:
    """Yield the modules that compute on a CPU, and those that call them."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        if "triton" not in path.read_text(encoding="utf-8"):
            yield path
    for folder in ("layers", "models", "runner", "plugins/speculation"):
        yield from sorted((ROOT / "engine" / folder).rglob("*.py"))


def products(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Yield (innermost function, product) of the products of a module."""
    for node in ast.iter_child_nodes(tree):
        inner = node.name if isinstance(node, ast.FunctionDef) else function
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield function, "@"
        if isinstance(node, ast.Attribute) and node.attr in PRODUCTS:
            owner = ast.unparse(node.value)
            # ``kernels.linear`` and ``backend.linear`` are this project's.
            if node.attr != "linear" or owner == "F":
                yield function, node.attr
        yield from products(node, inner)


def test_every_library_product_has_a_reason() -> None:
    found = {
        f"{path.relative_to(ROOT / 'kernels' if 'kernels' in path.parts else ROOT)} {where} {name}"
        for path in files()
        for where, name in products(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(REASONS)
