"""CUDA, as far as it can be seen without using it: no context is made here.

Source: https://docs.nvidia.com/cuda/wsl-user-guide/
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import dask.config

from dask_shm_bridge.doctor.machine import Machine
from dask_shm_bridge.doctor.result import Result

_WSL_FOLDER = "/usr/lib/wsl/lib"
_WSL_LIBRARY = f"{_WSL_FOLDER}/libcuda.so.1"
_LINUX_LIBRARIES = (
    "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
    "/usr/lib/aarch64-linux-gnu/libcuda.so.1",
    "/usr/lib64/libcuda.so.1",
)
_QUERY = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


def cuda(machine: Machine) -> Iterator[Result]:
    """Look for a GPU, its driver and CuPy."""
    system = machine.system
    listed = system.run(["nvidia-smi", *_QUERY])
    in_wsl = machine.wsl is not None and machine.wsl.version == 2
    if not listed and in_wsl:
        listed = system.run([f"{_WSL_FOLDER}/nvidia-smi", *_QUERY])
    if not listed:
        yield _without_answer(machine, in_wsl)
        return
    text = "; ".join(line.strip() for line in listed.splitlines() if line.strip())
    if in_wsl and machine.wsl is not None and not machine.wsl.container:
        others = [path for path in _LINUX_LIBRARIES if _is_another(machine, path)]
        if others:
            yield Result(
                "cuda",
                "warn",
                f"{text}; {others[0]} hides the driver that Windows gives WSL",
                "remove the Linux driver: WSL uses that of Windows",
            )
            return
    if importlib.util.find_spec("cupy") is None:
        yield Result(
            "cuda",
            "warn",
            f"{text}; CuPy is not installed, so this is no GPU worker",
            "pip install 'dask-shm-bridge[cuda]'",
        )
        return
    yield Result("cuda", "ok", text)


def _without_answer(machine: Machine, in_wsl: bool) -> Result:
    if in_wsl and not machine.system.exists("/dev/dxg"):
        return Result("cuda", "n/a", "no GPU: there is no /dev/dxg (gpuSupport in .wslconfig)")
    if in_wsl and not machine.system.exists(_WSL_LIBRARY):
        return Result(
            "cuda",
            "n/a",
            f"no NVIDIA GPU: there is no {_WSL_LIBRARY}",
            "if there should be one, install NVIDIA's driver on Windows, and none in WSL",
        )
    if in_wsl or machine.system.exists("/proc/driver/nvidia/version"):
        return Result(
            "cuda",
            "fail",
            "there is a driver, but nvidia-smi does not answer",
            "update the driver" + (" on Windows, then wsl --shutdown" if in_wsl else ""),
        )
    return Result("cuda", "n/a", "no NVIDIA GPU")


def _is_another(machine: Machine, path: str) -> bool:
    return machine.system.exists(path) and not machine.system.resolve(path).startswith(
        "/usr/lib/wsl/"
    )


def pinned(machine: Machine) -> Iterator[Result]:
    """Say what is known of pinned memory here."""
    cuda_ = next(cuda(machine))
    if cuda_.state == "n/a":
        yield Result("pinned memory", "n/a", "no NVIDIA GPU")
        return
    if not dask.config.get("shm-bridge.cuda.pin", default=True):
        yield Result("pinned memory", "ok", "shm-bridge.cuda.pin is false: nothing is pinned")
        return
    limit = dask.config.get("shm-bridge.cuda.pin-limit", default=None)
    if machine.wsl is None:
        yield Result("pinned memory", "ok", f"shm-bridge.cuda.pin-limit is {limit or 'open'}")
        return
    yield Result(
        "pinned memory",
        "ok",
        f"shm-bridge.cuda.pin-limit is {limit or 'open'}. WSL2 limits pinned memory, and nothing "
        "tells to what; what CUDA refuses goes by way of a small buffer",
        "look at pinned_bytes and at the fallback not-pinned in stats; a pin-limit of what was "
        "reached spares the attempts",
    )
