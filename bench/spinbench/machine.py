"""What this machine is. Nothing here imports torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ISA = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
)
PACKAGES = ("torch", "openvino", "onnxruntime", "triton")


@dataclass
class Ceilings:
    """The highest peaks a run measured, and how quiet the machine was at its quietest measurement."""

    peaks: dict[str, float] = field(default_factory=dict)  # float32_gflops, bfloat16_gflops, copy_gbps
    other_processes: float = 1.0  # the share of the processor that others used then
    failure: str | None = None  # why there are none

    def add(self, measured: dict[str, float], other_processes: float) -> None:
        for name, value in measured.items():
            self.peaks[name] = max(value, self.peaks.get(name, 0.0))
        self.other_processes = min(other_processes, self.other_processes)


def default_threads() -> int:
    """One thread per physical core that this process may use."""
    return min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or os.cpu_count() or 1)


def describe(threads: int) -> dict:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.M)
        return found.group(1).strip() if found else ""

    flags = (field("flags") or field("Features")).split()
    family = "/".join(field(name) for name in ("cpu family", "model", "stepping"))
    return {
        "processor": field("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": family,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": threads,
        "isa": [name for name in ISA if name in flags],
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "commit": commit(),
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str:
    """The commit of this file, with a + where the tree has changes; 'unknown' outside a repository."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
        return head.strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
