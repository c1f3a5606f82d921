"""Where the numbers are made: GPUs that really compute, and threads that really help.

Owns: the comparison of torch's build with driver and GPU, a small convolution on every GPU, a matrix product with one
thread and with all.  torch is given, so that a machine without it can be asked for the rest.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from opustomo.data.findings import Finding, first_line, listed, megabytes
from opustomo.machine import cores

DRIVER = Path("/proc/driver/nvidia/version")
BUILDS = "PyTorch's install page gives the line for each CUDA version"
SMALL_GPU = 4e9  # bytes free below which a network of usual sizes does not fit
PRODUCT = 1024  # edge of the matrices: 2 GFlop, some 50 ms of one thread
HELPS = 1.25  # times as fast
TOLERANCE = 0.02  # GPUs may round products to ten bits


def gpu_findings(torch: Any) -> list[Finding]:
    """What the runs would compute on; an error where they would choose a GPU that then fails."""
    driver, highest = driver_version(), driver_cuda()
    built = torch.version.cuda or torch.version.hip
    with warnings.catch_warnings():  # torch's own words about drivers: said below
        warnings.simplefilter("ignore")
        count = torch.cuda.device_count()  # as the runs count
        if count == 0:
            return [_none(built, driver, highest)]
        found = [finding for i in range(count) for finding in _one_gpu(torch, i, highest)]
    if count > 1:
        words = f"{count} GPUs; one run uses one unless told"
        found.append(Finding("note", "several", words, f"opustomo train --num-gpus {count} --multigpu"))
        if not torch.distributed.is_nccl_available():
            fix = f"one GPU, or another build: {BUILDS}"
            found.append(Finding("warning", "NCCL", "this torch has none: --multigpu cannot work", fix))
    return found


def _none(built: str | None, driver: str | None, highest: tuple[int, int] | None) -> Finding:
    values = {"driver": driver, "driver_cuda": highest, "torch_cuda": built, "gpus": 0}
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None and highest is None:
        found = "none here that torch could use"
        return Finding("note", "GPU", found, "runs use the CPU, which takes longer", values)
    driver = driver or "of unknown version"  # its kernel part is not seen under WSL
    if built is None:
        found = f"an NVIDIA driver ({driver}) is here, but this torch is a CPU build"
        fix = f"to use the GPU: pip install --force-reinstall torch, in a CUDA build ({BUILDS})"
        return Finding("warning", "GPU", found, fix, values)
    if hidden is not None:
        found = f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU"
        return Finding("warning", "GPU", found, "unset it, or runs use the CPU", values)
    found = f"an NVIDIA driver ({driver}) is here, but no GPU answers"
    if highest is not None and too_old(highest, built):
        found += f"; it knows CUDA up to {highest[0]}.{highest[1]}, this torch is built for {built}"
        return Finding("warning", "GPU", found, f"update the driver, or install an older build: {BUILDS}", values)
    fix = "ask nvidia-smi; in a container start it with the GPUs (docker run --gpus all); else runs use the CPU"
    return Finding("warning", "GPU", found, fix, values)


def _one_gpu(torch: Any, index: int, highest: tuple[int, int] | None) -> list[Finding]:
    topic = f"GPU {index}"
    try:
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return [Finding("error", topic, f"cannot be used ({first_line(error)})", _driver_fix(torch, highest))]
    values: dict[str, Any] = {
        "name": name, "capability": capability, "memory": total, "free": free, "driver": driver_version(),
    }  # fmt: skip
    found = f"{name}, {megabytes(total)} of memory, {megabytes(free)} free, compute capability {_dotted(capability)}"
    architectures = [] if torch.version.hip else torch.cuda.get_arch_list()
    if architectures and not runs_on(capability, architectures):
        problem = f"{found}; this torch is built for {listed(architectures, 12)}"
        fix = f"install a build for this GPU ({BUILDS}, older ones too), or train with --device cpu"
        return [Finding("error", topic, problem, fix, values)]
    try:
        wrong = convolution_error(torch, torch.device("cuda", index))
    except RuntimeError as error:
        problem = f"{found}; a small convolution fails on it ({first_line(error)})"
        return [Finding("error", topic, problem, _driver_fix(torch, highest), values)]
    values["convolution_error"] = wrong
    if not wrong <= TOLERANCE:
        problem = f"{found}; a small convolution on it is wrong by {wrong:.2g} of its size"
        return [Finding("error", topic, problem, "another torch build or driver; this one cannot be trusted", values)]
    if free < min(SMALL_GPU, 0.5 * total):
        fix = "other programs hold it (nvidia-smi lists them): wait, or use another with CUDA_VISIBLE_DEVICES"
        return [Finding("warning", topic, found, fix, values)]
    return [Finding("ok", topic, f"{found}; a small convolution gives the CPU's result", values=values)]


def _driver_fix(torch: Any, highest: tuple[int, int] | None) -> str:
    built = torch.version.cuda
    if built and highest is not None and too_old(highest, built):
        knows = f"the driver knows CUDA up to {highest[0]}.{highest[1]}, this torch is built for {built}"
        return f"{knows}: update the driver or install an older build ({BUILDS}), or train with --device cpu"
    return "look at nvidia-smi: another program may hold it; or train with --device cpu"


def convolution_error(torch: Any, device: Any) -> float:
    """Largest difference between a 3-D convolution and its gradient on ``device`` and on the CPU, over their size."""
    generator = torch.Generator().manual_seed(0)
    volume, kernel = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8, 8), (4, 4, 3, 3, 3)))
    results = []
    for place in (torch.device("cpu"), device):
        weight = kernel.to(place).requires_grad_()
        out = torch.nn.functional.conv3d(volume.to(place), weight, padding=1)
        out.square().sum().backward()
        results.append((out.detach().cpu(), weight.grad.cpu()))
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in zip(*results, strict=True))


def runs_on(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Has a build code for a GPU of this capability: machine code of its major version, or code it can translate?"""
    for kind, digits in re.findall(r"(sm|compute)_(\d+)(?![\da-z])", " ".join(architectures)):
        major, minor = int(digits[:-1]), int(digits[-1])
        if (major == capability[0] and minor <= capability[1]) or (kind == "compute" and (major, minor) <= capability):
            return True
    # sm_90a and the like hold for exactly that GPU
    return any(name.startswith(f"sm_{capability[0]}{capability[1]}") for name in architectures)


