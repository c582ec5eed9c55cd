"""A clean stop: Ctrl-C and SIGTERM end the stream, not the run, so everything found so far is written."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(threading.Event):
    """Set by the first signal. `by` is its name, empty while nobody asked."""

    by = ""


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM inside sets the event; a second one acts as it would have without us.

    Outside the main thread, where Python delivers no signals, the event is never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def ask(number: int, _: FrameType | None) -> None:
        stop.by = signal.Signals(number).name
        stop.set()
        for known, handler in before.items():
            signal.signal(known, handler)
        log.warning("%s: the stream ends after this batch and the run is written; again to break off", stop.by)

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
