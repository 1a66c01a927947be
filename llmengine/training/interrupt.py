"""SIGINT and SIGTERM as a request to stop after the step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered: the first signal sets `name`; a second one does what it did before, which aborts at once.

    Python delivers signals to the main thread only; entered elsewhere, this does nothing.
    """

    name: str | None = None

    def __enter__(self) -> StopRequest:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._asked) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.__exit__()
        # print is not reentrant, and a signal may come while it runs
        os.write(2, f"\n{self.name}: saving after this step; once more stops at once\n".encode())
