"""Advice for a trace and a memory size: policy, placement, interval, precision of states, split.

One question is answered after the other, each with the answers so far: eviction policy and
placement together; a periodic checkpoint in addition to the placement; the precision of states; the
grid of checkpoints; the split of the memory into a pool for KV and one for states (for engines that
need it fixed). The choice is made on the first part of the trace and checked on the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hybridcache.config import GRID
from hybridcache.geometry.exchange import DISK_BYTES_PER_S, PCIE_BYTES_PER_S
from hybridcache.geometry.model import DTYPE_BYTES, ModelGeometry
from hybridcache.geometry.times import MeasuredTimes, PrefillTimes, Roofline, describe_times
from hybridcache.geometry.units import GIB, format_bytes
from hybridcache.lab.defaults import MODEL
from hybridcache.lab.progress import Progress, shown_progress
from hybridcache.lab.report import text_table
from hybridcache.lab.simulation.result import RunResult
from hybridcache.lab.simulation.serving import Serving
from hybridcache.lab.simulation.simulate import BUILTIN, load_model
from hybridcache.lab.simulation.sizes import budget_bytes, sizes, tier_bytes
from hybridcache.lab.simulation.sweep import Job, run_sweep
from hybridcache.lab.simulation.target import RunConfig
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT

DEFAULT_POLICIES = ("survival", "lru")
PLACEMENTS = (
    "branch,boundary,backoff,end",
    "adaptive",
    "branch,boundary,backoff",
    "branch,backoff",
    "boundary,end",
    "backoff,end",
)
INTERVALS = (512, 1024, 2048, 4096, 8192)
"""Tokens between periodic checkpoints, as alternatives to none."""
FINER_GRIDS = (32, 16)
"""Grids, in tokens, that the engine's kernels support in addition to the default. They are equally
fast on a CPU; on a GPU that was not measured."""
KV_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SERVABLE_PRECISIONS = ("float32", "bfloat16")
"""Precisions of states that the engine supports; others are tried only if named."""
PRECISIONS = (*SERVABLE_PRECISIONS, "int8")
"""Precisions of states. A smaller state never reuses less; its error in logits is not simulated."""
WORTH = 0.005
"""Token hit rate that a periodic checkpoint, a coarser precision or a finer grid must gain to be
advised."""
RULE = (
    "the highest token hit rate is chosen; a periodic checkpoint, a coarser precision or a finer "
    f"grid must gain more than {100 * WORTH:g} points."
)
SAME_TTFT = 1.05
"""Ratio of the slowest to the fastest time to the first token up to which they are the same."""
FEWEST_CHECKED = 100
"""Number of requests below which a measured error of the forecast is mostly chance."""
TUNE_SHARE = 0.5
"""Share of the requests on which the choice is made, by default."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One option of one question, and its run."""

    question: str
    option: str
    run: RunResult
    chosen: bool


@dataclass(frozen=True, slots=True)
class Check:
    """The advised configuration on the requests after those of the choice, with the cache as those
    left it."""

    requests: int
    prompt_tokens: int
    cached_tokens: int

    @property
    def token_hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(frozen=True, slots=True)
