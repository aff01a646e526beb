"""Where a run happens: CUDA, Apple's MPS or the CPU, chosen in this order."""

import os
import sys
from importlib.util import find_spec

import torch

from ritornello.config import require, require_choice


def available() -> tuple[str, ...]:
    """Kinds of device present, the preferred one first; the CPU always is."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return tuple(name for name, found in present.items() if found)


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: "auto" (the first available), "cuda", "cuda:1", "mps" or "cpu".

    Raises:
        ValueError: no such device here. A device that was asked for is never replaced by another.
    """
    kind, colon, index = name.partition(":")
    require_choice("device", kind, ("auto", *available()))
    if not colon:
        return torch.device(available()[0] if kind == "auto" else kind)
    n_devices = torch.cuda.device_count() if kind == "cuda" else 0
    ok = index.isdecimal() and int(index) < n_devices
    require(ok, "device", name, f"{kind}, with an index only for cuda (0 to {n_devices - 1})" if n_devices else kind)
    return torch.device(kind, int(index))


def fallbacks(device: torch.device) -> tuple[str, ...]:
    """What runs differently on `device` than on CUDA, in words for the user; nothing falls back unsaid."""
    if device.type == "cuda":
        return ("experts in float32: a matmul for each expert; grouped in bfloat16",)
    found = "no CUDA device found" if "cuda" not in available() else "CUDA is present but was not chosen"
    said = [f"{found}: running on {device.type}"]
    if device.type == "mps":
        said += ["experts: a matmul for each expert, not grouped", "float64: not available on mps"]
    return tuple(said)


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: allocated on a CUDA device, else resident of this process; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if find_spec("resource") is None:  # Windows
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Count from now on, where that can be chosen."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
