"""What a result was measured on: processor or GPU, clocks, threads and versions."""

import datetime
import os
import platform
import shutil
import statistics
import subprocess
from pathlib import Path

import torch


def gpu() -> str:
    """Name of the GPU that the results are of, where it is torch's default device; "" on a CPU."""
    return torch.cuda.get_device_name() if torch.get_default_device().type == "cuda" else ""


def machine() -> dict[str, str | int]:
    """Columns that say where a result comes from: GPU if any, processor, cores, threads, torch, Python and the day."""
    names = _cpuinfo("model name")
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def clock() -> str:
    """The clock now: the median over the processor's cores, or the GPU's; "" where the system does not tell."""
    if gpu():
        if shutil.which("nvidia-smi") is None:
            return ""
        command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader", "--id=0"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        return said.stdout.strip() if said.returncode == 0 else ""
    clocks = [float(value) for value in _cpuinfo("cpu MHz")]
    return f"{statistics.median(clocks):.0f} MHz" if clocks else ""


def _cpuinfo(key: str) -> list[str]:
    """The values of a key in Linux's /proc/cpuinfo, one for each core; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":")[1].strip() for line in lines if line.split(":")[0].strip() == key]
