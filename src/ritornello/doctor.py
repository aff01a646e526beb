"""What this machine and installation can run, for a bug report. Nothing in it names the user or their files."""

import os
import platform
import shutil
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from ritornello import __version__

PACKAGES = (
    "torch numpy safetensors tokenizers tyro pydantic rich matplotlib pyarrow datasets tensorboard "
    "transformers lm-eval peft trl"
)
GIB = 2**30
Kind = TypeVar("Kind")


def report() -> dict[str, Any]:
    """Every finding by name; values are strings, numbers, lists or None where the system does not tell."""
    found: dict[str, Any] = {
        "ritornello": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES.split()},
    }
    try:
        import torch  # noqa: F401 - a broken installation is what doctor is asked about
    except (ImportError, OSError) as error:
        found["torch error"] = str(error).splitlines()[0]
    else:
        found |= _torch_report()
    return found | {
        "C++ compiler": next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None),
        "memory": _memory(),
        "disk": f"{shutil.disk_usage(Path.cwd()).free / GIB:.1f} GiB free here",
    }


def text(found: dict[str, Any]) -> str:
    """One line for each finding of `report`."""
    return "\n".join(f"{name + ':':<15}{_plain(value)}" for name, value in found.items())


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(_plain, value)) or "none"
    return "not known" if value is None else str(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _torch_report() -> dict[str, Any]:
    import torch

    from ritornello.device import available, fallbacks, pick_device

    device = pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.cpu.get_capabilities()["cpu_name"]
    return {
        "device": f"{device.type} ({name}); available: {', '.join(available())}",
        "fallbacks": fallbacks(device),
        "CUDA": torch.version.cuda or "not built in",
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {'native' if _native_bf16() else 'emulated'} bf16",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "kernels": _kernels(device),
    }


def _native_bf16() -> bool:
    import torch

    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def _kernels(device: Any) -> dict[str, str]:
    """Each kernel tried once on tiny tensors: what a build claims and what runs are not always the same."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def grouped_mm(dtype: torch.dtype) -> None:
        x, w = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(2, 16, 16, device=device, dtype=dtype)
        F.grouped_mm(x, w, offs=torch.tensor([8, 16], device=device, dtype=torch.int32))

    def attention(backend: SDPBackend) -> None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        q = torch.ones(1, 1, 16, 64, device=device, dtype=dtype)
        with sdpa_kernel(backend):
            F.scaled_dot_product_attention(q, q, q)

    return {
        "grouped_mm float32": _try(grouped_mm, torch.float32),
        "grouped_mm bfloat16": _try(grouped_mm, torch.bfloat16),
        "attention flash": _try(attention, SDPBackend.FLASH_ATTENTION),
        "attention efficient": _try(attention, SDPBackend.EFFICIENT_ATTENTION),
        "attention cudnn": _try(attention, SDPBackend.CUDNN_ATTENTION),
        "attention math": _try(attention, SDPBackend.MATH),
    }


def _try(kernel: Callable[[Kind], None], kind: Kind) -> str:
    with warnings.catch_warnings(action="ignore"):  # torch warns why a backend refuses, then raises
        try:
            kernel(kind)
        except (RuntimeError, NotImplementedError):
            return "no"
    return "yes"


def _memory() -> str | None:
    names = os.sysconf_names
    if "SC_PHYS_PAGES" not in names:
        return None
    page = os.sysconf("SC_PAGE_SIZE") / GIB
    free = f"{os.sysconf('SC_AVPHYS_PAGES') * page:.1f} of " if "SC_AVPHYS_PAGES" in names else ""
    return f"{free}{os.sysconf('SC_PHYS_PAGES') * page:.1f} GiB" + (" free" if free else "")
