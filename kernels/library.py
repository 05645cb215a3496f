"""The library of the native kernels: all ``native*.cpp`` files, for one processor.

A wheel for Linux contains libraries for several levels of instructions, and the best one for the
processor is loaded. Otherwise the library is compiled for this processor at first use, and cached.

python -m kernels.library [FOLDER]

compiles the levels of this machine into FOLDER, by default that of this package. No compiler is
needed afterwards.

``HYBRIDCACHE_CPU_LEVEL=avx2`` selects a lower level than the processor's: everything that asks for
its instructions then gets those of the level.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
LEVELS_FOLDER = SOURCES / "levels"
"""Folder of compiled levels, in wheels and images. A checkout has none."""
DIGEST_FILE = "sources.sha256"
"""File of that folder with the digest of the sources. Levels of other sources are not loaded."""
COMMON_HEADER = "native.h"
FLAGS_VARIABLE = "HYBRIDCACHE_CXXFLAGS"
"""Name of the environment variable with more flags for the compiler. The tests set it, so that
they and the servers that they start share one library, which has methods for tests too."""
FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-fPIC"),
    # No contraction: an expression gives equal bits wherever it is inlined or vectorised.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"),
    *os.environ.get(FLAGS_VARIABLE, "").split(),
)
THIS_PROCESSOR = ("-march=native",)
LEVEL_VARIABLE = "HYBRIDCACHE_CPU_LEVEL"
"""Name of the environment variable that selects a level."""
MKL_VARIABLE = "MKL_CBWR"
"""Name of the environment variable that selects the kernels of MKL, as of its first product."""
COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 300
KEPT = "once"
NOT_KEPT = "for this start only, because no cache folder is writable (set XDG_CACHE_HOME)"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Level:
    """Instructions that many processors have in common."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    """Names of these instructions in ``/proc/cpuinfo``."""
    machine: str = "x86_64"

    @property
    def file_name(self) -> str:
        return f"native-{self.name}.so"


_V2 = frozenset(["ssse3", "sse4_1", "sse4_2", "popcnt", "cx16"])
_V3 = _V2 | frozenset(["avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
_DOTS = _V4 | {"avx512_vnni"}
_PAIRS = _DOTS | {"avx512_bf16"}
_TILES = _PAIRS | {"amx_tile", "amx_bf16", "amx_int8"}
_V4_FLAGS = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_PAIR_FLAGS = (*_V4_FLAGS, "-mavx512vnni", "-mavx512bf16")
LEVELS = (
    Level("neon", ("-march=armv8-a",), frozenset(["asimd"]), "aarch64"),
    Level("sse4", ("-march=x86-64-v2",), _V2),
    Level("avx2", ("-march=x86-64-v3",), _V3),
    Level("avx512", _V4_FLAGS, _V4),
    Level("avx512-vnni", (*_V4_FLAGS, "-mavx512vnni"), _DOTS),
    Level("avx512-bf16", _PAIR_FLAGS, _PAIRS),
    Level("amx", (*_PAIR_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), _TILES),
)
"""Levels in ascending order: a processor with a level has those of its machine before it."""


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded library."""

    functions: ctypes.CDLL
    build: str
    """Name of its level, or "native" if it was compiled for this processor."""


def load() -> Library | None:
    """Load the best library for this processor, compiling it if needed (seconds).

    None without a compiler, or if it fails. A warning then says so. Raises ValueError; see
    ``selected_level``.
    """
    return _load_level() or _load_compiled()


def selected_level() -> Level | None:
    """Return the level that ``LEVEL_VARIABLE`` names, or None without it.

    Raises ValueError if there is no such level, or if the processor lacks its instructions.
    """
    if not (name := os.environ.get(LEVEL_VARIABLE)):
        return None
    features = processor_instructions()
    usable = {level.name: level for level in LEVELS if level.needs <= features}
    if name not in usable:
        names = ", ".join(usable) or "none"
        raise ValueError(f"{LEVEL_VARIABLE}={name}: the levels of this processor are {names}.")
    return usable[name]


def level_name() -> str:
    """Return the level of instructions that the kernels use, "" if the processor has none."""
    names = [level.name for level in LEVELS if level.needs <= instructions()]
    return names[-1] if names else ""


