"""The machine around the numbers: cores, memory, several processes, and the folder that runs would write into.

Owns: what is tried: a spawned process that reads shared memory, a port, a file written, read back and removed.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shlex
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import IO

from opustomo.data.findings import Finding, megabytes
from opustomo.machine import cores, free_memory, total_memory

LEAST_MEMORY, SMALL_MEMORY = 0.5e9, 2e9  # Python with its libraries; a small set with its network
LEAST_SPACE, SMALL_SPACE = 0.1e9, 2e9  # a few checkpoints; cache and checkpoints of some thousand small subtomograms
SHARED = Path("/dev/shm")
SMALL_SHARED = 256e6  # containers give 64 MB unless told; NCCL takes some ten MB for each GPU
PROBE, BLOCK = 64 << 20, 4 << 20  # bytes of the file that is written, at once
WRITE_SECONDS = 2.0  # the writing ends after this; slow disks have shown themselves by then
SLOW = 30e6  # bytes a second
ANSWER_SECONDS = 20.0
WORD = b"opustomo"
REASONS = {
    errno.ENOSPC: ("the disk is full", "free space, or choose another folder for -o"),
    errno.EDQUOT: ("your disk quota is used up", "free space, or choose another folder for -o"),
    errno.EACCES: ("may not be written to", "change its permissions, or choose another folder for -o"),
    errno.EPERM: ("may not be written to", "change its permissions, or choose another folder for -o"),
    errno.EROFS: ("is on a file system that is read-only", "choose another folder for -o"),
}


def core_finding() -> Finding:
    """How many cores this process may use, and what limits it."""
    found = cores()
    limits = []
    if found.allowed < found.machine:
        limits.append(f"affinity {found.allowed}")
    if found.quota is not None and found.quota < found.allowed:
        limits.append(f"quota {found.quota:.3g}")
    text = f"{found.usable} of {found.machine} may be used" + (f" ({', '.join(limits)})" if limits else "")
    values = {"machine": found.machine, "allowed": found.allowed, "quota": found.quota, "usable": found.usable}
    if found.usable == 1 < found.machine:
        fix = "ask the batch system or container for more, e.g. --cpus-per-task 8 or --cpus 8: one is slow"
        return Finding("warning", "cores", text, fix, values)
    return Finding("ok", "cores", text, values=values)


def memory_findings() -> list[Finding]:
    """Memory that a run could get, and what several processes can share."""
    free, total = free_memory(), total_memory()
    text, values = f"{megabytes(free)} can be used of {megabytes(total)}", {"free": free, "total": total}
    if free < LEAST_MEMORY:
        memory = Finding("error", "memory", text, "too little for any run: end other programs, or ask for more", values)
    elif free < SMALL_MEMORY:
        memory = Finding("warning", "memory", text, "enough for small sets only: lower --downfrac and -b", values)
    else:
        memory = Finding("ok", "memory", text, values=values)
    return [memory, _shared_memory()]


def _shared_memory() -> Finding:
    try:
        size, free = shutil.disk_usage(SHARED)[0::2]
    except OSError:
        return Finding("note", "shared memory", f"no {SHARED} here", "needed for --multigpu only")
    text, values = f"{megabytes(free)} free of {megabytes(size)} in {SHARED}", {"free": free, "total": size}
    if free < SMALL_SHARED:
        fix = "for --multigpu give containers more (docker run --shm-size 1g); one process needs none"
        return Finding("warning", "shared memory", text, fix, values)
    return Finding("ok", "shared memory", text, values=values)


def process_findings() -> list[Finding]:
    """Can a process be started (spawned, as --multigpu does; nothing here forks), share memory, open a port?"""
    start = time.monotonic()
    try:
        _exchange()
        with socket.socket() as port:
            port.bind(("localhost", 0))
            port.listen()
    except (OSError, EOFError, TimeoutError) as error:
        reason = str(error) or type(error).__name__
        fix = "train in one process: without --multigpu and --num-gpus; ask who runs this machine about its limits"
        return [Finding("warning", "processes", f"several cannot work together ({reason})", fix)]
    seconds = time.monotonic() - start
    text = f"another was started and shared memory and a port in {seconds:.1f} s"
    return [Finding("ok", "processes", text, values={"seconds": seconds})]


def _exchange() -> None:
    """Start a process that reads a word from shared memory and sends it back; raises OSError where it does not."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    memory = SharedMemory(create=True, size=len(WORD))
    process = context.Process(target=_answer, args=(memory.name, there), daemon=True)
    try:
        _bytes_of(memory)[:] = WORD
        process.start()
        there.close()  # the other's end is the only one left: its death is noticed
        if not here.poll(ANSWER_SECONDS):
            raise TimeoutError(f"no answer in {ANSWER_SECONDS:.0f} s")
        if here.recv_bytes() != WORD:
            raise OSError("shared memory holds something else there")
    finally:
        if process.is_alive():
            process.join(5.0)
        if process.is_alive():
            process.kill()
        memory.close()
        memory.unlink()


