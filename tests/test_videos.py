"""Video files: the right frames at the right times, whatever the container, and every fault a file can have."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from video_files import SIZE, even, numbered, packets, read_number, spoil, write_video

from recon.config import option
from recon.errors import ReconError
from recon.geometry.views import View
from recon.sources.timeline import assign, increasing, moments, read_timestamps, skew
from recon.sources.videofiles import frames, index_video
from recon.sources.videos import Videos

# --- time ------------------------------------------------------------------------------------------------------------


def test_moments_pair_nearest_frames_and_lose_none() -> None:
    a, b = np.array([0.0, 0.10, 0.20, 0.30]), np.array([0.01, 0.19, 0.32])
    found = moments({"a": a, "b": b}, 0.03)
    assert [m.frames for m in found] == [{"a": 0, "b": 0}, {"a": 1}, {"a": 2, "b": 1}, {"a": 3, "b": 2}]
    report = skew(found, 2, 30.0)
    assert (report["frames_without_partner"], report["incomplete_moments"]) == (1, 1)
    assert report["skew_ms"]["max"] == pytest.approx(20.0)
    wide = moments({"a": np.array([0.0, 0.033, 0.066]), "b": np.array([0.030, 0.063, 0.096])}, 0.1)
    assert [m.frames for m in wide] == [{"a": 0}, {"a": 1, "b": 0}, {"a": 2, "b": 1}, {"b": 2}]  # 3 ms, not 30


@pytest.mark.parametrize("seed", range(20))
def test_moments_of_any_cameras_hold_what_they_promise(seed: int) -> None:
    rng = np.random.default_rng(seed)
    times = {c: np.sort(rng.uniform(0, 3, rng.integers(1, 60))) for c in "abc"}
    times["b"][rng.integers(len(times["b"]))] = np.nan
    found = moments(times, 0.04)
    for camera, values in times.items():
        used = [m.frames[camera] for m in found if camera in m.frames]
        assert used == [i for i, t in enumerate(values) if np.isfinite(t)]  # each once, in order
    assert all(m.skew_s <= 0.04 for m in found)
    assert all(a.time_s <= b.time_s for a, b in pairwise(found))


def csv(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_csv_with_gaps_disorder_and_repeats(tmp_path: Path) -> None:
    path = csv(
        tmp_path / "t.csv",
        "camera, frame, time_s", "a,3,0.3", "a,0,0.0", "a,1,0.1", "a,1,0.1", "a,4,0.05", "a,9,0.9", "b,0,0", "b,1,0.1",
    )  # fmt: skip
    found = assign(read_timestamps(path), {"a": [""] * 6, "b": [""] * 2}, "t")
    np.testing.assert_array_equal(found.times["a"], [0.0, 0.1, np.nan, 0.3, np.nan, np.nan])
    assert found.notes["a"] == {
        "rows_out_of_order": 1, "rows_repeated": 1, "rows_without_frame": 1, "frames_without_time": 2,
        "frames_back_in_time": 1,
    }  # fmt: skip
    assert sum(found.notes["b"].values()) == 0
    assert increasing(np.array([1, 2, 9, 3, np.nan, 4, 4, 5])) == [2, 5]


def test_a_common_number_stands_for_the_frame_unless_frames_are_missing_from_the_file_too(tmp_path: Path) -> None:
    lines = ["sync_index,cam_id,frame_time", *(f"{n},{c},{n / 10}" for n in range(35, 40) for c in (0, 1))]
    lines.remove("37,1,3.7")
    rows = read_timestamps(csv(tmp_path / "t.csv", *lines))
    whole = assign(rows, {"cam_0": [""] * 5, "cam_1": [""] * 5}, "t")  # the video has the frame, the CSV lost its row
    np.testing.assert_array_equal(whole.times["cam_1"], [3.5, 3.6, np.nan, 3.8, 3.9])
    short = assign(rows, {"cam_0": [""] * 5, "cam_1": [""] * 4}, "t")  # the camera never took it
    np.testing.assert_array_equal(short.times["cam_1"], [3.5, 3.6, 3.8, 3.9])


def test_csv_may_name_files(tmp_path: Path) -> None:
    rows = read_timestamps(csv(tmp_path / "t.csv", "camera,file,timestamp", "a,x_2.png,2", "a,x_1.png,1"))
    assert assign(rows, {"a": ["x_1", "x_2"]}, "t").times["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b", "1,2"], r"has the columns \['a', 'b'\]"),
        (["camera,time_s"], "has no rows"),
        (["camera,time_s", "a,zero"], "line 2: could not convert"),
        (["camera,time_s", "a,0", "a,nan"], "line 3: time nan"),
        (["camera,time_s", "a"], "line 2"),
        (["camera,frame,time_s", "a,9,1"], "none of the 1 rows of camera 'a' is for one of 3 frames"),
        (["camera,time_s", "b,1"], "has no rows for camera 'a'"),
    ],
)
def test_csv_that_cannot_be_used_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ReconError, match=message) as caught:
        assign(read_timestamps(csv(tmp_path / "t.csv", *lines)), {"a": [""] * 3}, "source.timestamps=t.csv")
    assert caught.value.remedy


# --- files -----------------------------------------------------------------------------------------------------------

CONTAINERS = [
    ("mpeg4", "mp4", 0), ("libx264", "mp4", 2), ("libx264", "mkv", 2), ("mpeg4", "avi", 0), ("libx264", "ts", 2),
    ("libx264", "mov", 0), ("libvpx", "webm", 0), ("mjpeg", "avi", 0), ("libx264", "h264", 2), ("mpeg2video", "mpg", 0),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "suffix", "b_frames"), CONTAINERS)
def test_every_container_gives_every_frame(tmp_path: Path, codec: str, suffix: str, b_frames: int) -> None:
    path = write_video(tmp_path / f"v.{suffix}", even(30, 30), codec=codec, b_frames=b_frames)
    index = index_video(path)
    assert (len(index), index.size) == (30, SIZE)
    assert np.diff(index.times) == pytest.approx(1 / 30, abs=2e-3)
    wanted = [0, 3, 17, 18, 29]
    found = list(frames(index, wanted))
    assert [number for number, _ in found] == wanted
    assert [read_number(image) for _, image in found if not isinstance(image, str)] == wanted
    later = list(frames(index, [25, 26]))  # from the key frame before it, not from the beginning
    assert [read_number(image) for _, image in later if not isinstance(image, str)] == [25, 26]


def test_uneven_frame_rates_keep_their_times(tmp_path: Path) -> None:
    times = [0.0, 0.033, 0.1, 0.5, 0.52, 0.9, 1.4]
    for suffix in ("mp4", "mkv"):
        index = index_video(write_video(tmp_path / f"v.{suffix}", times))
        assert index.times == pytest.approx(times, abs=1e-3)
        assert [read_number(image) for _, image in frames(index, range(7)) if not isinstance(image, str)] == [*range(7)]


def test_phones_are_turned_upright(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", even(3))
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: the display matrix follows 40 bytes of header
    one = 1 << 16
    turn = [0, one, 0, -one, 0, 0, 120 << 16, 0, 1 << 30]  # 90 degrees clockwise
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    path.write_bytes(data)
    index = index_video(path)
    assert index.size == (SIZE[1], SIZE[0])
    image = next(iter(frames(index, [2])))[1]
    assert not isinstance(image, str)
    assert read_number(np.rot90(image)) == 2  # turned back, it is what was filmed


# --- the source ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cameras of 24 frames at 10 Hz, the second 15 ms later."""
    write_video(tmp_path / "v" / "left.mp4", even(24))
    write_video(tmp_path / "v" / "right.mkv", even(24, start=0.015), shade=1)
    (tmp_path / "v" / "notes.txt").write_text("not a video")
    return tmp_path


