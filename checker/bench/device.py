"""The device as a measuring instrument: its memory, its copy bandwidth, its matmul rate, and a clock that waits for it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from checker.errors import UserError

_MOST_ON_CPU = 256 << 20  # bytes of one measured buffer on a CPU: far above its caches, quickly read
_MOST = 4 << 30  # bytes of one measured buffer elsewhere
_SHARE = 0.2  # of the free memory


def prepare(name: str) -> None:
    """Raise UserError if there is no such device; one thread on a CPU, no TF32 on a GPU."""
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name in there and not there[name]():
        raise UserError(f"There is no {name} device here; leave out --device to measure the CPU.")
    torch.backends.cuda.matmul.allow_tf32 = False
    if name == "cpu":
        torch.set_num_threads(1)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, and the 95th percentile of `calls` calls."""

    median: float
    p95: float
    calls: int


@dataclass(frozen=True)
class Machine:
    """What the device can do. Bandwidth in bytes/s (read plus written), rate in FLOP/s, memory in bytes."""

    name: str
    device: str
    dtype: str
    threads: int
    free_memory: int
    copy_bandwidth: float
    matmul_rate: float


class Device:
    """One device and the dtype that is measured on it: bfloat16 on a GPU, float32 on a CPU."""

    def __init__(self, name: str, seconds: float = 0.5) -> None:
        self.device = torch.device(name)
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.seconds = seconds

    @property
    def name(self) -> str:
        """What the device calls itself."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{os.uname().machine} {self.device.type}" if hasattr(os, "uname") else self.device.type

    def wait(self) -> None:
        """Return when everything that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def free(self) -> int:
        """Free memory in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0]
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return 4 << 30

    def budget(self) -> int:
        """How many bytes the largest measured buffer may have: a fifth of the free memory, within bounds."""
        return min(int(_SHARE * self.free()), _MOST_ON_CPU if self.device.type == "cpu" else _MOST)

    def time(self, call: Callable[[], object]) -> Timing:
        """Time a call for about `seconds`, after warming up; each call is waited for."""
        for _ in range(3):
            call()
        self.wait()
        taken: list[float] = []
        end = time.perf_counter() + self.seconds
        while len(taken) < 5 or (time.perf_counter() < end and len(taken) < 2000):
            started = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - started)
        ordered = sorted(taken)
        return Timing(
            statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], len(ordered)
        )

    def machine(self) -> Machine:
        """Measure what the device can do at best: a large copy, and a large product of square matrices."""
        kind = str(self.dtype).removeprefix("torch.")
        copied, rate = self._copies(), self._multiplies()
        return Machine(self.name, str(self.device), kind, torch.get_num_threads(), self.free(), copied, rate)

    def _copies(self) -> float:
        source = torch.ones(self.budget() // self.dtype.itemsize // 2, dtype=self.dtype, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.time(lambda: target.copy_(source)).median

    def _multiplies(self) -> float:
        n = 1024 if self.device.type == "cpu" else 8192
        a = torch.ones(n, n, dtype=self.dtype, device=self.device)
        out = torch.empty_like(a)
        return 2 * n**3 / self.time(lambda: torch.mm(a, a, out=out)).median
