"""What computes here."""

import ctypes
import os
import platform
import threading
from contextlib import suppress
from pathlib import Path

CPU_PRODUCTS = threading.RLock()
"""How a CPU multiplies float32 matrices is one setting of the whole process. Who changes it holds
this meanwhile, and so does a scorer's model that computes in a thread of its own."""


def usable_cores() -> int:
    """Cores that this process may run on: those that Slurm, a container or `taskset` allots."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Name of the processor and its cores, as the system tells them."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = cpu.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return f"{name}, {os.cpu_count()} cores"


def release_freed() -> None:
    """Give memory that nothing uses back to the system, where the C library can be asked to.

    What is freed is kept for the next tensors otherwise (`cli/settings.py`), in pieces that fit
    ever fewer of them: a process of 1.3 GiB grew to 6 in thirty iterations.
    """
    with suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