def source(root: Path, **knobs: Any) -> Videos:
    return Videos(**({"name": "videos", "path": str(root / "v")} | knobs))


def stream(videos: Videos) -> list[dict[str, int]]:
    """What a run reads: frame number by camera, batch by batch, checked against the picture."""
    videos.check()
    videos.validate()
    found = []
    for views in videos.batches():
        assert all(view.frame == read_number(view.image) for view in views)
        found.append({view.camera: view.frame for view in views})
    return found


def test_cameras_are_put_together_by_time(folder: Path) -> None:
    videos = source(folder)
    assert stream(videos) == [{"left": n, "right": n} for n in range(1, 24)]
    assert len(videos) == 23
    assert [v.frame for v in videos.bootstrap()] == [0, 0]
    assert [v.time_s for v in videos.bootstrap()] == pytest.approx([0.0, 0.015])
    report = videos.report()
    assert report["skew_ms"]["p50"] == pytest.approx(15, abs=0.1)
    assert report["cameras"]["left"]["delivered"] == 23
    assert report["cameras"]["left"]["lost"] == {}
    assert threading.active_count() < 20  # the decoders have ended


def test_sizes_are_those_of_the_views(folder: Path) -> None:
    write_video(folder / "v" / "top.mp4", even(24), size=(96, 160))
    videos = source(folder)
    assert videos.image_sizes() == {view.camera: view.size for view in videos.bootstrap()}
    assert videos.image_sizes()["top"] == (96, 160)
    assert source(folder, views=["top"]).image_sizes() == {"top": (96, 160)}