class Advice:
    """The advised configuration, and every option that was tried."""

    trace: str
    model: str
    gib: float
    answers: tuple[Answer, ...]
    policy: str
    checkpoints: str
    state_dtype: str
    grid: int
    kv_share: float
    """Share of the memory for KV, if it has to be split into fixed pools."""
    result: RunResult
    """Run of the advice, with one memory for KV and states, over the requests of the choice."""
    check: Check | None = None
    """Result on the other requests; None if all were used for the choice."""
    tiers: TierWorth | None = None
    """Worth of the tiers below the device, if sizes were given for them."""
    source: str = ""
    """Folder of the model, or ``builtin``; empty if it was named by a preset."""
    times: str = ""
    """Source of the prefill times, in words."""

    @property
    def command(self) -> str:
        """The ``engine serve`` command for this advice."""
        model = self.source or f"ORG/{self.model}"
        words = [
            f"engine serve --model {model}",
            f"--cache-gib {self.gib:g}",
            f"--eviction {self.policy}",
            f"--checkpoints {self.checkpoints}",
        ]
        if self.state_dtype in SERVABLE_PRECISIONS:
            words.append(f"--state-dtype {self.state_dtype}")
        if self.grid != GRID:
            words.append(f"--grid {self.grid}")
        if self.tiers is not None and self.tiers.host_gib:
            words.append(f"--host-gib {self.tiers.host_gib:g}")
        return " ".join(words)

    @property
    def forecast(self) -> str:
        """The expected hit rate, and how it was checked, in one or two sentences."""
        tuned = 100 * self.result.token_hit_rate
        if self.check is None:
            return (
                f"expected token hit rate {tuned:.1f} %, of the requests that the choice was made "
                "on: not checked on others"
            )
        checked = 100 * self.check.token_hit_rate
        first = self.result.requests + 1
        return (
            f"expected token hit rate {checked:.1f} %: requests {first:,} to "
            f"{first + self.check.requests - 1:,}, which were not used for the choice; "
            f"{tuned:.1f} % on those that were, so the error of the forecast is "
            f"{checked - tuned:+.1f} points{self._doubt}"
        )

    @property
    def _doubt(self) -> str:
        """A warning if there are too few requests to judge the forecast; else empty."""
        if self.check is None or self.check.requests >= FEWEST_CHECKED:
            return ""
        return (
            f", which means little: it was measured on fewer than {FEWEST_CHECKED} requests "
            f"({self.check.requests})"
        )

    def text(self) -> str:
        """Return the advice, then the table of all options."""
        kv_gib = self.gib * self.kv_share
        lines = [
            f"{self.trace}, {self.model}, {self.gib:g} GiB:",
            f"  eviction {self.policy}, checkpoints {self.checkpoints}, states in "
            f"{self.state_dtype}, grid {self.grid}",
            f"  {self.forecast}",
            self._ttft,
            f"  with two fixed pools: {kv_gib:.3g} GiB for KV, {self.gib - kv_gib:.3g} GiB for "
            "states",
            *([] if self.tiers is None else [f"  {self.tiers.text()}"]),
            f"  to serve: {self.command}",
            "",
        ]
        percentiles = (50, 99) if self._ttft_differs else ()
        rows = [
            [
                answer.question,
                answer.option + (" *" if answer.chosen else ""),
                f"{100 * answer.run.token_hit_rate:.1f}",
                *(f"{1e3 * answer.run.ttft_s[one]:.1f}" for one in percentiles),
            ]
            for answer in self.answers
        ]
        header = ["question", "option (* chosen)", "token hit, %"]
        header += [f"TTFT P{one}, ms" for one in percentiles]
        return "\n".join(lines) + text_table(header, rows) + f"\n{RULE}"

    @property
    def _ttft_differs(self) -> bool:
        """True if the times to the first token tell options apart."""
        times = [answer.run.ttft_s[one] for answer in self.answers for one in (50, 99)]
        return max(times) > SAME_TTFT * min(times)

    @property
    def _ttft(self) -> str:
        median, tail = (1e3 * self.result.ttft_s[one] for one in (50, 99))
        if self._ttft_differs:
            return f"  TTFT P50 {median:.1f} ms, P99 {tail:.1f} ms"
        return (
            f"  TTFT {median:.1f} ms with every option: these prompts are short for the assumed "
            f"machine, {self.times}. To use measured times, give --times FILE"
        )

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        """Return the advice and its table for a notebook."""
        return f"<pre>{escape(self.text())}</pre>"

    def __repr__(self) -> str:
        """Return one line: trace, memory and the advised configuration."""
        return (
            f"{type(self).__name__}({self.trace}, {self.gib:g} GiB: eviction {self.policy}, "
            f"checkpoints {self.checkpoints}, states in {self.state_dtype}, grid {self.grid})"
        )

    def as_record(self) -> dict[str, Any]:
        """Return a record for JSON."""
        return {
            "trace": self.trace,
            "model": self.model,
            "gib": self.gib,
            "policy": self.policy,
            "checkpoints": self.checkpoints,
            "state_dtype": self.state_dtype,
            "grid": self.grid,
            "kv_share": self.kv_share,
            "token_hit_rate": self.result.token_hit_rate,
            "unseen_token_hit_rate": None if self.check is None else self.check.token_hit_rate,
            "ttft_s": self.result.ttft_s,
            "forecast": self.forecast,
            "command": self.command,
            "tiers": None if self.tiers is None else self.tiers.as_record(),
            "answers": [
                {
                    "question": answer.question,
                    "option": answer.option,
                    "token_hit_rate": answer.run.token_hit_rate,
                    "ttft_s": answer.run.ttft_s,
                    "chosen": answer.chosen,
                }
                for answer in self.answers
            ],
        }


