"""How long a sharded checkpoint takes to load and to convert, and what memory that needs: the
engine with many workers and with one, and transformers.

    python -m experiments.bench_load --gib 5
    python -m experiments.bench_load --dry

Every run is a process of its own, the kinds alternate, and medians are printed. ``cold``: the files
are dropped from the page cache before; ``warm``: they are in it. Memory is what the process holds
for itself (``RssAnon``) at most, and all that counts as resident (``VmHWM``), which pages of
mapped files do while nobody else wants their memory; both without what it held before it began.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from experiments.provenance import RESULTS, ROOT, write_json_lines

GIB = 2**30
SHARD_BYTES = 2**29
SAMPLE_S = 0.004
KINDS = ("engine_16", "engine_1", "transformers", "transformers_mapped")
"""``transformers`` copies every weight into memory of its own, as the engine does;
``transformers_mapped`` is ``from_pretrained`` alone, which maps files and reads nothing: whoever
computes first waits."""
CONVERSIONS = ("convert_int8", "convert_fp8")


def write_checkpoint(directory: Path, gib: float) -> int:
    """A dense hybrid of about ``gib`` GiB in bfloat16, seeded; the bytes of its weights."""
    import torch
    from safetensors.torch import save_file

    from experiments.gpu_models import DENSE_2B

    layer_bytes = 2 * 2048 * (12288 + 4096 + 3 * 5120)
    small = {"vocab_size": 8192, "num_hidden_layers": 4}
    count = max(4, int(gib * GIB / layer_bytes) // 4 * 4)
    config = DENSE_2B | small | {"num_hidden_layers": count, "bos_token_id": None}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = filled = 0

    def close_shard() -> None:
        nonlocal filled
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        filled = 0

    for name, shape in tensors_of(config):
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        shard[name] = tensor
        total, filled = total + tensor.nbytes, filled + tensor.nbytes
        if filled >= SHARD_BYTES:
            close_shard()
    close_shard()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def tensors_of(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of a model's files."""
    import torch

    from engine.layers.parameters import Build, WeightSpec
    from engine.models import read_model
    from engine.runner.backends import Kernels
    from engine.runner.device import Device

    family, parsed = read_model(config)
    place = WeightSpec(torch.device("meta"), torch.bfloat16)
    model = family(parsed, Build(Kernels.choose(Device.resolve("cpu")), place))
    for name, parameter in model.parameters():
        yield name, tuple(parameter.target.shape)


class PeakMemory:
    """Samples this process's own memory until it is left."""

    def __enter__(self) -> PeakMemory:
        self.anonymous_bytes = 0
        self._before = _status()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.resident_bytes = _status()["VmHWM"] - self._before["VmRSS"]

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_S):
            held = _status()["RssAnon"] - self._before["RssAnon"]
            self.anonymous_bytes = max(self.anonymous_bytes, held)


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = (line.split() for line in lines if line.endswith("kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in fields}


def child(kind: str, directory: Path) -> dict[str, Any]:
    """One run, in this process."""
    work = prepare(kind, directory)
    with PeakMemory() as memory:
        start, cpu_start = time.perf_counter(), time.process_time()
        kept = work()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    del kept
    return {
        "kind": kind,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "anonymous_bytes": memory.anonymous_bytes,
        "resident_bytes": memory.resident_bytes,
    }


def prepare(kind: str, directory: Path) -> Callable[[], object]:
    """What is timed, everything imported."""
    import torch

    if kind.startswith("transformers"):
        from transformers import Qwen3NextForCausalLM

        def load() -> object:
            model = Qwen3NextForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
            if kind == "transformers":
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
            return model

        return load
    if kind in CONVERSIONS:
        from engine.weights.convert import convert

        out, to = directory.with_name("out"), "int8" if kind.endswith("int8") else "fp8"
        return lambda: convert(directory, out, to, show_progress=False)
    from engine.layers.parameters import Build, WeightSpec
    from engine.models import read_model
    from engine.runner.backends import Kernels
    from engine.runner.device import Device
    from engine.runner.model_runner import load_model
    from engine.weights.model_config import read_config

    family, config = read_model(read_config(directory))
    place = WeightSpec(torch.device("cpu"), torch.bfloat16)
    build = Build(Kernels.choose(Device.resolve("cpu")), place)
    workers = int(kind.removeprefix("engine_"))
    return lambda: load_model(
        directory, family, config, build, load_format="auto", num_workers=workers, seed=0
    )


def set_cache(directory: Path, *, warm: bool) -> None:
    """Read all files, or drop them from the page cache."""
    os.sync()
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            if warm:
                while file.read(2**24):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(kind: str, directory: Path, *, warm: bool) -> dict[str, Any]:
    """One run in a process of its own."""
    set_cache(directory, warm=warm)
    shutil.rmtree(directory.with_name("out"), ignore_errors=True)
    command = [sys.executable, "-m", "experiments.bench_load", "--child", kind, str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"cache": "warm" if warm else "cold"}


def table(records: list[dict[str, Any]], num_bytes: int) -> str:
    """Medians of each kind and cache."""
    found = defaultdict(list)
    for record in records:
        found[record["kind"], record["cache"]].append(record)
    lines = [f"{num_bytes / GIB:.2f} GiB of weights", "kind cache seconds cpu_s GiB/s own resident"]
    for (kind, cache), alike in found.items():
        middle = {
            field: statistics.median(record[field] for record in alike)
            for field in ("seconds", "cpu_seconds", "anonymous_bytes", "resident_bytes")
        }
        lines.append(
            f"{kind} {cache} {middle['seconds']:.2f} {middle['cpu_seconds']:.2f} "
            f"{num_bytes / GIB / middle['seconds']:.2f} "
            f"{middle['anonymous_bytes'] / num_bytes:.2f}x "
            f"{middle['resident_bytes'] / num_bytes:.2f}x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=5.0, help="of weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--kinds", nargs="+", choices=(*KINDS, *CONVERSIONS), default=(*KINDS, *CONVERSIONS)
    )
    parser.add_argument("--directory", type=Path, help="where the files are written")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_load.jsonl")
    parser.add_argument("--dry", action="store_true", help="a small model, one round, no results")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "DIRECTORY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child[0], Path(options.child[1]))))
        return
    gib, rounds = (0.05, 1) if options.dry else (options.gib, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        directory = Path(folder) / "model"
        num_bytes = write_checkpoint(directory, gib)
        records = []
        for _, warm, kind in product(range(rounds), (False, True), options.kinds):
            if warm or kind not in CONVERSIONS:
                records.append(run(kind, directory, warm=warm))
                print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    print(table(records, num_bytes))
    if not options.dry:
        write_json_lines(options.out, records, {"weight_bytes": num_bytes})


if __name__ == "__main__":
    main()
