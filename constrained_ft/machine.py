"""What computes here."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Name of the processor and its cores, as the system tells them."""
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = cpu.read_text(encoding="utf-8", errors="replace").splitlines()
        named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        name = named[0] if named else name
    return f"{name}, {os.cpu_count()} cores"