def test_steps_limits_and_times(folder: Path) -> None:
    assert stream(source(folder, frame_step=5, views=["right"])) == [{"right": n} for n in (5, 10, 15, 20)]
    assert len(stream(source(folder, max_batches=2))) == 2
    part = source(folder, start_s=1.0, end_s=1.5)
    assert [v.frame for v in part.bootstrap()] == [10, 10]
    assert [batch["left"] for batch in stream(part)] == [11, 12, 13, 14, 15]
    assert {tuple(source(folder, random_views=1, seed=s).cameras()) for s in range(9)} == {("left",), ("right",)}


def test_beyond_the_bound_frames_go_on_alone(folder: Path) -> None:
    videos = source(folder, max_skew_ms=5.0)
    with pytest.raises(ReconError, match=r"at no time do all 2 cameras .*left 0\.000 to 2\.300 s") as caught:
        videos.validate()
    assert "max_skew_ms" in caught.value.remedy
    together = source(folder, max_skew_ms=5.0, start_together=True)
    assert stream(together)[0] == {"left": 1, "right": 1}


def test_one_folder_per_camera_one_file_and_what_is_neither(tmp_path: Path) -> None:
    write_video(tmp_path / "v" / "cam_2" / "a.mp4", even(3))
    write_video(tmp_path / "v" / "cam_10" / "b.mp4", even(3))
    assert source(tmp_path).cameras() == ["cam_2", "cam_10"]
    one = source(tmp_path, path=str(tmp_path / "v" / "cam_2" / "a.mp4"))
    assert (one.cameras(), len(stream(one))) == (["a"], 2)
    write_video(tmp_path / "v" / "cam_2" / "c.mp4", even(3))
    for path, message in [("v", "2 videos"), ("w", "no such folder"), ("v/cam_2/../../v/cam_2/x.mp4", "no such")]:
        with pytest.raises(ReconError, match=message):
            source(tmp_path, path=str(tmp_path / path)).cameras()
    (tmp_path / "empty" / "cam_2").mkdir(parents=True)
    with pytest.raises(ReconError, match="cam_2: no video in it") as caught:
        source(tmp_path, path=str(tmp_path / "empty")).cameras()
    assert "source=images" in caught.value.remedy
    with pytest.raises(ReconError, match="no videos"):
        source(tmp_path, path=str(tmp_path / "empty" / "cam_2")).cameras()


def test_a_start_after_the_end_says_how_long_it_is(folder: Path) -> None:
    for span, words in (({"start_s": 60.0}, "source.start_s=60"), ({"start_s": 9.0, "end_s": 9.5}, "source.end_s=9.5")):
        with pytest.raises(ReconError, match=rf"{words}: no frame is there then; the last one comes 2\.300 s after"):
            source(folder, **span).validate()


def test_a_camera_that_ends_early_is_missed_but_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(tmp_path / "v" / "left.mp4", even(20))
    write_video(tmp_path / "v" / "right.mp4", even(8))
    videos = source(tmp_path)
    with caplog.at_level(logging.WARNING):
        found = stream(videos)
    assert found == [{"left": n, "right": n} for n in range(1, 8)] + [{"left": n} for n in range(8, 20)]
    report = videos.report()
    assert report["frames_without_partner"] == 12
    assert report["cameras"]["right"]["events"] == [{"what": "ends 1.200 s before the last camera", "at": 0.7}]
    assert "ends 1.200 s before" in caplog.text


