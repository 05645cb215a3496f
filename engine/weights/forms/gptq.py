"""The form of GPTQ: integers in words along the columns, one group after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from engine.weights.layer_names import Names
from engine.weights.model_config import ModelError
from engine.weights.scheme import (
    GroupedScheme,
    Quantization,
    Section,
    Stored,
    Tensors,
    check_served,
    modules_with,
)
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped, from_gptq

METHOD, SERVED = "gptq", "GPTQ with 4 or 8 bits"
FORMS = ("gptq", "gptq_v2", "", None)
SERVED_VALUES: Mapping[str, tuple[object, ...]] = {
    "bits": (4, 8),
    "group_size": (-1, 32, 64, 128),
    "checkpoint_format": FORMS,
    "format": FORMS,
    "pack_dtype": ("int32", None),
    "is_marlin_format": (False, None),
    **dict.fromkeys(("adapter", "rotation"), (None,)),
}
"""Values of fields that change numbers."""


@dataclass(frozen=True, slots=True)
class GptqScheme(GroupedScheme):
    """One weight ``[M, N]``, stored as ``[N / numbers per word, M]``."""

    first_zero: int
    """Difference of a zero to the stored one."""
    has_order: bool
    """True if the groups of columns are listed (``desc_act``)."""

    FIELDS = "bits and group_size"

    def describe(self) -> str:
        return f"GPTQ, {self.format.describe()}"

    def tensors(self, num_rows: int, num_columns: int) -> Mapping[str, Stored]:
        own = self.grouped
        num_groups = self.num_groups(num_columns)
        num_words, num_zeros = (-(-size * own.bits // 32) for size in (num_columns, num_rows))
        return {
            "qweight": Stored(((num_words, num_rows),), (torch.int32,)),
            "qzeros": Stored(((num_groups, num_zeros),), (torch.int32,)),
            "scales": Stored(((num_groups, num_rows),), (own.dtype,)),
            "g_idx": Stored(((num_columns,),), is_optional=not self.has_order),
        }

    def matrix(self, tensors: Tensors, num_rows: int, num_columns: int) -> Matrix:
        own = self.grouped
        format, fields = from_gptq(
            tensors["qweight"],
            tensors["scales"],
            tensors["qzeros"] if own.has_zeros else None,
            num_columns,
            self.group,
            own.bits,
            tensors.get("g_idx"),
            self.first_zero,
        )
        return Matrix(format, fields, num_columns)


def read(section: Section, tensors: Mapping[str, torch.Tensor]) -> Quantization:
    """Read the section. The modules are those with a packed weight; ``dynamic`` has values of some
    of them, by the first regular expression that matches the beginning of a name."""
    rules = [
        (Names.of([f"re:{key.removeprefix('+:').removeprefix('-:')}"]), key[:2] != "-:", values)
        for key, values in (section.get("dynamic") or {}).items()
    ]
    common = {**section}
    check_served("GPTQ", common, SERVED_VALUES)
    groups: dict[str, tuple[Section, list[str]]] = {repr(common): (common, [])}
    for module in sorted(modules_with(tensors, "qweight").names):
        is_packed, own = next(
            ((on, own) for names, on, own in rules if names.has(module)), (True, {})
        )
        if not is_packed:
            raise ModelError(
                f"dynamic in quantization_config excludes {module}, and the files have "
                f"{module}.qweight: use the config of these files."
            )
        values = common | own
        check_served(f"GPTQ, dynamic of {module},", values, SERVED_VALUES)
        groups.setdefault(repr(values), (values, []))[1].append(module)
    schemes = [(_scheme(one, tensors, names), Names.of(names)) for one, names in groups.values()]
    return Quantization(tuple(schemes), Names.of(()))


def _scheme(
    section: Section, tensors: Mapping[str, torch.Tensor], modules: Iterable[str]
) -> GptqScheme:
    """Return the layout of ``modules``. Zero points of all of them that are the middle of the codes
    are symmetric, whatever the section says. Raises ModelError if it says so and they are not, and
    if those of a matrix are all the middle in the other ``checkpoint_format``."""
    forms = {found for key in ("checkpoint_format", "format") if (found := section.get(key))}
    if len(forms) > 1:
        raise ModelError(
            "checkpoint_format and format in quantization_config differ: remove the wrong one."
        )
    size, first_zero = section["group_size"], 0 if forms == {"gptq_v2"} else 1
    grouped = Grouped(section["bits"], 128 if size < 0 else size)

    def word(first_zero: int) -> int:
        """Return a word of zero points in the middle of the codes."""
        middle = grouped.zero - first_zero
        byte = middle if grouped.bits == 8 else middle | middle << 4
        return int.from_bytes(bytes(4 * [byte]), "little", signed=True)

    zeros = {name: tensors[name] for one in modules if (name := f"{one}.qzeros") in tensors}
    middle, sym = word(first_zero), section.get("sym", "missing")
    other = next((name for name, tensor in zeros.items() if (tensor != middle).any()), None)
    scale = tensors.get(str(other).replace(".qzeros", ".scales"))
    # Words of another number of bits are refused by their shapes.
    if other is not None and scale is not None:
        has_bits = zeros[other].shape[-1] == -(-scale.shape[-1] * grouped.bits // 32)
        if has_bits and (sym is True or (zeros[other] == word(1 - first_zero)).all()):
            form = "gptq" if first_zero else "gptq_v2"
            meant = ", or set sym to false if these zero points are meant" * (sym is True)
            raise ModelError(
                f"sym in quantization_config is {str(sym).lower()}, and {other} has other zero "
                f"points than {grouped.zero} in checkpoint_format {form}: correct "
                f"checkpoint_format (gptq or gptq_v2){meant}."
            )
    scales = (tensors[name].dtype for one in modules if (name := f"{one}.scales") in tensors)
    dtype = next(scales, torch.float16)
    grouped = replace(grouped, has_zeros=other is not None, dtype=dtype)
    return GptqScheme(grouped, size < 0, first_zero, bool(section.get("desc_act")))
