"""Ready before the first frame: what a first batch imports, compiles, loads and records is done ahead of the source.

A first batch takes seconds where later ones take milliseconds (image processing is imported, CUDA loads every kernel at
its first launch, Triton compiles its own, the fits are recorded), and live cameras do not wait for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from recon.live.reader import Batch

if TYPE_CHECKING:
    from recon.fusion import Map
    from recon.live.stream import Streamer

log = logging.getLogger(__name__)

ROUNDS = 2
"""The second records the fits (`Replayed`), and finds a map that is not empty."""


def warm_up(streamer: Streamer, scratch: Callable[[], Map]) -> float:
    """Take the bootstrap's frames through depth, reference, alignment, mask and fusion; the seconds that it took.

    scratch: makes an empty map of the stream's kind, which is thrown away. Nothing of this is in the stream's map, in
    the state of its cameras, or in a count. With files and the map on the host nothing is done: nobody is kept waiting
    there, and a batch costs more than it saves.
    """
    start = time.perf_counter()
    if streamer.source.live or streamer.fused.device is not None:
        views, step = streamer.source.bootstrap(), streamer.step.rehearsal(scratch())
        with streamer.pool.uncounted():
            for number in range(1, ROUNDS + 1):
                batch = Batch(number, views, 0.0, time.perf_counter())
                found = [result.align for result in step.finish(batch, step.submit(batch))]
        if lost := sorted({fit.reason for fit in found if not fit.accepted}):
            log.warning("not all is ready for the first frame, which may be late: %s", "; ".join(lost))
    seconds = time.perf_counter() - start
    if seconds > 1:
        log.info("ready for the first frame after %.1f s", seconds)
    return seconds
