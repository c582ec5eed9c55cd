"""A pool of depth workers: images in, depth at their own resolution out, in order, from any engine.

    with DepthAnythingPool("outputs/engines/none/da-mini-1x3x168x224_fp32.onnxruntime.engine", workers=4) as pool:
        for result in pool.map(images):
            ...

Every worker has a session of its own (an execution context over shared weights where the engine offers that) and, on
CUDA, a stream of its own. At most `waiting` jobs wait for a worker; whoever brings more has to wait too. Images that
lie on a device already are handed in by `submit_images`, as many at once as the engine takes, and their depth stays
there.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import DepthImage, Image, View
from recon.threads import Worker, start_all, wait_for

if TYPE_CHECKING:
    import torch

    from recon.depth import Depth
    from recon.engines import Session
    from recon.live.clock import Moments

log = logging.getLogger(__name__)

Predict = Callable[[View, "Session | None"], DepthImage]
PredictSeveral = Callable[[list[View], "Session | None"], list[DepthImage]]
PredictAll = Callable[[list[View], "torch.Tensor", "Session | None"], "torch.Tensor"]


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


@dataclass(frozen=True)
class ImagesResult:
    """What became of images that lie on a device. views: how many. depth: [views,H,W] float32 on that device, None when
    the worker failed. span: from when its stream began with them to when depth is there: call `span.wait()` before use.

    error, waited_ms, worker: as in PoolResult.
    """

    views: int
    depth: torch.Tensor | None
    error: str
    span: Moments
    waited_ms: float
    worker: int


class DepthAnythingPool:
    """Workers that turn images into depth. One image that fails costs no other: its result says why.

    engine: a built engine file, or a function that opens a session for one worker (it may return None where `predict`
    needs none). predict: what a worker does with a view and its session; by default Depth Anything's own processing
    at the size that the engine was built for. predict_several: the same for as many views as the engine takes at once,
    see `Depth.predict_several`; by default one after another. predict_all: the same for images on a device, see
    `Depth.predict_all`; by default what `predict` gives, uploaded. waiting: jobs that may wait for a worker; 0 = two
    per worker.

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
        predict_several: PredictSeveral | None = None,
        predict_all: PredictAll | None = None,
    ) -> None:
        if workers < 1 or waiting < 0:
            raise ReconError(f"workers={workers} waiting={waiting}: at least 1 and 0", "one worker per camera suits")
        if predict is None:
            depth = _depth_anything()
            predict, predict_several = depth.predict, predict_several or depth.predict_several
            predict_all = predict_all or depth.predict_all
        self._predict, self._predict_all = predict, predict_all or partial(_uploaded, predict)
        self._predict_several = predict_several or partial(_in_turn, predict)
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting or 2 * workers)
        self._sessions = _open_all(engine, workers)
        self._closed = False
        self._lock = threading.Lock()
        self.frames = self.failures = self.retried = self.most_waiting = 0
        self._threads = [
            Worker(f"depth-{index}", self._work, index, session) for index, session in enumerate(self._sessions)
        ]
        start_all(self._threads, partial(self._jobs.put, None))

    def submit(self, view: View | Image) -> Future[PoolResult]:
        """Hand over one frame ([H,W,3] uint8 RGB, or a view); waits while the queue is full. The future never raises.

        Raises:
            ReconError: the pool is closed.
        """
        return self.submit_all([view])[0]

    def submit_all(self, views: Sequence[View | Image]) -> list[Future[PoolResult]]:
        """`submit` for several at once, of any sizes: one job for as many as the engine takes at once, in order.

        Raises:
            ReconError: the pool is closed.
        """
        whole = [view if isinstance(view, View) else View("", self.frames + i, view) for i, view in enumerate(views)]
        jobs = [_Job(whole[start : start + self.batch]) for start in range(0, len(whole), self.batch)]
        for job in jobs:
            self._put(job)
        return [future for job in jobs for future in job.futures]

    def submit_images(self, views: list[View], images: torch.Tensor) -> list[Future[ImagesResult]]:
        """Hand over views of one size whose images [N,H,W,3] uint8 are on a device, in what the current stream does.

        One job for as many as the engine takes at once, in order; otherwise as `submit`, but that a future raises what
        the device itself does.

        Raises:
            ReconError: the pool is closed.
        """
        from recon.live.clock import Moments

        there = Moments(images.device)
        there.mark()
        jobs = [
            _Job(views[start : start + self.batch], images[start : start + self.batch], there)
            for start in range(0, len(views), self.batch)
        ]
        for job in jobs:
            self._put(job)
        return [future for job in jobs for future in job.futures]

    @property
    def device(self) -> str | None:
        """Where the engine runs; None where there is none."""
        return self._sessions[0].device if self._sessions[0] is not None else None

    @property
    def batch(self) -> int:
        """Images that the engine takes at once."""
        session = self._sessions[0]
        return 1 if session is None else max(1, next(iter(session.inputs.values())).shape[0])

    def map(self, views: Iterable[View | Image]) -> Iterator[PoolResult]:
        """Results in the order of `views`, which is read only as far ahead as there is room for, a batch at a time."""
        ahead: deque[Future[PoolResult]] = deque()
        room = (self._jobs.maxsize + len(self._threads)) * self.batch
        left = iter(views)
        while some := list(islice(left, self.batch)):
            ahead.extend(self.submit_all(some))
            while len(ahead) >= room:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    @property
    def waiting(self) -> int:
        """Images that no worker has taken yet."""
        return self._jobs.qsize()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is handed in and finished inside is not in the counters."""
        before = self.frames, self.failures, self.retried, self.most_waiting
        try:
            yield
        finally:
            with self._lock:
                self.frames, self.failures, self.retried, self.most_waiting = before

    def close(self) -> None:
        """Let the workers finish what was handed over, then free their sessions. May be called twice."""
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        wait_for(self._threads)
        for session in self._sessions:
            if session is not None:
                session.close()

    def __enter__(self) -> DepthAnythingPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _put(self, job: _Job) -> None:
        if self._closed:
            raise ReconError("this depth pool is closed", "use it inside its `with` block")
        self._jobs.put(job)
        with self._lock:
            self.most_waiting = max(self.most_waiting, self._jobs.qsize())

    def _work(self, index: int, session: Session | None) -> None:
        """A worker's thread: it answers every job that it takes, also where it gets no stream of its own."""
        with ExitStack() as stack:
            _, lost = _attempted(lambda: stack.enter_context(_own_stream(session)))
            while (job := self._jobs.get()) is not None:
                try:
                    results = self._several(job, index, session, lost)
                except BaseException as failure:  # outside of the network: the device itself
                    for future in job.futures:
                        future.set_exception(failure)
                else:
                    self._settle(job, results)

    def _settle(self, job: _Job, results: Sequence[PoolResult | ImagesResult]) -> None:
        with self._lock:
            self.frames += len(job.views)
            self.failures += sum(bool(result.error) for result in results) * len(job.views) // len(results)
        for future, result in zip(job.futures, results, strict=True):
            future.set_result(result)

    def _several(
        self, job: _Job, index: int, session: Session | None, lost: str
    ) -> Sequence[PoolResult | ImagesResult]:
        """Where several together fail, each is tried alone, so that the one at fault costs no other."""
        if job.images is not None:
            return [self._all(job, index, session, lost)]
        start = time.perf_counter()
        together: list[DepthImage] | None = None
        if len(job.views) > 1 and not lost:
            together, reason = _attempted(lambda: self._predict_several(job.views, session))
            if together is None:
                self._note_retry(reason)
        found: list[tuple[DepthImage | None, str]]
        if together is not None:
            found = [(depth, "") for depth in together]
        else:
            found = [(None, lost) if lost else _attempted(partial(self._predict, view, session)) for view in job.views]
        ms = (time.perf_counter() - start) * 1e3
        return [PoolResult(depth, error, ms, job.waited_ms(start), index) for depth, error in found]

    def _note_retry(self, reason: str) -> None:
        with self._lock:
            self.retried += 1
            first = self.retried == 1
        if first:
            log.warning("depth of several images at once failed (%s): such batches are done one by one", reason)

    def _all(self, job: _Job, index: int, session: Session | None, lost: str) -> ImagesResult:
        from recon.live.clock import Moments

        images, waited = job.images, job.waited_ms(time.perf_counter())
        assert images is not None
        assert job.there is not None
        job.there.wait()
        span = Moments(images.device)
        span.mark()
        depth, error = (None, lost) if lost else _attempted(lambda: self._predict_all(job.views, images, session))
        span.mark()
        if images.is_cuda:  # they were allocated on the stream of whoever handed them in
            import torch

            images.record_stream(torch.cuda.current_stream(images.device))
        return ImagesResult(len(job.views), depth, error, span, waited, index)