def test_a_file_that_was_cut_off_gives_what_is_left(folder: Path) -> None:
    path = folder / "v" / "right.mkv"
    position = packets(path)[14][0]
    path.write_bytes(path.read_bytes()[: position + 20])
    videos = source(folder)
    found = stream(videos)
    assert [batch.get("right", -1) for batch in found[:13]] == [*range(1, 14)]
    assert found[14:] == [{"left": n} for n in range(15, 24)]
    events = [event["what"] for event in videos.report()["cameras"]["right"]["events"]]
    assert any(what.startswith("the file promises 2.4") for what in events)
    assert "before the last camera" in events[-1]


def test_a_cut_mp4_says_how_many_frames_are_missing(folder: Path) -> None:
    import av

    original, path = folder / "v" / "left.mp4", folder / "v" / "front.mp4"
    with av.open(str(original)) as old, av.open(str(path), "w", options={"movflags": "faststart"}) as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = copy
                new.mux(packet)
    original.unlink()
    position = packets(path)[16][0]
    path.write_bytes(path.read_bytes()[:position])  # the header, with all frames listed, stands in front
    videos = source(folder, views=["front"])
    assert [batch["front"] for batch in stream(videos)] == [*range(1, 16)]
    assert videos.report()["cameras"]["front"]["lost"] == {"file is cut off": 8}


@pytest.mark.parametrize(("codec", "suffix", "b_frames"), [c for c in CONTAINERS if c[0] in ("mpeg4", "libx264")])
def test_a_damaged_packet_costs_the_frames_that_hang_on_it(
    tmp_path: Path, codec: str, suffix: str, b_frames: int
) -> None:
    path = write_video(tmp_path / "v" / f"left.{suffix}", even(40), codec=codec, b_frames=b_frames, gop=10)
    write_video(tmp_path / "v" / "right.mp4", even(40))
    keys = [number for number, packet in enumerate(packets(path)) if packet[2]]
    spoil(path, keys[1] + 3)
    knobs = {"start_together": True} if suffix == "h264" else {}
    videos = source(tmp_path, **knobs, max_skew_ms=1500.0 if suffix in ("h264", "ts") else 50.0)
    list(videos.batches()) if suffix in ("h264", "ts") else stream(videos)
    lost = videos.report()["cameras"]["left"]["lost"]
    assert set(lost) <= {"damaged", "missing"}
    assert 1 <= sum(lost.values()) <= 9  # up to the next key frame, not further
    good = [v for batch in videos.batches() for v in batch if v.camera == "left"]
    assert [read_number(v.image) for v in good][-1] == 39
    for view in good:
        error = np.abs(view.image.astype(int) - numbered(read_number(view.image))).mean()
        assert error < 20  # coding noise; half a frame of rubbish would be more


def test_a_damaged_first_frame_moves_the_bootstrap(folder: Path) -> None:
    spoil(folder / "v" / "left.mp4", 0)
    videos = source(folder)
    found = stream(videos)
    assert [v.frame for v in videos.bootstrap()] == [12, 12]  # the next key frame
    assert found == [{"left": n, "right": n} for n in range(13, 24)]
    assert videos.report()["cameras"]["left"]["lost"] == {"damaged": 12}  # though it was the bootstrap that met them


