"""Which ptxas turns the kernels into machine code.

ptxas 12.8 (12.8.93, which Triton 3.6 and 3.7 use for Hopper) gets some of them wrong. Of some 64-bit sums of a uniform register
pair and a constant with the sign bit set it makes `URx = URx + c`, and forgets that the source was another register. The matrix
descriptors of operands 16 or 32 elements wide are such sums (a head dim of 72 = 64 + 16, or values 1 wide): out was wrong, or the
address of a load. It mostly shows in the machine code, at optimisation levels 1, 2 and 3, as a uniform register that is read and
never written; of 242 kernels compiled for sm_90 in 8, and from 12.9.86 and 13.5 in none. What came out wrong is right on an H200
from 12.9.86 and 13.0. Triton ships a newer ptxas for Blackwell, which assembles for Hopper too: that one is taken.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from triton import knobs

__all__ = ["chosen", "trouble"]

SOUND = (12, 9)  # the first release of ptxas without the fault
_TOOLS = ("ptxas", "ptxas_blackwell")  # in the order of preference: the user's own choice (TRITON_PTXAS_PATH) is the first
_lock = threading.RLock()


def _release(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))


def _driver() -> tuple[int, int]:
    """The CUDA release of the driver: code of a ptxas of a later major release may not load. (0, 0) if it cannot be asked."""
    found = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(found))
    except OSError:
        return 0, 0
    version = found.value  # 12080 for CUDA 12.8
    return version // 1000, version % 1000 // 10


@lru_cache(maxsize=1)
def _sound() -> Any:
    """Triton's tool to use, or None. Once a process: it asks each tool for its release."""
    for name in _TOOLS:
        tool = getattr(knobs.nvidia, name, None)
        if tool is not None and _release(tool) >= SOUND and (name == _TOOLS[0] or _release(tool)[0] <= _driver()[0]):
            return tool
    return None


@contextmanager
def chosen() -> Iterator[None]:
    """Kernels compiled inside are assembled by a sound ptxas, if there is one."""
    tool = _sound() if torch.version.cuda and torch.cuda.is_available() else None
    if tool is None:
        yield
        return
    with _lock, knobs.nvidia.scope():
        knobs.nvidia.ptxas = tool.path
        yield


def trouble(device: torch.device) -> tuple[str, str] | None:
    """What was seen and what was needed, where kernels for this device could come out wrong: a Hopper GPU, and no sound ptxas."""
    if device.type != "cuda" or not torch.version.cuda or torch.cuda.get_device_capability(device)[0] != 9:
        return None
    if _sound() is not None:
        return None
    release = ".".join(map(str, SOUND))
    return (
        f"ptxas {knobs.nvidia.ptxas.version}, which makes wrong machine code of some kernels for this GPU",
        f"ptxas {release} or later that the driver can load code of: update Triton, or set TRITON_PTXAS_PATH to one",
    )
