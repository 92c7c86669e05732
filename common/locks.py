"""One process at a time in a folder: the second trainer or eval is told at once who is there.

The lock is an flock on a file in that folder. The kernel releases it when the process dies, so a
kill leaves nothing that has to be cleaned up.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from common.files import InputError, open_no_link, warn
from common.processes import rank

NAME = ".nanomole.lock"


@contextlib.contextmanager
def alone(folder: Path | str) -> Iterator[None]:
    """Nobody else is inside `with alone(folder)` meanwhile; makes the folder where it is missing.

    Raises InputError, with the process that is there and since when, or where the folder can't be
    written. At the end the lock's file goes, and so do the folders it needed if they are empty. Of several
    processes that compute together the first holds the lock for all.
    """
    if rank():
        yield
        return
    path = Path(folder) / NAME
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _lock(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
        file.close()
        with contextlib.suppress(OSError):  # not empty
            for parent in missing:
                parent.rmdir()


def _lock(path: Path) -> TextIO:
    """The open file `path`, locked, with who and since when in it."""
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace", opener=open_no_link)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read(200).strip() or "another process"
            file.close()
            hint = "wait for its end, or name another folder"
            raise InputError(f"{path.parent}: {who} is at work here: {hint}") from None
        except OSError as error:
            warn(f"{path}: no lock ({error.strerror}): don't start a second process here")
        if _is_at(file, path):
            break
        file.close()  # its holder removed it before it was locked here
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {since})\n")
    file.flush()
    return file


def _is_at(file, path):
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False