def advise(
    trace: str | Trace,
    *,
    gib: float,
    model: str | ModelGeometry = MODEL,
    policy: str | Sequence[str] = DEFAULT_POLICIES,
    checkpoints: str | Sequence[str] = PLACEMENTS,
    state_dtypes: Sequence[str] = SERVABLE_PRECISIONS,
    grids: Sequence[int] = FINER_GRIDS,
    tune_share: float = TUNE_SHARE,
    host_gib: float = 0.0,
    disk_gib: float = 0.0,
    host_gb_s: float = PCIE_BYTES_PER_S / 1e9,
    disk_gb_s: float = DISK_BYTES_PER_S / 1e9,
    servers: int = 1,
    times: str | PrefillTimes | None = None,
    processes: int = 1,
    progress: Progress = None,
) -> Advice:
    """Choose a configuration for ``gib`` of memory, in some thirty runs.

    Arguments that ``simulate`` has too mean the same. ``policy`` and ``checkpoints`` are the
    eviction policies and placements to choose among; ``state_dtypes`` and ``grids`` (coarsest
    first) are precisions and grids to try in addition to the model's own and the default.

    The choice is made on the first ``tune_share`` of the requests: the option that reuses most
    tokens; among equals the default pair, else the first. No interval, the finest precision and the
    coarsest grid are preferred within ``WORTH`` of the best. One more run over the whole trace then
    shows how far the forecast was off on the other requests. With ``tune_share=1`` all are used for
    the choice.

    With ``host_gib`` or ``disk_gib``, the worth of that memory is computed too.

    Raises the errors of ``simulate``.
    """
    if not 0 < tune_share <= 1:
        raise ValueError(f"tune_share must be above 0 and at most 1 (got {tune_share:g})")
    opened = open_trace(trace) if isinstance(trace, str) else trace
    (size,) = sizes(gib)
    host_bytes, disk_bytes = tier_bytes("host", host_gib), tier_bytes("disk", disk_gib)
    geometry = load_model(model) if isinstance(model, str) else model
    config = RunConfig(geometry, budget_bytes=budget_bytes(size))
    precisions(config, state_dtypes)  # reports an unknown name before anything runs
    _check_room(config, state_dtypes, opened.unit)
    timing = MeasuredTimes.load(times) if isinstance(times, str) else times
    serving = Serving(timing or Roofline.fitting(geometry), servers)
    policies = [policy] if isinstance(policy, str) else policy
    placements = [checkpoints] if isinstance(checkpoints, str) else checkpoints
    num_requests = sum(1 for _ in opened) if tune_share < 1 else 0
    num_tuned = round(num_requests * tune_share)
    is_checked = 0 < num_tuned < num_requests
    tuned = opened.head(num_tuned) if is_checked else opened
    with shown_progress(progress, "runs", opened.name) as show:
        adviser = _Adviser(tuned, serving, processes, show)
        options = {
            f"{word} @ {placement}": replace(config, policy=word, checkpoints=placement)
            for word in policies
            for placement in placements
        }
        default = f"{DEFAULT_EVICTION} @ {DEFAULT_PLACEMENT}"  # first, and so chosen among equals
        options = dict(sorted(options.items(), key=lambda option: option[0] != default))
        config = adviser.ask("policy @ checkpoints", options)
        kv_share, result = 1.0, adviser.chosen_run()
        if geometry.num_linear_layers:  # else there are no states to save, to split or to shrink
            config = adviser.ask("periodic checkpoints", intervals(config, opened.unit), WORTH)
            config = adviser.ask("precision of states", precisions(config, state_dtypes), WORTH)
            if finer := [word for word in grids if word % opened.unit == 0]:
                options = {str(word): replace(config, grid=word) for word in (config.grid, *finer)}
                config = adviser.ask("grid of checkpoints", options, WORTH)
            result = adviser.chosen_run()
            kv_share = adviser.ask("KV share of two pools", splits(config)).kv_share or 0.0
        check = _check(adviser.run(opened, config), result) if is_checked else None
        worth = None
        if host_bytes or disk_bytes:
            tiered = replace(
                config,
                host_bytes=host_bytes,
                disk_bytes=disk_bytes,
                host_bytes_per_s=host_gb_s * 1e9,
                disk_bytes_per_s=disk_gb_s * 1e9,
            )
            worth = tier_worth(tuned, tiered, serving, processes=processes, progress=adviser.show)
    return Advice(
        opened.name,
        config.geometry.name,
        size,
        tuple(adviser.answers),
        str(config.policy),
        str(config.checkpoints),
        config.geometry.state_dtype,
        config.grid,
        kv_share,
        result,
        check,
        worth,
        _folder(model),
        describe_times(serving.times),
    )