@dataclass
class _Job:
    """images, there: on a device, and the moment from which they are. futures: one for each view, or for all images."""

    views: list[View]
    images: torch.Tensor | None = None
    there: Moments | None = None
    submitted: float = field(default_factory=time.perf_counter)
    futures: list[Future[Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.futures = [Future() for _ in (self.views if self.images is None else range(1))]

    def waited_ms(self, start: float) -> float:
        return (start - self.submitted) * 1e3


T = TypeVar("T")


def _attempted(work: Callable[[], T]) -> tuple[T | None, str]:
    """What `work` gives, or why it failed: whatever an engine throws belongs to these frames alone."""
    try:
        return work(), ""
    except Exception as failure:
        reason = (str(failure).strip().splitlines() or [""])[0]
        return None, f"{type(failure).__name__}: {reason}" if reason else type(failure).__name__


def _in_turn(predict: Predict, views: list[View], session: Session | None) -> list[DepthImage]:
    return [predict(view, session) for view in views]


def _uploaded(predict: Predict, views: list[View], images: torch.Tensor, session: Session | None) -> torch.Tensor:
    """What `predict` gives for each view, on the device of the images."""
    import torch

    found = [torch.from_numpy(np.ascontiguousarray(predict(view, session), np.float32)) for view in views]
    return torch.stack(found).to(images.device)


def _open_all(engine: str | Path | Callable[[], Session | None], workers: int) -> list[Session | None]:
    """One session per worker; when one cannot be opened, those before it are closed again."""
    opened = engine if callable(engine) else partial(_open_file, Path(engine))
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


def _open_file(engine: Path) -> Session:
    from recon.store import open_engine

    return open_engine(engine)


def _own_stream(session: Session | None) -> AbstractContextManager[object]:
    """On CUDA, a stream for this worker alone: torch's own work and that of the engine go there."""
    if session is None or session.device == "cpu":
        return nullcontext()
    import torch

    stream: Any = torch.cuda.Stream  # torch leaves it untyped
    return torch.cuda.stream(stream(session.device))


def _depth_anything() -> Depth:
    from recon.config import option
    from recon.depth import Depth

    depth = option("depth", "da2-small")  # its processing reads the size off the session, so it suits every size
    assert isinstance(depth, Depth)
    return depth
