"""Live cameras: recordings played as cameras, and a network camera that stalls, goes black, freezes and vanishes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from video_files import SIZE, even, numbered, read_number, write_video

from recon.errors import ReconError
from recon.sources import capture
from recon.sources.capture import Device, LiveRig, Shot
from recon.sources.webcams import Webcams
from recon.threads import Worker


def cameras(*devices: str, **knobs: Any) -> Webcams:
    known: dict[str, Any] = {"start_s": 0.0, "give_up_s": 3.0, "stall_s": 0.3, "retry_s": 0.1}
    return Webcams(**({"name": "webcams", "devices": list(devices)} | known | knobs))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two recordings of 40 frames at 30 and 15 Hz."""
    first = write_video(tmp_path / "a.mp4", even(40, 30))
    second = write_video(tmp_path / "b.mp4", even(20, 15), shade=1)
    return [str(first), str(second)]


def test_recordings_play_at_their_own_rate_and_end(files: list[str]) -> None:
    source = cameras(f"front={files[0]}", f"left={files[1]}")
    source.check()
    source.validate()
    assert source.cameras() == ["front", "left"]
    began = time.perf_counter()
    first = source.bootstrap()
    assert [view.camera for view in first] == ["front", "left"]
    batches = list(source.batches())
    seconds = time.perf_counter() - began
    assert 1.0 < seconds < 20  # 40 frames at 30 Hz, however fast they can be decoded
    together = [batch for batch in batches if len(batch) == 2]
    assert len(together) >= 5
    for batch in batches:
        for view in batch:
            assert read_number(view.image) == view.frame
            rate = 30 if view.camera == "front" else 15
            assert view.time_s == pytest.approx(view.frame / rate, abs=0.05)
    report = source.report()
    assert report["skew_ms"]["max"] <= 50
    assert report["cameras"]["front"]["events"][-1]["what"] == "recording ended"
    assert report["batches"] == len(batches)


def test_the_newest_frame_wins_and_the_others_are_counted(files: list[str]) -> None:
    source = cameras(files[0])
    source.bootstrap()
    seen = []
    for batch in source.batches():
        seen.append(batch[0].frame)
        time.sleep(0.2)  # a map that is too slow for 30 frames a second
    row = source.report()["cameras"]["a"]
    assert len(seen) < 12
    assert row["delivered"] == len(seen)
    assert row["dropped"] >= 20
    assert np.diff(seen[:-1]).min() >= 4  # never the next one in a queue
    assert row["delivered"] + row["dropped"] <= 40
    assert (row["captured"], row["fps_said"], row["size"]) == (40, 30.0, [160, 120])


def test_limits_steps_and_colour(files: list[str]) -> None:
    source = cameras(files[0], max_batches=3, frame_step=2)
    view = source.bootstrap()[0]
    assert np.abs(view.image.astype(int) - numbered(view.frame)).mean() < 25  # RGB, not BGR
    assert len(source) == 3
    assert len(list(source.batches())) == 3
    assert source.bootstrap()[0] is view  # one session, one beginning
    ended = cameras(files[0], end_s=0.5)
    ended.bootstrap()
    assert max(batch[0].time_s or 0 for batch in ended.batches()) <= 0.5
    settled = cameras(files[0], start_s=0.4)
    assert (settled.bootstrap()[0].time_s or 0) >= 0.3
    settled.close()


def test_leaving_early_releases_the_cameras(files: list[str]) -> None:
    source = cameras(*files)
    source.bootstrap()
    batches = source.batches()
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("capture-")]


@pytest.mark.parametrize(
    ("devices", "knobs", "message"),
    [
        (["97"], {}, r"camera cam97: 97 cannot be opened"),
        (["front=/dev/video98"], {}, r"camera front: /dev/video98 cannot be opened"),
        (["no/such/file.mp4"], {}, r"camera file: no/such/file\.mp4 cannot be opened"),
        (["http://127.0.0.1:9/x.mjpg"], {}, r"camera x: http.* cannot be opened"),
    ],
)
def test_a_camera_that_is_not_there_is_named_before_any_work(
    devices: list[str], knobs: dict[str, Any], message: str
) -> None:
    source = cameras(*devices, **knobs)
    source.check()
    with pytest.raises(ReconError, match=message) as caught:
        source.validate()
    assert "video devices on this machine" in caught.value.remedy or "ffprobe" in caught.value.remedy


