"""What a run needs of a file system beside llmengine.files: a lock."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock that other processes see and that ends with this process, however it ends.

    A record lock: children of this process, which make batches, do not inherit it. Raises BlockingIOError.
    """
    with path.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise BlockingIOError(errno.EAGAIN, "another process trains in this folder", str(path.parent)) from None
        yield