def too_old(highest: tuple[int, int], built: str) -> bool:
    """Is the driver of an older major CUDA version than torch?  Within one, older drivers do."""
    return highest[0] < int(built.split(".")[0])


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, None where there is none."""
    with suppress(OSError):
        text = DRIVER.read_text()
        match = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", text)
        return match[1] if match else "unknown version"
    return None


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA version that the driver's library knows, None where there is none."""
    with suppress(OSError, AttributeError):
        number = ctypes.c_int(0)
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
            return number.value // 1000, number.value % 1000 // 10
    return None


def thread_findings(torch: Any) -> list[Finding]:
    """How many threads torch would use, and whether more than one make a product faster here and now."""
    usable, used = cores().usable, torch.get_num_threads()
    stated = os.environ.get("OMP_NUM_THREADS")
    values: dict[str, Any] = {"threads": used, "usable": usable, "OMP_NUM_THREADS": stated}
    source = f"OMP_NUM_THREADS={stated}: " if stated else ""
    if usable == 1:
        found, fix = f"{source}torch would use {_threads(used)} on one core", ""
        if used > 1:
            fix = "export OMP_NUM_THREADS=1: more threads than cores wait for each other"
        return [Finding("warning" if fix else "ok", "threads", found, fix, values)]
    one, all_ = (product_seconds(torch, count) for count in (1, usable))
    speedup = one / all_
    values |= {"seconds_one_thread": one, "seconds_all": all_, "speedup": speedup}
    found = f"{source}torch would use {_threads(used)}; {_threads(usable)} are {speedup:.2g} times as fast as one"
    if used > usable:
        fix = f"export OMP_NUM_THREADS={usable}: more threads than cores wait for each other"
        return [Finding("warning", "threads", found, fix, values)]
    if speedup < HELPS:
        fix = f"other programs are at work, or cores share one unit: --workers 1 may be as fast ({_load()})"
        return [Finding("note" if used == 1 else "warning", "threads", found, fix, values)]
    if used < usable:
        fix = f"unset OMP_NUM_THREADS or give --workers {usable}" if stated else f"--workers {usable}"
        return [Finding("note", "threads", found, fix, values)]
    return [Finding("ok", "threads", found, values=values)]


def product_seconds(torch: Any, threads: int) -> float:
    """The fastest of five products of two matrices with so many threads; torch keeps its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = torch.ones(PRODUCT, PRODUCT)
        return min(_seconds(torch, matrix) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def _seconds(torch: Any, matrix: Any) -> float:
    start = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - start


def _load() -> str:
    return f"load {os.getloadavg()[0]:.1f}"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