def instructions() -> frozenset[str]:
    """Return the instructions to use: those of the selected level, or all of the processor.

    Raises ValueError; see ``selected_level``.
    """
    level = selected_level()
    return processor_instructions() if level is None else level.needs


def processor_instructions() -> frozenset[str]:
    """Return the processor's features by their names in ``/proc/cpuinfo``; empty if the system
    has no such file."""
    return frozenset(_about_processor("flags", "Features").split())


def _about_processor(*names: str) -> str:
    """Return the first line of ``/proc/cpuinfo`` with one of ``names``, without the name; "" if
    there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    lines = (line for line in text.splitlines() if line.startswith(names))
    return next(lines, "").partition(":")[2].strip()


def settle_products() -> None:
    """Let PyTorch's float32 products depend on neither threads nor addresses. Call it before the
    first product.

    MKL's kernels for AVX2 and older instructions give other bits for other numbers of threads and
    for rows at other addresses, unless ``MKL_CBWR`` forbids it. Those for AVX-512, and those for
    AMD's processors with AVX2, do not. A value from outside stays.
    """
    try:
        features = instructions()
    except ValueError:  # ``load`` raises it again, where the settings are read.
        return
    is_intel = _about_processor("vendor_id") == "GenuineIntel"
    if "avx2" not in features:
        os.environ.setdefault(MKL_VARIABLE, "COMPATIBLE")
    elif is_intel and "avx512f" not in features:
        os.environ.setdefault(MKL_VARIABLE, "AVX2,STRICT")


settle_products()  # At the import, because MKL reads its settings at the first product.


def best_level(features: frozenset[str]) -> Level | None:
    """Return the highest level that was built and that a processor with these features has."""
    digest = LEVELS_FOLDER / DIGEST_FILE
    if not digest.is_file() or digest.read_text() != _sources_digest():
        return None
    usable = (
        level
        for level in reversed(LEVELS)
        if level.needs <= features and (LEVELS_FOLDER / level.file_name).is_file()
    )
    return next(usable, None)


def compile_library(compiler: str, flags: Sequence[str], path: Path) -> None:
    """Compile all sources with these flags into ``path``, with a process for each core.

    The common header is compiled once for all sources, and the largest source comes first. The
    library does not name OpenMP's runtime: it uses that of torch. It appears whole, and sealed.
    Raises OSError and SubprocessError.
    """
    sources = sorted(_sources(), key=lambda source: source.stat().st_size, reverse=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        header = f"{directory}/{COMMON_HEADER}"

        def run(*arguments: str) -> None:
            command = [compiler, *arguments]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)

        def compile_one(number: int) -> str:
            made = f"{directory}/{number}.o"
            own = "-include", header, "-c", str(sources[number]), "-o", made
            run(*FLAGS, *flags, *own)
            return made

        common = str(SOURCES / COMMON_HEADER)
        run(*FLAGS, *flags, "-x", "c++-header", common, "-o", f"{header}.gch")
        affinity = getattr(os, "sched_getaffinity", lambda _: ())(0)
        with ThreadPoolExecutor(len(affinity) or os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, range(len(sources))))
        library = Path(directory) / path.name
        run("-shared", "-s", *objects, "-o", str(library))
        seal(library)
        os.replace(library, path)


def seal(library: Path) -> None:
    """Append the digest of a library to it. A loader ignores what follows the last section."""
    digest = hashlib.sha256(library.read_bytes()).digest()
    with library.open("ab") as file:
        file.write(digest)


def is_whole(library: Path) -> bool:
    """Return True if the file ends with the digest of what precedes it: no bit has changed since
    ``seal``. A damaged library could end the process. O(its bytes), 1 ms. Raises OSError."""
    content = library.read_bytes()
    size = len(content) - hashlib.sha256().digest_size
    return hashlib.sha256(content[:size]).digest() == content[size:]


def compile_levels(folder: Path, levels: Sequence[Level]) -> list[Path]:
    """Compile ``levels`` into ``folder``, those without a compiler for their machine left out.

    Raises OSError and SubprocessError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DIGEST_FILE).write_text(_sources_digest())
    made = []
    for level in levels:
        if compiler := find_compiler(level.machine):
            made.append(folder / level.file_name)
            compile_library(compiler, level.flags, made[-1])
    return made