@pytest.mark.parametrize("what", ["no header", "text", "empty", "sound"])
def test_a_file_that_is_no_video_is_named_before_any_work(folder: Path, what: str) -> None:
    path = folder / "v" / "left.mp4"
    if what == "no header":
        path.write_bytes(path.read_bytes()[:20_000])  # MP4 keeps its index at the end
    elif what == "sound":
        import av

        with av.open(str(path), "w") as container:
            track = container.add_stream("aac", rate=16_000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16_000
            container.mux(track.encode(sound))
            container.mux(track.encode(None))
    else:
        path.write_text("text" if what == "text" else "")
    with pytest.raises(ReconError, match=r"left\.mp4: (no video that can be read|has no video)") as caught:
        source(folder).validate()
    assert "source.views" in caught.value.remedy


def test_black_frames_are_left_out_and_frozen_ones_counted(tmp_path: Path) -> None:
    pictures = [numbered(n) for n in range(10)]
    for number in (3, 4):
        pictures[number] = np.zeros_like(pictures[0])
    pictures[7:] = [pictures[6]] * 3
    pictures += [pictures[6]] * 3
    write_video(tmp_path / "v" / "left.mkv", even(13), codec="ffv1", images=pictures)
    videos = source(tmp_path)
    videos.validate()
    assert [batch[0].frame for batch in videos.batches()] == [1, 2, *range(5, 13)]
    row = videos.report()["cameras"]["left"]
    assert (row["lost"], row["frozen"]) == ({"black": 2}, 6)
    assert row["events"][-1] == {"what": "frozen: 5 equal frames in a row", "at": 11}


def test_a_camera_that_pauses_is_missed_and_told(tmp_path: Path) -> None:
    write_video(tmp_path / "v" / "left.mkv", even(20))
    write_video(tmp_path / "v" / "right.mkv", [*even(6), *even(10, start=1.0)])
    videos = source(tmp_path)
    found = stream(videos)
    assert [len(batch) for batch in found] == [2] * 5 + [1] * 4 + [2] * 10
    row = videos.report()["cameras"]["right"]
    assert (row["pauses"], row["events"]) == (1, [{"what": "no frame for 0.500 s", "at": 0.5}])


def test_cameras_of_different_size_and_a_rig_of_another(tmp_path: Path) -> None:
    write_video(tmp_path / "v" / "left.mp4", even(5))
    write_video(tmp_path / "v" / "right.mp4", even(5), size=(192, 108))
    K = np.array([[150.0, 0, 79.5], [0, 150, 59.5], [0, 0, 1]])
    known: dict[str, Any] = {"camera_names": ["left", "right"], "K": np.stack([K, K]), "unit": "m"}
    known |= {"distortion": np.tile([-0.2, 0.02, 0, 0], (2, 1)), "T_world_cam": np.tile(np.eye(4), (2, 1, 1))}
    np.savez(tmp_path / "rig.npz", **known, width=[160, 192], height=[120, 108])
    videos = source(tmp_path, rig=str(tmp_path / "rig.npz"))
    videos.validate()
    views = videos.bootstrap()
    assert [v.size for v in views] == [(160, 120), (192, 108)]
    assert all(v.origin is not None and v.K is not None and v.K[0, 0] != 150 and v.pose_trusted for v in views)
    assert videos.scale().unit == "m"
    np.savez(tmp_path / "rig.npz", **known, width=[160, 160], height=[120, 120])
    with pytest.raises(ReconError, match="K of camera right is for 160x120, its images are 192x108"):
        source(tmp_path, rig=str(tmp_path / "rig.npz")).validate()
    with pytest.raises(ReconError, match="both give intrinsics"):
        source(tmp_path, rig=str(tmp_path / "rig.npz"), intrinsics=str(tmp_path / "rig.npz")).validate()


def test_a_camera_that_moves_has_a_pose_for_every_frame(folder: Path) -> None:
    T = np.tile(np.eye(4), (2, 24, 1, 1))
    T[..., 0, 3] = np.arange(24)
    np.savez(folder / "P.npz", T_world_cam=T)
    for batch in source(folder, poses=str(folder / "P.npz"), frame_step=9).batches():
        assert all(view.T_world_cam is not None and view.T_world_cam[0, 3] == view.frame for view in batch)
    np.savez(folder / "P.npz", T_world_cam=T[:, :20])
    with pytest.raises(ReconError, match="20 poses per camera, but camera left has 24 frames"):
        source(folder, poses=str(folder / "P.npz")).validate()


def test_decoders_keep_no_more_than_they_were_told(folder: Path) -> None:
    from recon.sources.decode import Decoders

    made: list[int] = []

    def endless() -> Iterator[tuple[int, str]]:
        for number in range(10_000):
            made.append(number)
            yield number, "nothing"

    with Decoders({"a": endless}, ahead=3) as decoders:
        assert decoders.take("a", 50) == "nothing"
        time.sleep(0.2)
        assert len(made) <= 51 + 3 + 1  # in the queue, and one in the thread's hand


def test_a_fault_in_a_decoder_reaches_the_reader() -> None:
    from recon.sources.decode import Decoders

    def broken() -> Iterator[tuple[int, str]]:
        yield 0, "nothing"
        raise ReconError("the disc is gone", "look for it")

    with Decoders({"a": broken}, ahead=3) as decoders:
        assert decoders.take("a", 0) == "nothing"
        with pytest.raises(ReconError, match="the disc is gone"):
            decoders.take("a", 1)


def test_the_key_is_that_of_the_frames_that_bootstrap(folder: Path) -> None:
    key = source(folder).content_key()
    assert source(folder, max_batches=3).content_key() == key
    assert source(folder, start_s=0.5).content_key() != key
    assert source(folder, views=["left"]).content_key() != key


def test_impossible_knobs_are_refused(folder: Path) -> None:
    for knobs, message in [
        ({"end_s": 0.0}, "must be later"), ({"start_s": -1.0}, "start_s=-1"), ({"ahead": 0}, "ahead=0"),
        ({"max_skew_ms": -1.0}, "max_skew_ms"), ({"rig_unit": "m"}, "without source.rig"), ({"rig_unit": "mm", "rig": "x"}, "rig_unit=mm"),
        ({"start_together": True, "timestamps": "x"}, "two sources of time"),
    ]:  # fmt: skip
        with pytest.raises(ReconError, match=message):
            source(folder, **knobs).check()


def test_leaving_early_ends_the_decoders(folder: Path) -> None:
    before = threading.active_count()
    batches = source(folder).batches()
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_no_frame_of_a_file_is_dropped_however_slow_the_reader(folder: Path) -> None:
    videos = source(folder, ahead=1)
    count = 0
    for batch in videos.batches():
        count += len(batch)
        time.sleep(0.01)
    assert count == 2 * 23


def test_the_yaml_is_the_default() -> None:
    with pytest.raises(ReconError, match=r"needs source\.path"):
        option("source", "videos")


# --- real recordings -------------------------------------------------------------------------------------------------


def office(data_dir: Path, **knobs: Any) -> Videos:
    folder = data_dir / "office4"
    known: dict[str, Any] = {
        "path": str(folder), "rig": str(folder / "camera_array.toml"), "timestamps": str(folder / "timestamps.csv")
    }  # fmt: skip
    return Videos(**({"name": "videos"} | known | knobs))


def test_office_is_synchronised_to_what_its_clock_says(data_dir: Path) -> None:
    videos = office(data_dir, frame_step=8)
    videos.check()
    videos.validate()
    batches = list(videos.batches())
    assert [len(batch) for batch in batches] == [4] * 7
    assert all(isinstance(view, View) and view.origin is not None for batch in batches for view in batch)
    whole = skew(moments(videos._timeline().times, 0.05), 4, 50.0)
    assert (whole["moments"], whole["incomplete_moments"]) == (57, 0)
    assert whole["skew_ms"]["max"] == pytest.approx(19.9, abs=0.1)
    assert videos.scale().unit == "m"


def test_office_with_a_damaged_time_stamp_file(data_dir: Path, tmp_path: Path) -> None:
    lines = (data_dir / "office4" / "timestamps.csv").read_text().splitlines()
    rows = [line for line in lines[1:] if not line.startswith(("40,1,", "41,1,"))]
    np.random.default_rng(0).shuffle(rows)
    videos = office(data_dir, timestamps=str(csv(tmp_path / "t.csv", lines[0], *rows, rows[0])), end_s=2.0)
    batches = {batch[0].frame: [view.camera for view in batch] for batch in videos.batches()}
    assert {frame: len(cameras) for frame, cameras in batches.items()} == {
        n: 3 if n in (5, 6) else 4 for n in range(1, 13)
    }
    videos.validate()
    notes = [videos._timeline().notes[f"cam_{n}"] for n in range(4)]
    assert [n["frames_without_time"] for n in notes] == [0, 2, 0, 0]
    assert sum(n["rows_repeated"] for n in notes) == 1


def test_one_moving_camera(data_dir: Path) -> None:
    videos = Videos(name="videos", path=str(data_dir / "vggt_examples" / "videos" / "fern.mp4"), max_batches=3)
    videos.validate()
    assert videos.cameras() == ["fern"]
    assert len(list(videos.batches())) == 3