def _folder(model: str | ModelGeometry) -> str:
    """Return the folder of a model that is given by path, ``builtin`` for the built-in model, else
    an empty text."""
    if not isinstance(model, str) or not Path(model).exists():
        return BUILTIN if model == BUILTIN else ""
    path = Path(model)
    return str(path.parent if path.is_file() else path)


def _check(whole: RunResult, tuned: RunResult) -> Check:
    """Return the part of a run over the whole trace that follows its beginning ``tuned``.

    A run is deterministic, so a longer one begins with exactly the shorter one.
    """
    return Check(
        whole.requests - tuned.requests,
        whole.prompt_tokens - tuned.prompt_tokens,
        whole.cached_tokens - tuned.cached_tokens,
    )


def _check_room(config: RunConfig, words: Sequence[str], unit: int) -> None:
    """Raise ValueError if no checkpoint fits next to the KV of one id, in any precision."""
    tried = precisions(config, words) if config.geometry.num_linear_layers else {"": config}
    states = min(one.geometry.state_bytes for one in tried.values())
    least = states + unit * config.geometry.kv_bytes_per_token
    if (config.budget_bytes or 0) < least:
        raise ValueError(
            f"nothing fits in {format_bytes(config.budget_bytes or 0)}: the smallest checkpoint of "
            f"{config.geometry.name} and its KV take {format_bytes(least)}"
        )


def intervals(config: RunConfig, unit: int) -> dict[str, RunConfig]:
    """Return ``config`` without and with periodic checkpoints."""
    return {"none": config} | {
        f"every {interval}": replace(config, checkpoints=f"{config.checkpoints},every:{interval}")
        for interval in INTERVALS
        if interval >= unit
    }


def splits(config: RunConfig) -> dict[str, RunConfig]:
    """Return ``config`` with its memory in two fixed pools."""
    return {f"{share:.0%}": replace(config, memory="pools", kv_share=share) for share in KV_SHARES}


def precisions(config: RunConfig, words: Sequence[str] = PRECISIONS) -> dict[str, RunConfig]:
    """Return ``config`` with states in the model's own precision and in the coarser ones of
    ``words``, finest first. Raises ValueError for an unknown precision."""
    own = config.geometry.state_dtype
    unknown = [word for word in words if word not in DTYPE_BYTES]
    if unknown:
        raise ValueError(f"state_dtype {unknown[0]!r} is none of {', '.join(DTYPE_BYTES)}")
    coarser = sorted(
        (word for word in words if DTYPE_BYTES[word] < DTYPE_BYTES[own]),
        key=DTYPE_BYTES.__getitem__,
        reverse=True,
    )
    return {
        word: replace(config, geometry=config.geometry.with_state_dtype(word))
        for word in (own, *coarser)
    }


