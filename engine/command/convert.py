"""``engine convert``: what became of a checkpoint's weights, as one screen."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from hybridcache.geometry.units import counted, format_bytes

if TYPE_CHECKING:
    from engine.weights.convert import Conversion, Converted


def as_record(done: Conversion) -> dict[str, object]:
    """Everything, matrix by matrix, for machines."""
    return {
        "became": done.scheme.describe(),
        "source_bytes": done.source_bytes,
        "written_bytes": done.written_bytes,
        "num_files": done.num_files,
        "modules": {
            one.module: {"shape": one.shape, "error": one.error, "left": one.reason or None}
            for one in done.modules
        },
    }


def as_text(done: Conversion) -> str:
    """Matrices of one name in all layers, and all experts, in one line."""
    alike: dict[tuple[str, str], list[Converted]] = defaultdict(list)
    for one in done.modules:
        alike[re.sub(r"\.\d+(?=\.)", ".*", one.module), one.reason].append(one)
    width = max(len(name) for name, _ in alike)
    return "\n".join(
        [
            f"{done.scheme.describe()}: {format_bytes(done.source_bytes)} became "
            f"{format_bytes(done.written_bytes)} in {counted(done.num_files, 'file')}",
            f"  {'converted':<{width}} {'matrices':>9}   error, mean and largest",
            *(_line(name, ones, width) for (name, why), ones in alike.items() if not why),
            f"  {'left as they are':<{width}} {'matrices':>9}   because",
            *(
                f"  {name:<{width}} {len(ones):>9,}   {why}"
                for (name, why), ones in alike.items()
                if why
            ),
        ]
    )


def _line(name: str, ones: list[Converted], width: int) -> str:
    errors = {one.module: one.error for one in ones if one.error is not None}
    worst = max(errors, key=lambda module: errors[module])
    mean = sum(errors.values()) / len(errors)
    line = f"  {name:<{width}} {len(ones):>9,}   {mean:.2%} {errors[worst]:.2%}"
    return line if len(ones) == 1 else f"{line} ({worst})"
