"""One thread per camera that decodes ahead into a bounded queue: nothing is dropped, and memory stays bounded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from recon.geometry.views import View
from recon.threads import Worker, start_all, wait_for

Item = tuple[int, View | str]
"""Frame number, and the view or the reason why there is none."""
_POLL_S = 0.1


class Decoders:
    """Runs one generator of items per camera in a thread of its own; `take` hands them out in order.

    A context manager: leaving it ends the threads, also in the middle of the recordings.
    """

    def __init__(self, streams: dict[str, Callable[[], Iterator[Item]]], ahead: int) -> None:
        self._stop = threading.Event()
        self._queues: dict[str, queue.Queue[Item | BaseException | None]] = {c: queue.Queue(ahead) for c in streams}
        self._threads = [Worker(f"decode-{camera}", self._run, camera, make) for camera, make in streams.items()]

    def __enter__(self) -> Decoders:
        start_all(self._threads, self._stop.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        wait_for(self._threads)

    def take(self, camera: str, number: int) -> View | str:
        """The item with this number. Numbers of a camera must be asked for in the order of its generator.

        Raises:
            whatever the camera's generator raised.
        """
        while True:
            found = self._queues[camera].get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                self._queues[camera].put(None)
                return "missing"
            if found[0] == number:
                return found[1]

    def _run(self, camera: str, make: Callable[[], Iterator[Item]]) -> None:
        try:
            for item in make():
                if not self._put(camera, item):
                    return
            self._put(camera, None)
        except BaseException as error:
            self._put(camera, error)

    def _put(self, camera: str, item: Item | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._queues[camera].put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