def _answer(name: str, back: Connection) -> None:
    memory = SharedMemory(name)
    try:
        back.send_bytes(bytes(_bytes_of(memory)))
    finally:
        memory.close()


def _bytes_of(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None  # open
    return memory.buf[: len(WORD)]  # the system gives whole pages


def disk_findings(folder: Path) -> list[Finding]:
    """Space in ``folder``, and what a temporary file that is written to the disk there and read back shows."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "no such folder"
        fix = "give a folder" if folder.exists() else f"mkdir -p {shlex.quote(str(folder))}, or give another"
        return [Finding("error", "folder", f"{folder}: {found}", fix)]
    try:
        space = _space(folder)
        if space.level == "error":
            return [space]
        # it has no name, or loses it when it is closed
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            return [space, _speed(file), *_lock_findings(file)]
    except OSError as error:
        other = (f"cannot be written to ({error.strerror or error})", "choose another folder for -o")
        found, fix = REASONS.get(error.errno or 0, other)
        return [Finding("error", "folder", f"{folder}: {found}", fix)]


def _space(folder: Path) -> Finding:
    disk = os.statvfs(folder)
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    text, values = f"{megabytes(free)} free of {megabytes(total)}", {"free": free, "total": total}
    fix = "free some, or choose another folder for -o"
    if free < LEAST_SPACE:
        return Finding("error", "space", text, f"too little for any run: {fix}", values)
    if disk.f_files and disk.f_favail == 0:
        return Finding("error", "space", f"{text}, but no file more can be made (inodes used up)", fix, values)
    if free < SMALL_SPACE:
        words = "enough for small sets only (opustomo check PARTICLES tells what a set needs)"
        return Finding("warning", "space", text, f"{words}: {fix}", values)
    return Finding("ok", "space", text, values=values)


def _speed(file: IO[bytes]) -> Finding:
    """Raises OSError where nothing can be written."""
    blocks = [os.urandom(BLOCK) for _ in range(2)]  # what compresses would seem fast
    start = time.perf_counter()
    count = _fill(file, blocks)
    write = count * BLOCK / (time.perf_counter() - start)
    with suppress(OSError, AttributeError):  # read from the disk, not from memory, where the system can
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    file.seek(0)
    start = time.perf_counter()
    same = all(_read(file) == blocks[i % 2] for i in range(count))
    read = count * BLOCK / (time.perf_counter() - start)
    values = {"write_bytes_per_second": write, "read_bytes_per_second": read, "bytes": count * BLOCK}
    text = f"{megabytes(count * BLOCK)} written to the disk at {_rate(write)}, read at {_rate(read)}"
    if not same:
        fix = "this disk cannot be trusted: choose another folder for -o"
        return Finding("error", "speed", f"{text}: other bytes than were written", fix, values)
    if min(write, read) < SLOW:
        fix = "slow: keep the cache on a disk of this machine (train --cache FOLDER), or train --no-cache"
        return Finding("warning", "speed", text, fix, values)
    return Finding("ok", "speed", text, values=values)


def _fill(file: IO[bytes], blocks: list[bytes]) -> int:
    """Write blocks to the disk, each at once, until the probe is whole or time is up; how many, at least one."""
    start, count = time.perf_counter(), 0
    while count * BLOCK < PROBE and (count == 0 or time.perf_counter() - start < WRITE_SECONDS):
        view = memoryview(blocks[count % 2])
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
        count += 1
    return count


def _read(file: IO[bytes]) -> bytes:
    parts: list[bytes] = []
    while (left := BLOCK - sum(map(len, parts))) and (part := file.read(left)):
        parts.append(part)
    return b"".join(parts)


def _lock_findings(file: IO[bytes]) -> list[Finding]:
    """Locks keep two programs from writing into one folder; some network file systems have none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return [
            Finding("note", "locks", "this file system has none", "take care that no two runs write into one folder")
        ]
    return [Finding("ok", "locks", "two programs that write into one folder are noticed")]


def _rate(bytes_per_second: float) -> str:
    return f"{megabytes(bytes_per_second)}/s"
