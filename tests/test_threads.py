"""Threads are waited for in spite of Ctrl-C: one that is left in native code aborts the process when Python ends."""

import _thread
import signal
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from recon.geometry.views import View
from recon.live.pool import DepthAnythingPool
from recon.threads import Worker, start_all, wait_for

BUSY_S = 0.6


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C in 0.2 s, also where the job was started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    yield
    timer.join()
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_raised_once_all_have_ended(ctrl_c: None) -> None:
    workers = [Worker(f"w{i}", time.sleep, BUSY_S + i / 5) for i in range(2)]
    start_all(workers, lambda: None)
    with pytest.raises(KeyboardInterrupt):
        wait_for(workers)
    assert all(worker.over.is_set() for worker in workers)


def test_ctrl_c_while_one_starts_ends_those_that_run(ctrl_c: None) -> None:
    class Late(Worker):
        def start(self) -> None:
            super().start()
            time.sleep(2)  # as if its own thread were slow to say that it runs

    leave = threading.Event()
    workers = [Worker("first", lambda: leave.wait(5) and None), Late("second", lambda: leave.wait(5) and None)]
    begun = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        start_all([*workers, Worker("third", lambda: None)], leave.set)
    assert leave.is_set()
    assert all(worker.over.is_set() for worker in workers)
    assert time.perf_counter() - begun < 4


def test_one_that_hangs_is_given_up_after_the_limit() -> None:
    leave = threading.Event()
    worker = Worker("hangs", lambda: leave.wait(30) and None)
    start_all([worker], leave.set)
    wait_for([worker], 0.1)
    assert not worker.over.is_set()
    leave.set()
    wait_for([worker])
    assert worker.over.is_set()


def test_a_depth_pool_that_ctrl_c_closes_finishes_what_its_workers_have_in_hand(ctrl_c: None) -> None:
    done = []

    def slow(view: View, session: object) -> np.ndarray:
        time.sleep(BUSY_S)
        done.append(view.frame)
        return np.ones((2, 2), np.float32)

    pool = DepthAnythingPool(lambda: None, workers=2, predict=slow)
    images = np.zeros((2, 2, 2, 3), np.uint8)
    futures = [pool.submit(image) for image in images]
    with pytest.raises(KeyboardInterrupt):
        pool.close()
    assert len(done) == 2
    assert all(future.result().error == "" for future in futures)
    assert not any(thread.name.startswith("depth-") for thread in threading.enumerate())