class _Adviser:
    """Answers questions by simulation, and keeps the answers."""

    def __init__(
        self, trace: Trace, serving: Serving, processes: int, show: Callable[[int, int], None]
    ) -> None:
        self._trace, self._serving, self._processes = trace, serving, processes
        self._show, self._num_done = show, 0
        self.answers: list[Answer] = []

    def show(self, done: int, total: int) -> None:
        """Report one more run; later questions depend on the answers, so their number is
        unknown."""
        self._num_done += 1
        self._show(self._num_done, 0)

    def run(self, trace: Trace, config: RunConfig) -> RunResult:
        """Return the run of one configuration over ``trace``."""
        (result,) = run_sweep(trace, [Job(config, self._serving)], progress=self.show)
        return result

    def ask(self, question: str, options: dict[str, RunConfig], worth: float = 0.0) -> RunConfig:
        """Return the first of ``options`` with a token hit rate within ``worth`` of the best."""
        jobs = [Job(config, self._serving) for config in options.values()]
        runs = run_sweep(self._trace, jobs, processes=self._processes, progress=self.show)
        least = max(run.token_hit_rate for run in runs) - worth
        best = next(number for number, run in enumerate(runs) if run.token_hit_rate >= least)
        self.answers += [
            Answer(question, option, run, number == best)
            for number, (option, run) in enumerate(zip(options, runs, strict=True))
        ]
        return jobs[best].config

    def chosen_run(self) -> RunResult:
        """Return the run of the latest choice."""
        return next(answer.run for answer in reversed(self.answers) if answer.chosen)


# --- Worth of host memory and disk ----------------------------------------------------------------

NUM_SIZES = 8
"""Number of device sizes, from the present one to the sum of all tiers."""


@dataclass(frozen=True, slots=True)
class TierWorth:
    """Worth of tiers in device memory: they save as many seconds of prefill as ``device_gib`` more
    on the device would."""

    host_gib: float
    disk_gib: float
    device_gib: float
    alone: RunResult
    """Without them."""
    tiered: RunResult

    def text(self) -> str:
        """Return the comparison as one sentence."""
        sizes = ((self.host_gib, "host memory"), (self.disk_gib, "disk"))
        given = " and ".join(f"{gib:g} GiB of {word}" for gib, word in sizes if gib)
        before, after = self.alone, self.tiered
        total = before.seconds + before.seconds_saved
        shares = [100 * run.seconds_saved / total for run in (before, after)] if total else [0, 0]
        return (
            f"{given} are worth {self.device_gib:.3g} GiB on the device here: "
            f"token hit rate {100 * before.token_hit_rate:.1f} -> "
            f"{100 * after.token_hit_rate:.1f} %, "
            f"prefill seconds saved {shares[0]:.1f} -> {shares[1]:.1f} % (tokens far into a prompt "
            "cost more of these, and copies some)"
        )

    def as_record(self) -> dict[str, float]:
        """Return the figures for JSON."""
        return {
            "host_gib": self.host_gib,
            "disk_gib": self.disk_gib,
            "device_gib": self.device_gib,
            "token_hit_rate": self.tiered.token_hit_rate,
            "seconds_saved_alone": self.alone.seconds_saved,
            "seconds_saved": self.tiered.seconds_saved,
        }


def tier_worth(
    trace: Trace,
    config: RunConfig,
    serving: Serving,
    *,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TierWorth:
    """Replay ``config``, which has lower tiers, and the same without them at increasing sizes of
    device memory.

    Saved seconds are interpolated linearly between the sizes, and never decrease. ``NUM_SIZES`` + 1
    runs. ValueError without a lower tier, or without a budget of bytes.
    """
    if config.budget_bytes is None or not (config.host_bytes or config.disk_bytes):
        raise ValueError("the worth of tiers needs a budget of bytes, and host memory or disk")
    most = config.budget_bytes + config.host_bytes + config.disk_bytes
    sizes = np.geomspace(config.budget_bytes, most, NUM_SIZES).astype(np.int64).tolist()
    alone = replace(config, host_bytes=0, disk_bytes=0)
    jobs = [Job(config, serving)]
    jobs += [Job(replace(alone, budget_bytes=size), serving) for size in sizes]
    tiered, *runs = run_sweep(trace, jobs, processes=processes, progress=progress)
    saved = np.maximum.accumulate([run.seconds_saved for run in runs])
    # Use the smallest of equal sizes: where the curve is flat, more memory has no worth.
    first = np.concatenate(([True], np.diff(saved) > 0))
    size = float(np.interp(tiered.seconds_saved, saved[first], np.array(sizes)[first]))
    return TierWorth(
        config.host_bytes / GIB,
        config.disk_bytes / GIB,
        (size - config.budget_bytes) / GIB,
        runs[0],
        tiered,
    )