@pytest.mark.parametrize(
    ("devices", "knobs", "message"),
    [
        ([], {}, "no camera"), (["a=0", "a=1"], {}, "stands twice"), (["a=0", "b=0"], {}, "stands twice"),
        (["0"], {"width": -1}, "source.width=-1"), (["0"], {"fourcc": "MJPEG"}, "four characters"),
        (["0"], {"backend": "magic"}, "no such backend"), (["0"], {"stall_s": 0.0}, "source.stall_s"),
        (["0"], {"end_s": 0.0}, "must be later"), (["0"], {"views": ["cam1"]}, "no camera 'cam1'"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(devices: list[str], knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ReconError, match=message) as caught:
        cameras(*devices, **knobs).check()
    assert caught.value.remedy


def test_names_of_cameras() -> None:
    known = cameras("0", "front=2", "/dev/video4", "rtsp://host:80/live/door?x=1", "side=rtsp://host/a=b")
    devices = known._devices()
    assert list(devices) == ["cam0", "front", "video4", "door?x=1", "side"]
    assert [device.address for device in devices.values()][3:] == ["rtsp://host:80/live/door?x=1", "rtsp://host/a=b"]


def test_a_resolution_that_the_camera_does_not_give_is_refused(files: list[str]) -> None:
    with pytest.raises(ReconError, match=r"source.width=640 and source.height=480: camera a gives 160x120"):
        cameras(files[0], width=640, height=480).validate()
    with pytest.raises(ReconError, match=r"^source.width=640: camera a gives 160x120"):
        cameras(files[0], width=640).validate()
    cameras(files[0], width=SIZE[0], height=SIZE[1]).validate()


def test_intrinsics_of_another_size_are_refused(files: list[str], tmp_path: Path) -> None:
    K = np.array([[150.0, 0, 79.5], [0, 150, 59.5], [0, 0, 1]])
    np.savez(tmp_path / "K.npz", K=K, width=640, height=480)
    with pytest.raises(ReconError, match="K of camera a is for 640x480, its images are 160x120"):
        cameras(files[0], intrinsics=str(tmp_path / "K.npz")).validate()


def test_sizes_of_images_are_known_before_the_capture(files: list[str]) -> None:
    assert cameras(f"left={files[0]}").image_sizes() == {"left": SIZE}
    assert cameras("front=97", width=640, height=480).image_sizes() == {"front": (640, 480)}  # nothing is opened
    with pytest.raises(ReconError, match=r"97 cannot be opened .*size of its images") as caught:
        cameras("front=97").image_sizes()
    assert "depth.image_size" in caught.value.remedy


def test_every_session_is_another(files: list[str]) -> None:
    source = cameras(files[0])
    assert source.content_key() == source.content_key() != cameras(files[0]).content_key()


# --- frames by hand, so that their order is certain ------------------------------------------------------------------


@pytest.fixture
def rig(files: list[str]) -> Iterator[LiveRig]:
    """Two cameras that capture nothing by themselves, 50 ms of skew allowed."""
    opened = LiveRig([Device("left", files[0]), Device("right", files[1])], 0.05, stall_s=30.0, retry_s=0.1)
    yield opened
    opened.close()


def show(rig: LiveRig, camera: str, time_s: float) -> None:
    number = round(10 * time_s)
    rig.captures[camera]._keep(Shot(number, time_s, numbered(number)))


def taken(found: dict[str, Shot]) -> dict[str, float]:
    return {name: shot.time_s for name, shot in found.items()}


def test_a_camera_that_comes_back_too_late_for_its_moment_costs_the_others_nothing(rig: LiveRig) -> None:
    rig.captures["right"].trouble = "black"
    show(rig, "left", 1.2)
    assert taken(rig.take(1.0)) == {"left": 1.2}
    show(rig, "right", 1.2)  # it sees again, but this moment has been handed out
    show(rig, "left", 1.4)
    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(rig.take, 30.0)
        end = time.monotonic() + 20
        while rig.captures["right"].ring and time.monotonic() < end:
            time.sleep(0.01)
        show(rig, "right", 1.41)
        assert taken(batch.result(20)) == {"left": 1.4, "right": 1.41}
    assert (rig.states["left"].dropped, rig.states["right"].dropped, rig.incomplete) == (0, 1, 1)


def test_cameras_that_never_see_the_same_moment_take_turns(rig: LiveRig) -> None:
    seen = []
    show(rig, "left", 0.0)
    for number in range(1, 6):
        show(rig, ("left", "right")[number % 2], number / 10)
        seen.append(taken(rig.take(1.0)))
    assert seen == [{("left", "right")[n % 2]: n / 10} for n in range(5)]
    assert (rig.states["left"].dropped, rig.states["right"].dropped, rig.alone) == (0, 0, 5)


def test_cameras_that_hang_are_waited_for_together(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_JOIN_S", 1.0)
    opened = LiveRig([Device(f"cam{n}", files[0]) for n in range(8)], 0.05, stall_s=1.0, retry_s=0.1)
    hang = threading.Event()
    for camera in opened.captures.values():
        camera._thread = Worker("hangs", hang.wait)
        camera._thread.start()
    began = time.monotonic()
    opened.close()
    waited = time.monotonic() - began
    hang.set()
    assert 1 <= waited < 4  # not a second for each


# --- a camera with faults --------------------------------------------------------------------------------------------


class NetworkCamera:
    """An MJPEG camera on a local port whose picture and manners a test changes while it runs."""

    def __init__(self) -> None:
        self.mode = "live"  # live | black | frozen | stalled | gone | other size
        self.number = 0
        self.connections = 0
        camera = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                camera.serve(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/camera.mjpg"

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        if self.mode == "gone":
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        self.connections += 1
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        try:
            while self.mode != "gone":
                if self.mode != "stalled":
                    handler.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n\r\n" + self.picture() + b"\r\n")
                time.sleep(0.03)
        except OSError:
            pass

    def picture(self) -> bytes:
        if self.mode != "frozen":
            self.number += 1
        image = numbered(self.number % 256, size=(200, 160) if self.mode == "other size" else SIZE)
        image = np.zeros_like(image) if self.mode == "black" else image
        return bytes(cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]))[1])

    def close(self) -> None:
        self.mode = "gone"
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def pair() -> Iterator[tuple[NetworkCamera, NetworkCamera]]:
    good, bad = NetworkCamera(), NetworkCamera()
    yield good, bad
    good.close()
    bad.close()


def until(batches: Iterator[list[Any]], true: Callable[[set[str]], bool], limit_s: float = 30.0) -> None:
    """Read batches until the cameras in one satisfy `true`."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if true({view.camera for view in next(batches)}):  # empty where none has a frame
            return
    raise AssertionError("it did not happen in time")


@pytest.mark.parametrize(
    ("mode", "event"), [("stalled", "stalled"), ("black", "black"), ("frozen", "frozen"), ("gone", "vanished")]
)
def test_a_camera_with_a_fault_is_left_out_until_it_comes_back(
    pair: tuple[NetworkCamera, NetworkCamera], mode: str, event: str
) -> None:
    good, bad = pair
    source = cameras(f"good={good.url}", f"bad={bad.url}", max_skew_ms=200.0, stall_s=1.0)  # busy machines pause
    source.validate()
    assert [view.camera for view in source.bootstrap()] == ["good", "bad"]
    batches = source.batches()
    until(batches, lambda seen: seen == {"good", "bad"})
    bad.mode = mode
    for _ in range(3):  # the others go on, again and again
        until(batches, lambda seen: seen == {"good"})
    bad.mode = "live"
    until(batches, lambda seen: seen == {"good", "bad"})
    batches.close()  # type: ignore[attr-defined]
    report = source.report()
    events = [row["what"] for row in report["cameras"]["bad"]["events"]]
    assert event in events
    assert events[-1].startswith("is back (was ")
    assert report["cameras"]["bad"][f"times_{event}"] >= 1
    assert report["cameras"]["good"]["events"] == []
    assert report["incomplete_moments"] >= 3
    if mode == "black":
        assert report["cameras"]["bad"]["lost"]["black"] > 0
    if mode == "frozen":
        assert report["cameras"]["bad"]["frozen"] > 0
    if mode == "gone":
        assert bad.connections >= 3  # validate, bootstrap, and the return


def test_a_covered_camera_does_not_bootstrap(pair: tuple[NetworkCamera, NetworkCamera]) -> None:
    good, bad = pair
    bad.mode = "black"
    source = cameras(f"good={good.url}", f"bad={bad.url}", give_up_s=0.8)
    with pytest.raises(ReconError, match=r"no moment in 0\.8 s .*'good': 'works', 'bad': 'black'") as caught:
        source.bootstrap()
    assert "uncover" in caught.value.remedy


def test_the_stream_ends_when_no_camera_delivers(pair: tuple[NetworkCamera, NetworkCamera]) -> None:
    good, bad = pair
    source = cameras(f"good={good.url}", f"bad={bad.url}", max_skew_ms=200.0, give_up_s=2.5)
    source.bootstrap()
    batches = source.batches()
    next(batches)
    good.mode = bad.mode = "stalled"
    began = time.monotonic()
    rest = list(batches)
    assert len([batch for batch in rest if batch]) < 10
    assert [] in rest  # a sign of life, so that whoever reads can stop in between
    assert 2 < time.monotonic() - began < 30  # it ends; threads that the network holds are waited for, some seconds


def test_a_camera_that_returns_with_another_size_stays_out(pair: tuple[NetworkCamera, NetworkCamera]) -> None:
    good, bad = pair
    source = cameras(f"good={good.url}", f"bad={bad.url}", max_skew_ms=200.0)
    source.bootstrap()
    batches = source.batches()
    bad.mode = "gone"
    until(batches, lambda seen: seen == {"good"})
    bad.mode = "other size"
    end = time.monotonic() + 30
    while source._live is not None and not source._live.states["bad"].lost and time.monotonic() < end:
        assert {view.camera for view in next(batches)} <= {"good", "bad"}
    batches.close()  # type: ignore[attr-defined]
    assert source.report()["cameras"]["bad"]["lost"]["size changed"] > 0
