"""Check of asynchronous tensor core products in NVIDIA's machine code, without a GPU.

From Hopper on, a product (``HGMMA``, ``QGMMA``, ``IGMMA``) is issued and runs on while later
instructions execute. Until a wait has covered it, its registers belong to it: writing its left
operand, or touching its accumulators, is undefined (PTX ISA, section on ``wgmma``). No hardware
scoreboard guards these registers; only ``WARPGROUP.DEPBAR`` waits for them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\w+):")
PRODUCT = re.compile(r"[HQI]GMMA\.64x(\d+)x\d+\.(\w+)")
REGISTER = re.compile(r"(?<![A-Z])R(\d+)\b")
MAX_IN_FLIGHT = 64
"""Groups of products that are followed. No loop of ours issues that many without a wait."""

Groups = tuple[frozenset[int], ...]
"""Products in flight, by the index of their instruction: committed groups, the oldest first."""


class Product(NamedTuple):
    """Asynchronous product and its registers."""

    left: range
    """Registers of the left operand, empty if it is in shared memory."""
    accumulators: range
    is_committed: bool
    """True if a group ends with this product."""


class Instruction(NamedTuple):
    """Instruction with its successors by index."""

    text: str
    name: str
    operands: str
    next: tuple[int, ...]
    product: Product | None


def find_disassembler() -> Path | None:
    """Return nvdisasm of the triton package, or None if it is absent."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return path if path.exists() else None


def disassemble(cubin: bytes, disassembler: Path) -> str:
    """Return the machine code of a compiled kernel as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [disassembler, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout


def registers_in_danger(code: str) -> list[str]:
    """Return one line per product whose registers are touched before a wait has covered it.

    Follows every path of the control flow with the groups that may be in flight on it, and visits
    each pair of a branch target and such groups once.
    """
    lines = parse(code)
    found: dict[int, str] = {}
    seen: set[tuple[int, Groups, frozenset[int]]] = set()
    waiting: list[tuple[int, Groups, frozenset[int]]] = [(0, (), frozenset())]
    while waiting:
        state = waiting.pop()
        index, groups, is_open = state
        while index < len(lines):
            line = lines[index]
            if line.product is not None:
                is_open |= {index}
                if line.product.is_committed:
                    groups, is_open = (*groups, is_open)[-MAX_IN_FLIGHT:], frozenset()
            elif line.name.startswith("WARPGROUP.DEPBAR"):
                num_left = int(line.operands.split(",")[1], 16)
                groups = groups[len(groups) - num_left :] if num_left < len(groups) else groups
                groups = groups if num_left else ()
            elif groups or is_open:
                for other in frozenset().union(is_open, *groups):
                    if other not in found and _is_conflict(line, lines[other].product):
                        found[other] = f"{lines[other].text} | {line.text}"
            if line.next == (index + 1,):
                index += 1
                continue
            for target in line.next:
                state = (target, groups, is_open)
                if state not in seen:
                    seen.add(state)
                    waiting.append(state)
            break
    return [found[index] for index in sorted(found)]


class Loop(NamedTuple):
    """Loop with products of 64 rows. Each has as many weights per thread as half of its depth: 8 of
    16 bits, 16 of 8 bits."""

    num_instructions: int
    num_products: int
    counts: Counter[str]
    """Number of instructions by the first part of their names."""


def product_loops(code: str) -> list[Loop]:
    """Return the loops with products that contain no other one, in their order."""
    lines = parse(code)
    ranges = sorted(
        (target, index)
        for index, line in enumerate(lines)
        if line.name.startswith("BRA")
        for target in line.next
        if target <= index and any(one.product for one in lines[target : index + 1])
    )
    inner = [
        (first, last)
        for first, last in ranges
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in ranges)
    ]
    return [
        Loop(
            last + 1 - first,
            sum(line.product is not None for line in lines[first : last + 1]),
            Counter(line.name.split(".")[0] for line in lines[first : last + 1]),
        )
        for first, last in inner
    ]


def _is_conflict(line: Instruction, product: Product | None) -> bool:
    """Return True if an instruction writes the left operand, or names an accumulator."""
    assert product is not None
    written = _written(line)
    if any(register in product.left for register in written):
        return True
    named = {int(number) for number in REGISTER.findall(line.operands)} | set(written)
    return any(register in product.accumulators for register in named)


def _written(line: Instruction) -> range:
    """Return the registers that an instruction writes: those of its first register operand.

    Stores and branches begin with an address or a predicate; comparisons write predicates only.
    """
    first, _, rest = line.operands.partition(",")
    if re.fullmatch(r"U?P\w+", first):  # A predicate, then the register, of shuffles and atomics.
        first = rest.partition(",")[0].strip()
    number = re.fullmatch(r"R(\d+)", first)
    if number is None or line.name.startswith(("ISETP", "FSETP", "R2P")):
        return range(0)
    return range(int(number[1]), int(number[1]) + _width(line.name))


def _width(name: str) -> int:
    """Return the number of 32-bit registers that an instruction of this name writes."""
    if name.startswith("LDSM"):
        return int(name.rsplit(".", 1)[1]) if name[-1].isdigit() and name[-2] == "." else 1
    if ".128" in name:
        return 4
    wide = ("IMAD.WIDE", "CS2R", "DADD", "DMUL", "DFMA")
    return 2 if ".64" in name or (name.startswith(wide) and ".32" not in name) else 1


def parse(code: str) -> list[Instruction]:
    """Return the instructions of one function in the output of ``nvdisasm -c``."""
    texts: list[tuple[str, str, bool]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(texts)
        elif found := INSTRUCTION.search(line):
            texts.append((found[1], found[2], "@" in line))
    instructions = []
    for index, (name, operands, is_conditional) in enumerate(texts):
        following: tuple[int, ...] = (index + 1,)
        if name == "EXIT" and not is_conditional:
            following = ()
        elif name.startswith("BRA"):
            target = labels[re.search(r"\.L_x_\w+", operands)[0]]
            always = not is_conditional and not operands.startswith(("P", "!P", "UP", "!UP"))
            following = (target,) if always else (target, index + 1)
        instructions.append(
            Instruction(f"{name} {operands}", name, operands, following, _product(name, operands))
        )
    return instructions


def _product(name: str, operands: str) -> Product | None:
    shape = PRODUCT.match(name)
    if shape is None:
        return None
    target, left = (part.strip() for part in operands.split(",")[:2])
    width = int(shape[1]) // (4 if shape[2] == "F16" else 2)
    first = int(REGISTER.match(target)[1])
    in_registers = REGISTER.match(left)
    return Product(
        range(int(in_registers[1]), int(in_registers[1]) + 4) if in_registers else range(0),
        range(first, first + width),
        "gsb0" in operands,
    )
