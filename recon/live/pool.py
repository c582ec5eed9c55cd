"""A pool of depth workers: images in, depth at their own resolution out, in order, from any engine.

    with DepthAnythingPool("outputs/engines/none/da-mini-1x3x168x224_fp32.onnxruntime.engine", workers=4) as pool:
        for result in pool.map(images):
            ...

Every worker has a session of its own (an execution context over shared weights where the engine offers that) and, on
CUDA, a stream of its own. At most `waiting` images wait for a worker; whoever brings more has to wait too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from recon.errors import ReconError
from recon.geometry.views import DepthImage, Image, View

if TYPE_CHECKING:
    from recon.engines import Session

Predict = Callable[[View, "Session | None"], DepthImage]


@dataclass(frozen=True)
class PoolResult:
    """What became of one image. depth: [H,W] float32 at the image's size, None when the worker failed.

    error: why it failed, one sentence, empty otherwise. ms: time in the engine with its image processing; waited_ms:
    time before a worker was free. worker: index of the worker.
    """

    depth: DepthImage | None
    error: str
    ms: float
    waited_ms: float
    worker: int


class DepthAnythingPool:
    """Workers that turn images into depth. One image that fails costs no other: its result says why.

    engine: a built engine file, or a function that opens a session for one worker (it may return None where `predict`
    needs none). predict: what a worker does with a view and its session; by default Depth Anything's own processing
    at the size that the engine was built for. waiting: images that may wait for a worker; 0 = two per worker.

    Raises:
        ReconError: an engine cannot be opened; nothing is left running.
    """

    def __init__(
        self,
        engine: str | Path | Callable[[], Session | None],
        *,
        workers: int = 1,
        waiting: int = 0,
        predict: Predict | None = None,
    ) -> None:
        if workers < 1 or waiting < 0:
            raise ReconError(f"workers={workers} waiting={waiting}: at least 1 and 0", "one worker per camera suits")
        self._predict = predict or _depth_anything()
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting or 2 * workers)
        self._sessions = _open_all(engine, workers)
        self._closed = False
        self._lock = threading.Lock()
        self.frames = self.failures = self.most_waiting = 0
        self._threads = [
            threading.Thread(target=self._work, args=(index, session), name=f"depth-{index}", daemon=True)
            for index, session in enumerate(self._sessions)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, view: View | Image) -> Future[PoolResult]:
        """Hand over one frame ([H,W,3] uint8 RGB, or a view); waits while the queue is full. The future never raises.

        Raises:
            ReconError: the pool is closed.
        """
        if self._closed:
            raise ReconError("this depth pool is closed", "use it inside its `with` block")
        found = view if isinstance(view, View) else View("", self.frames, view)
        job = _Job(found, Future(), time.perf_counter())
        self._jobs.put(job)
        with self._lock:
            self.most_waiting = max(self.most_waiting, self._jobs.qsize())
        return job.future

    def map(self, views: Iterable[View | Image]) -> Iterator[PoolResult]:
        """Results in the order of `views`, which is read only as far ahead as there is room for."""
        ahead: deque[Future[PoolResult]] = deque()
        room = self._jobs.maxsize + len(self._threads)
        for view in views:
            ahead.append(self.submit(view))
            if len(ahead) >= room:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    @property
    def waiting(self) -> int:
        """Images that no worker has taken yet."""
        return self._jobs.qsize()

    def close(self) -> None:
        """Let the workers finish what was handed over, then free their sessions. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for session in self._sessions:
            if session is not None:
                session.close()

    def __enter__(self) -> DepthAnythingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _work(self, index: int, session: Session | None) -> None:
        with _own_stream(session):
            while (job := self._jobs.get()) is not None:
                result = self._one(job, index, session)
                with self._lock:
                    self.frames += 1
                    self.failures += bool(result.error)
                job.future.set_result(result)

    def _one(self, job: _Job, index: int, session: Session | None) -> PoolResult:
        start = time.perf_counter()
        waited = (start - job.submitted) * 1e3
        try:
            depth, error = self._predict(job.view, session), ""
        except Exception as failure:  # whatever an engine throws belongs to this frame alone
            reason = (str(failure).strip().splitlines() or [""])[0]
            depth, error = None, f"{type(failure).__name__}: {reason}" if reason else type(failure).__name__
        return PoolResult(depth, error, (time.perf_counter() - start) * 1e3, waited, index)


@dataclass(frozen=True)
class _Job:
    view: View
    future: Future[PoolResult]
    submitted: float


def _open_all(engine: str | Path | Callable[[], Session | None], workers: int) -> list[Session | None]:
    """One session per worker; when one cannot be opened, those before it are closed again."""
    from recon.store import open_engine

    opened = engine if callable(engine) else lambda: open_engine(Path(engine))
    sessions: list[Session | None] = []
    try:
        for _ in range(workers):
            first = sessions[0] if sessions else None
            sessions.append((first.sibling() if first is not None else None) or opened())
    except BaseException:
        for session in sessions:
            if session is not None:
                session.close()
        raise
    return sessions


def _own_stream(session: Session | None) -> AbstractContextManager[object]:
    """On CUDA, a stream for this worker alone: torch's own work and that of the engine go there."""
    if session is None or session.device == "cpu":
        return nullcontext()
    import torch

    stream: Any = torch.cuda.Stream  # torch leaves it untyped
    return torch.cuda.stream(stream(session.device))


def _depth_anything() -> Predict:
    from recon.config import option
    from recon.depth import Depth

    depth = option("depth", "da2-small")  # its processing reads the size off the session, so it suits every size
    assert isinstance(depth, Depth)
    return depth.predict
