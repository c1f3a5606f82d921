"""Owns: how a file is written so that a reader never meets half of it, that a folder has one writer at a time, and what
a file says of its origin."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import logging
import os
import re
import shlex
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from opustomo import __version__
from opustomo.errors import UserError, printable

log = logging.getLogger("opustomo")

LOCK = ".lock"  # in a folder that is held
HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # of this machine, in names of temporary files
MOMENT = 0.2  # seconds: ``is_held`` takes a lock for less


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path``, on failure nothing is left.

    What was written is on the disk before it replaces: after a crash ``path`` is the old file or the new one.  Missing
    parent folders are made.  Raises UserError where the folder is not writable, the disk is full, or ``path`` is a
    device or pipe, which root could put a file in the place of.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: is a device or pipe, and a file is to be written; give another name")
    temporary = path.with_name(f".{path.name}.{HOST}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _to_disk(temporary)
        temporary.replace(path)
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, and a file is to be written; give another name") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({reason}); free space or choose another output folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def provenance() -> str:
    """Version and command line, one line: what a written map or STAR file says of its origin."""
    name, *words = sys.argv or ["opustomo"]
    return printable(" ".join(f"opustomo {__version__}: {shlex.join([Path(name).name, *words])}".split()))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8, surrogates kept) atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_csv(path: Path, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """Write a table with commas between, a line for ``header`` and for each of ``rows``, atomically."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write_text(path, buffer.getvalue())


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files that a killed process left of ``pattern``; only for who alone writes such files."""
    for old in folder.glob(f".{pattern}.*.tmp"):
        old.unlink(missing_ok=True)


def remove_dead(folder: Path) -> None:
    """Remove, in ``folder`` and below it, temporary files of processes of this machine that are no more.

    For folders that several programs may write into, each its own files: those of the living stay.
    """
    for old in filter(is_leftover, folder.rglob(".*.tmp")):
        if old.name.split(".")[-4] != HOST:
            continue
        try:
            os.kill(int(old.name.split(".")[-3]), 0)
        except ProcessLookupError:
            old.unlink(missing_ok=True)
        except OSError:  # somebody else's, and alive
            continue


def is_leftover(path: Path) -> bool:
    """Has ``path`` the name of a temporary file of ``atomic``, as a killed process leaves them?"""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}\.\d+\.\d+\.tmp", path.name) is not None


def hold(handle: IO[Any], folder: Path) -> None:
    """Lock an open file of ``folder`` until it is closed, if need be by the kernel: a dead process blocks nobody.

    Raises UserError where another process holds it.  File systems without locks: nothing is held.
    """
    held = _locked(handle)
    if not held:
        time.sleep(MOMENT)
        held = _locked(handle)
    if not held:
        raise UserError(
            f"{folder}: another process is writing into this folder (its command is in run.log); wait for it, stop it, "
            "or choose another folder with -o"
        )


def is_held(path: Path) -> bool:
    """Does another process hold this file (see ``hold``)?  False also where the file system has no locks."""
    with path.open("rb") as handle:
        return not _locked(handle, fcntl.LOCK_SH)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold it while the block runs, waiting for whoever holds it now.

    Leaves no lock file, nor a folder that is still empty.
    """
    path = folder / LOCK
    handle = _wait_for(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()
        with suppress(OSError):
            folder.rmdir()


def _wait_for(path: Path) -> IO[Any]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("a")
        except FileNotFoundError:  # the folder has just been removed by who held it before
            continue
        if not _locked(handle):
            log.info("%s: waiting for another process that is writing here", path.parent)
            fcntl.flock(handle, fcntl.LOCK_EX)
        # who held it may have removed the file between our opening and locking it
        with suppress(FileNotFoundError):
            if os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                return handle
        handle.close()


def _locked(handle: IO[Any], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise
    return True


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that has no such thing
            raise
    finally:
        os.close(descriptor)
