"""How the benchmarks measure: verify, then time interleaved in one process, then state bytes and ratios.

    case = Case("synflow round, 20 M weights", verify=lambda: assert_same_masks(ours(), published()))
    case.add("ours", run_ours, bytes_moved=8.4 * 20e6)
    case.add("published", run_published)
    result = case.measure(repeats=7)          # raises before timing anything if `verify` does
    print(markdown([result], subject="ours"))
    save("synflow", [result], folder)

Nothing here asserts a time. The clocks: "wall"; "thread", CPU time of the calling thread (what to compare
where the machine is shared and torch runs on one thread); "process", CPU time of all threads; "device", the
time between two CUDA events where the work runs on a GPU, else the wall time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CLOCKS = ("wall", "thread", "process", "device")
IDLE = 2.0  # seconds without use after which memory may be slow to come back


# The machine


def machine_facts(device: str = "cpu") -> dict[str, Any]:
    """What a reader needs in order to place a figure: processor, cores, torch, threads, load, date; the GPU if used."""
    facts: dict[str, Any] = {
        "machine": machine_name(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def machine_name(device: str = "cpu") -> str:
    """A file name that says what the figures were taken on: the GPU, or the processor and its cores."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        processor = re.sub(r"\([^)]*\)", "", cpu_model())  # without "(R)" and the like
        name = f"{processor} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def copy_bandwidth(device: str | torch.device = "cpu", size: int = 256 << 20, repeats: int = 5) -> float:
    """GB/s read plus written by the best of `repeats` large torch copies: what percentages refer to."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(clocked(lambda: target.copy_(source), torch.device(device))["device"] for _ in range(repeats))
    return 2 * size / best / 1e9


# Time


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: str) -> None:
    """Gives memory of a GPU that no tensor needs back, for the next case to find it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def clocked(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds that one call of `work` takes on every clock."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    synchronize(device)
    wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    if events:
        events[0].record()
    work()
    if events:
        events[1].record()
    synchronize(device)
    seconds = {
        "wall": time.perf_counter() - wall,
        "thread": time.thread_time() - thread,
        "process": time.process_time() - process,
    }
    seconds["device"] = events[0].elapsed_time(events[1]) / 1e3 if events else seconds["wall"]
    return seconds


# Memory


def _status_kib(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _reset_high_water() -> bool:
    """Make VmHWM start anew from the present size; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status_kib("VmHWM") is not None


def _trim_heap() -> None:
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class PeakMemory:
    """Bytes that a block held at its peak beyond what was held when it began, and how that was found."""

    bytes: int | None = None
    source: str = "unavailable"


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[PeakMemory]:
    """Measure the peak of the resident set (or of torch's CUDA allocations) beyond the start of the block.

    On the CPU: the kernel's high-water mark, reset at the start; where that is not allowed, a thread reads
    the resident set every millisecond and may miss a short peak. Freed memory that the C library keeps could
    hide an allocation, so it is handed back to the kernel first.
    """
    device = torch.device(device)
    peak = PeakMemory()
    gc.collect()
    _trim_heap()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        synchronize(device)
        peak.bytes, peak.source = torch.cuda.max_memory_allocated(device) - start, "torch.cuda"
    elif _reset_high_water():
        start = _status_kib("VmRSS") or 0
        yield peak
        peak.bytes, peak.source = 1024 * max(0, (_status_kib("VmHWM") or 0) - start), "VmHWM"
    elif (start_kib := _status_kib("VmRSS")) is not None:
        with _sampled_rss() as high:
            yield peak
        peak.bytes, peak.source = 1024 * max(0, high[0] - start_kib), "sampled VmRSS"
    else:
        yield peak


@contextmanager
def _sampled_rss() -> Iterator[list[int]]:
    high, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            high[0] = max(high[0], _status_kib("VmRSS") or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield high
    finally:
        high[0] = max(high[0], _status_kib("VmRSS") or 0)
        done.set()
        watcher.join()


# Comparisons


@dataclass
class Candidate:
    """One way of doing the work. `setup` runs untimed before each call of `work` and makes its argument."""

    name: str
    work: Callable[..., object]
    setup: Callable[[], object] | None = None
    bytes_moved: float | None = None

    def prepared(self) -> Callable[[], object]:
        """The work of one call, set up."""
        if self.setup is None:
            return self.work
        state = self.setup()
        return lambda: self.work(state)


@dataclass
class Result:
    """Seconds per candidate, clock and repeat, with what was verified before they were taken."""

    case: str
    verified: str
    seconds: dict[str, dict[str, list[float]]]
    bytes_moved: dict[str, float | None] = field(default_factory=dict)
    bandwidth: float | None = None
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def median(self, name: str, clock: str = "wall") -> float:
        return statistics.median(self.seconds[name][clock])

    def minimum(self, name: str, clock: str = "wall") -> float:
        return min(self.seconds[name][clock])

    def ratio(self, baseline: str, subject: str, clock: str = "wall") -> float:
        """Time of `baseline` over time of `subject`: the median of the ratios within each round of runs."""
        pairs = zip(self.seconds[baseline][clock], self.seconds[subject][clock], strict=True)
        return statistics.median(slow / max(fast, 1e-12) for slow, fast in pairs)

    def rate(self, name: str, clock: str = "wall") -> float | None:
        """GB/s of the median run, where the candidate states its bytes."""
        moved = self.bytes_moved.get(name)
        return None if moved is None else moved / self.median(name, clock) / 1e9

    def summary(self) -> dict[str, Any]:
        """Plain data: the samples, and per candidate the medians, minima, rates and mutual ratios."""
        rows = {}
        for name in self.seconds:
            rate = self.rate(name, "device")
            rows[name] = {
                "median": {clock: self.median(name, clock) for clock in CLOCKS},
                "minimum": {clock: self.minimum(name, clock) for clock in CLOCKS},
                "gb_per_second": rate,
                "percent_of_copy": 100 * rate / self.bandwidth if rate and self.bandwidth else None,
                "slower_than": {
                    other: {clock: self.ratio(name, other, clock) for clock in CLOCKS}
                    for other in self.seconds
                    if other != name
                },
            }
        return {**asdict(self), "summary": rows}


class Case:
    """Candidates that do the same work, compared in one process.

    Args:
        name: what is measured, with its size.
        verify: called once before any timing; raises if the candidates disagree, else returns a sentence that
            says what was found equal. A case that verified nothing is refused.
        device: where the work runs.
    """

    def __init__(self, name: str, verify: Callable[[], str], device: str | torch.device = "cpu") -> None:
        self.name, self.verify, self.device = name, verify, torch.device(device)
        self.candidates: list[Candidate] = []

    def add(
        self,
        name: str,
        work: Callable[..., object],
        *,
        setup: Callable[[], object] | None = None,
        bytes_moved: float | None = None,
    ) -> Case:
        if any(candidate.name == name for candidate in self.candidates):
            raise ValueError(f"Case.add: name: wanted a new one, got {name!r} again")
        self.candidates.append(Candidate(name, work, setup, bytes_moved))
        return self

    def measure(
        self,
        repeats: int = 7,
        warmup: int = 1,
        bandwidth: float | None = None,
        peaks: bool = False,
        **notes: Any,
    ) -> Result:
        """Verify, warm up, then time A B C A B C ... `repeats` times.

        A virtual machine may lose memory that lies idle while others run for seconds, and is slow to get it back: who
        has waited so long is called once more, untimed, before.

        Args:
            repeats: timed calls of each candidate.
            warmup: calls of each before them.
            bandwidth: GB/s of `copy_bandwidth`, for percentages.
            peaks: also record the peak memory of one call of each, taken before the timing.
            notes: anything that belongs beside the figures.

        Raises:
            ValueError: there is nothing to measure, or `verify` returned no statement.
            Whatever `verify` raises.
        """
        if not self.candidates or repeats < 1:
            found = (len(self.candidates), repeats)
            raise ValueError(f"Case.measure: wanted candidates and repeats >= 1, got {found}")
        verified = self.verify()
        if not isinstance(verified, str) or not verified:
            raise ValueError(f"Case.measure: verify: wanted a sentence, got {verified!r}")
        highs = {candidate.name: self._peak(candidate) for candidate in self.candidates} if peaks else {}
        ended: dict[str, float] = {}  # when each was called last
        for _ in range(warmup):
            for candidate in self.candidates:
                candidate.prepared()()
                ended[candidate.name] = time.monotonic()
        seconds: dict[str, dict[str, list[float]]] = {
            candidate.name: {clock: [] for clock in CLOCKS} for candidate in self.candidates
        }
        for _ in range(repeats):
            for candidate in self.candidates:
                if time.monotonic() - ended.get(candidate.name, math.inf) > IDLE:
                    candidate.prepared()()
                for clock, value in clocked(candidate.prepared(), self.device).items():
                    seconds[candidate.name][clock].append(value)
                ended[candidate.name] = time.monotonic()
        moved = {candidate.name: candidate.bytes_moved for candidate in self.candidates}
        return Result(self.name, verified, seconds, moved, bandwidth, highs, notes)

    def _peak(self, candidate: Candidate) -> int | None:
        work = candidate.prepared()
        with peak_memory(self.device) as peak:
            work()
        return peak.bytes


def assert_same_masks(first: Mapping[str, Tensor], second: Mapping[str, Tensor], allowed: int = 0) -> str:
    """Compare two mask sets bit by bit and say so.

    Args:
        first, second: parameter name -> bool mask.
        allowed: bits that may differ, for comparisons across rounding (float32 with float64).

    Returns:
        A sentence for `Case.verify`.

    Raises:
        AssertionError: other names or shapes, or more than `allowed` differing bits.
    """
    if set(first) != set(second):
        raise AssertionError(f"masks: other parameters: {sorted(set(first) ^ set(second))}")
    differing, kept = 0, 0
    for name, mask in first.items():
        other = second[name].to(mask.device)
        if mask.shape != other.shape or mask.dtype != torch.bool or other.dtype != torch.bool:
            raise AssertionError(f"masks: {name}: wanted two bool masks of one shape, got {mask}, {other}")
        differing += int((mask != other).sum())
        kept += int(mask.sum())
    total = sum(mask.numel() for mask in first.values())
    if differing > allowed:
        raise AssertionError(f"masks: {differing} of {total} bits differ, allowed {allowed}")
    return f"{total} mask bits compared, {kept} kept, {differing} differ (allowed {allowed})"


# Reports


def markdown(results: Sequence[Result], subject: str, clock: str = "wall") -> str:
    """A Markdown table per case: ms, bytes, share of the copy bandwidth, peak memory, ratio to `subject`."""
    lines = []
    for result in results:
        lines += [f"### {result.case}", "", f"Verified: {result.verified}.", ""]
        lines.append(f"| | median ms ({clock}) | min ms | GB moved | GB/s | % of copy | peak MB | time / {subject} |")
        lines.append("|---|---|---|---|---|---|---|---|")
        for name in result.seconds:
            moved, rate = result.bytes_moved.get(name), result.rate(name, clock)
            peak = result.peak_bytes.get(name)
            share = f"{100 * rate / result.bandwidth:.0f}" if rate and result.bandwidth else "-"
            cells = [
                name,
                f"{1e3 * result.median(name, clock):.3g}",
                f"{1e3 * result.minimum(name, clock):.3g}",
                f"{moved / 1e9:.3g}" if moved else "-",
                f"{rate:.3g}" if rate else "-",
                share,
                "-" if peak is None else f"{peak / 1e6:.3g}",
                f"{result.ratio(name, subject, clock):.3g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"\n{key}: {value}" for key, value in result.notes.items()]
        lines.append("")
    return "\n".join(lines)


def result_path(name: str, folder: str | Path, device: str = "cpu") -> Path:
    """`folder/name.machine.json`: where a suite's results of this machine belong."""
    return Path(folder) / f"{name}.{machine_name(device)}.json"


def save(
    name: str, results: Sequence[Result], folder: str | Path, file_name: str = "", device: str = "cpu", **extra: Any
) -> Path:
    """Write `folder/name.machine.json` (or `folder/file_name`) whole or not at all; return its path."""
    path = Path(folder) / file_name if file_name else result_path(name, folder, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, **machine_facts(device), **extra, "results": [result.summary() for result in results]}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(content, indent=1))
    os.replace(file.name, path)
    return path