def levels_of(machine: str) -> list[Level]:
    return [level for level in LEVELS if level.machine == machine]


def _load_level() -> Library | None:
    level = best_level(instructions())
    if level is None or selected_level() not in (None, level):
        return None
    path = LEVELS_FOLDER / level.file_name
    with suppress(OSError):  # For example an older C library than that of the build.
        if is_whole(path):
            return Library(_open(path), level.name)
        logger.warning("%s is damaged: install the package again.", path)
    return None


def _open(path: Path) -> ctypes.CDLL:
    """Load a library after the OpenMP runtime of torch. A second runtime would start threads."""
    ctypes.CDLL(_openmp(), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _load_compiled() -> Library | None:
    compiler = find_compiler()
    if not _sources():
        return None
    if compiler is None:
        logger.warning(
            "No C++ compiler was found (%s): a CPU computes with PyTorch's operations, about three "
            "times slower. Install g++ or clang.",
            ", ".join(COMPILERS),
        )
        return None
    level = selected_level()
    flags, build = (level.flags, level.name) if level else (THIS_PROCESSOR, "native")
    name = f"native-{_fingerprint(compiler, flags)}.so"
    reason: Exception | None = None
    for open_folder, kept in ((_user_folder, KEPT), (_temporary_folder, NOT_KEPT)):
        try:
            with open_folder() as folder:
                path = folder / name
                if not (path.is_file() and is_whole(path)):
                    kept = f"again, because {path} is damaged" if path.is_file() else kept
                    _compile_once(compiler, path, kept, flags)
                return Library(_open(path), build)
        except (OSError, RuntimeError) as error:
            reason = error
        except subprocess.SubprocessError as error:  # It would fail in any folder.
            reason = error
            break
    logger.warning(
        "The native kernels cannot be compiled, so a CPU computes with PyTorch's operations, about "
        "three times slower: %s",
        _words(reason),
    )
    return None


def _compile_once(compiler: str, path: Path, kept: str, flags: Sequence[str]) -> None:
    logger.warning("Compiling the kernels for this processor, %s (1 to 2 minutes) ...", kept)
    began = time.monotonic()
    compile_library(compiler, flags, path)
    logger.warning("Compiled the kernels in %.0f s: %s", time.monotonic() - began, path)


def _words(error: Exception | None) -> str:
    """Return the first line of the compiler's or linker's errors, or of ``error``."""
    output = getattr(error, "stderr", None) or b""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    named = (line for line in lines if re.search("error|cannot find|not found", line))
    return next(named, lines[0] if lines else str(error))


def find_compiler(machine: str = platform.machine()) -> str | None:
    """Return the C++ compiler for Linux on ``machine``, or None."""
    prefix = "" if machine == platform.machine() else f"{machine}-linux-gnu-"
    return next(filter(None, (shutil.which(prefix + name) for name in COMPILERS)), None)


def _sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*/native*.cpp")])


def _sources_digest() -> str:
    """Return the digest of all sources and headers. O(their bytes)."""
    digest = hashlib.sha256()
    for path in (*sorted(SOURCES.glob("*.h")), *_sources()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _user_folder() -> Iterator[Path]:
    """Yield the user's cache folder. Writable by this user only, so that no other user can place a
    library there. Raises RuntimeError without a home directory."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    folder = base / "hybridcache"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    yield folder


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a folder that is removed afterwards. A loaded library does not need its file."""
    with tempfile.TemporaryDirectory(prefix="hybridcache-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _openmp() -> str:
    """Return the OpenMP runtime that torch has loaded, or the system's."""
    spec = util.find_spec("torch")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    found = (*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*"))
    return str(next(iter(found), "libgomp.so.1"))


def _fingerprint(compiler: str, flags: Sequence[str]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    # Machines with other processors can share a home directory.
    processor = " ".join(sorted(instructions())) or platform.processor()
    words = (*FLAGS, *flags, version, platform.machine(), processor, _sources_digest())
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compile the kernels for this kind of processor.")
    parser.add_argument("folder", type=Path, nargs="?", default=LEVELS_FOLDER)
    for made in compile_levels(parser.parse_args().folder, levels_of(platform.machine())):
        print(made)
