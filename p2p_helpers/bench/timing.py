"""Fair comparisons: jobs timed in turns, and peaks of memory of one job in a fresh process."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch

from ..runtime import Measurement, measure

__all__ = ["clock_of", "exact_memory", "interleaved", "peak_above_start", "ratio"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")      # of Linux


def clock_of(device: str) -> tuple[str, Callable[[], float]]:
    """What a device's clock counts, and the clock.

    On a CPU the processor time of this process: what other programs do on the same cores does not count.
    """
    kind = device.partition(":")[0]
    if kind == "cpu":
        return "processor time", time.process_time
    accelerator = getattr(torch, kind)

    def finished() -> float:
        accelerator.synchronize()
        return time.perf_counter()
    return "wall time", finished


def interleaved(jobs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float],
                say: Callable[[str], object] = lambda line: None) -> dict[str, list[float]]:
    """Seconds of every job in every round; a round runs each once, so that a machine's moods meet all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(rounds):
        for name, job in jobs.items():
            start = clock()
            job()
            seconds[name].append(clock() - start)
            say(f"round {turn + 1}/{rounds}: {name} {seconds[name][-1]:.2f} s")
    return seconds


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of one job's seconds by another's."""
    return median(one / other for one, other in zip(seconds, base, strict=True))


def exact_memory() -> dict[str, str]:
    """Environment of a process whose resident size follows its tensors: glibc unmaps every large one as it is freed."""
    return {"MALLOC_MMAP_THRESHOLD_": str(2**16)}


@contextmanager
def peak_above_start(device: str) -> Iterator[Measurement]:
    """`runtime.measure`, but the block's own peak less what was in use before it; None where the system does not tell.

    On a CPU the resident size, whose peak only Linux lets us reset.
    """
    kind = device.partition(":")[0]
    counts_tensors = kind in ("cuda", "npu")
    resets = not counts_tensors and _CLEAR.exists()
    before = None
    if counts_tensors:
        before = getattr(torch, kind).memory_allocated(device)
    elif resets:
        before = _resident("VmRSS")
        _CLEAR.write_text("5")                          # proc(5): the peak starts again from the present size
    with measure(device) as measurement:
        yield measurement
    peak = measurement.peak_bytes if counts_tensors else _resident("VmHWM") if resets else None
    measurement.peak_bytes = None if before is None else peak - before


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 2**10
