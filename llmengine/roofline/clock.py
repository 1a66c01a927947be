"""Times of calls: device events on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import ctypes
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 25, 1.5
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """glibc's malloc gives the heap's end back to the system when it is freed and takes new pages for the next call.
    Whether it does hangs on the order in which results are freed: equal work then takes up to twice the time. From
    here on this process keeps what it has freed, except above 32 MiB, the most that malloc allows to keep."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, 2**25)


class Clock:
    """Medians in milliseconds of calls that are timed by turns, so that a machine's moods meet them all alike.

    Args:
        device: "cpu" or "cuda".
        seconds: about how long the calls of one comparison may take in all, beyond three rounds.
        alone: whether each call is timed by itself, so that one that breaks the device takes no other's time along;
            None: on a GPU, whose events see nothing of the other calls.
    """

    def __init__(self, device: str, seconds: float = SECONDS, alone: bool | None = None) -> None:
        self.device, self.seconds = device, seconds
        self.alone = device == "cuda" if alone is None else alone

    def wait(self) -> None:
        """Until all is done that was called, or its error is told here."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def medians(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        if self.device == "cuda":
            return {name: _events(call, "median") for name, call in calls.items()}
        return {name: statistics.median(times) for name, times in self._turns(calls).items()}

    def least(self, call: Callable[[], Any]) -> float:
        """Of a ceiling: what the machine can do where nothing disturbs it."""
        return _events(call, "min") if self.device == "cuda" else min(self._turns({"": call})[""])

    def _turns(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        for call in calls.values():  # not counted: first pages, threads, compilation
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        start = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() - start > self.seconds:
                break
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - begun) * 1e3)
        return times

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Memory that a call holds at once beyond what is there before it; None where nobody counts it (a CPU)."""
        if self.device != "cuda":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def megahertz(self, call: Callable[[], Any]) -> int | None:
        """The clock of a GPU's multiprocessors at work on the call, as its driver tells it: they slow down under load.
        None where nobody tells (a CPU)."""
        if self.device != "cuda" or (driver := _driver()) is None:
            return None
        for _ in range(3):
            call()
        handle, found = ctypes.c_void_p(), ctypes.c_uint()
        name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
        failed = driver.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)) or driver.nvmlDeviceGetClockInfo(
            handle, _MULTIPROCESSORS, ctypes.byref(found)
        )  # numbers, both: they raise nothing
        torch.cuda.synchronize()
        return None if failed else found.value


_MULTIPROCESSORS = 1  # nvmlClockType_t's NVML_CLOCK_SM


@functools.cache
def _driver() -> Any:
    """NVIDIA's management library, which comes with the driver; None where it is not or does not start."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        started = library.nvmlInit_v2() == 0 and library.nvmlDeviceGetHandleByUUID and library.nvmlDeviceGetClockInfo
    except (OSError, AttributeError):  # not there, or without that function
        return None
    return library if started else None


def _events(call: Callable[[], Any], which: str) -> float:
    import triton.testing

    return float(triton.testing.do_bench(call, warmup=15, rep=60, return_mode=which))
