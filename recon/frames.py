"""Frames to network inputs: what calibration, accuracy and sensitivity look at.

Frames come from the configured source, or from `calibration.path`: a folder, a glob, or tensors in .npy and .npz files.
Preprocessing is the one that the network's option uses in `bootstrap` and `predict`. An input of a bootstrap network is
one frame per camera at one time step; where there are fewer cameras than views, successive time steps are joined, and a
flat folder is cut into groups of as many files as there are views.

Inputs are spread over the recording. Those for accuracy share no frame with those of calibration; where a recording is
too short for that, at least one third of it is kept from calibration, and a single input is used for both and counted
as `shared`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from recon.errors import ReconError
from recon.geometry.views import View

if TYPE_CHECKING:
    import torch

    from recon.calibration import CalibrationOptions
    from recon.config import Config
    from recon.depth import Depth
    from recon.models import Model
    from recon.network import Network
    from recon.sources import Source

    Tensors = dict[str, torch.Tensor]
    Preprocess = Callable[[list[View]], Tensors]

CONSTANT = "ranges of an input without content mean nothing"
IMAGES, TENSORS = (".jpg", ".jpeg", ".png"), (".npy", ".npz")


@dataclass(frozen=True)
class Item:
    """One input before preprocessing: decoded views, or the tensor that the network takes. `ids` name its frames."""

    ids: tuple[str, ...]
    views: list[View]
    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class Sample:
    """Inputs of a network from real frames. ids: frames of each input. shared: inputs that calibration sees as well."""

    feeds: list[Tensors]
    ids: list[tuple[str, ...]]
    shared: int
    origin: str


def feeds(config: Config, network: Network, role: str, count: int, skip: int = 0) -> list[Tensors]:
    """`count` inputs of a network (fewer where there are no more frames); arguments as for `sample`."""
    return sample(config, network, role, count, skip).feeds


def sample(config: Config, network: Network, role: str, count: int, skip: int = 0) -> Sample:
    """`count` inputs of a network from real frames. role: `model` or `depth`.

    skip = 0 gives the frames of calibration; skip = N gives others than those that calibration with N inputs sees.

    Raises:
        ReconError: there are no frames, too few for one input, of the wrong geometry, not finite, out of range, or
            without content (every frame of an input has one colour).
    """
    option: Model | Depth = config.model if role == "model" else config.depth
    spec = next(iter(network.inputs.values()))
    pool = _pool(config.calibration, config.source, spec.shape[0])
    items, shared = _chosen(pool, count, skip)
    found = [_prepared(item, option.feeds, network, option.input_range, pool.origin) for item in items]
    return Sample(found, [item.ids for item in items], shared, pool.origin)


def require(config: Config, network: Network, role: str) -> None:
    """Raise ReconError where there are no frames, or too few for one input. Little or nothing is decoded."""
    spec = next(iter(network.inputs.values()))
    _pool(config.calibration, config.source, spec.shape[0])


def data_hash(options: CalibrationOptions, source: Source, views: int) -> str:
    """Content hash of the frames that calibration would look at with `views` per input."""
    digest = hashlib.sha256()
    items, _ = _chosen(_pool(options, source, views), options.batches, 0)
    for item in items:
        arrays = [view.image for view in item.views] if item.tensor is None else [item.tensor.numpy()]
        for array in arrays:
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _chosen(pool: Pool, count: int, skip: int) -> tuple[list[Item], int]:
    """Items, and how many of them calibration uses too."""
    if not skip:
        return pool.take(_calibration_share(count, pool.size), ()), 0
    seen = pool.take(_calibration_share(skip, pool.size), ())
    used = {name for item in seen for name in item.ids}
    if items := pool.take(count, tuple(used)):
        return items, 0
    return seen[:count], len(seen[:count])


def _calibration_share(asked: int, available: int) -> int:
    """Short recordings leave a third for accuracy; a single input serves both."""
    return min(asked, max(1, available - max(1, available // 3)))


class Pool:
    """Inputs that can be taken. size: how many there are. origin: where they come from, for people."""

    size: int
    origin: str

    def take(self, count: int, avoid: Sequence[str]) -> list[Item]:
        """At most `count` inputs, spread over all, without the frames named in `avoid`."""
        raise NotImplementedError


class SourcePool(Pool):
    """Frames of a source, every k-th time step so that the whole recording is seen but little of it decoded."""

    def __init__(self, source: Source, views: int, origin: str) -> None:
        cameras = len(source.cameras())
        self.source, self.views, self.origin = source, views, origin
        self.steps = 1 + len(source)
        self.size = self.steps * (cameras // views) if cameras >= views else self.steps * cameras // views
        if not self.size:
            raise ReconError(
                f"{origin} has {self.steps * cameras} frames, and the network takes {views} views at once",
                f"give {views} or more frames with calibration.path or source.path, fewer model.views or depth.batch,"
                " or accuracy.examples=true where nothing is calibrated",
            )
        self._joins = cameras < views  # else what one moment leaves over is left out: it belongs to no other
        self._per_step = cameras / views if cameras < views else cameras // views

    def take(self, count: int, avoid: Sequence[str]) -> list[Item]:
        known = set(avoid)
        inputs = count + -(-len(known) // self.views)
        steps = min(self.steps, int(np.ceil(inputs / self._per_step)))
        found = list(self._grouped(self._moments(steps, known)))
        return [found[i] for i in _spread(len(found), count)]

    def _moments(self, steps: int, known: set[str]) -> Iterator[list[View]]:
        """About `steps` time steps, the bootstrap's first."""
        stride = max(1, self.steps // steps)
        thinned = replace(self.source, frame_step=self.source.frame_step * stride)
        left = steps
        for moment in _joined(thinned):
            if not known & {_id(view) for view in moment}:
                yield moment
            left -= 1
            if left <= 0:
                return

    def _grouped(self, moments: Iterator[list[View]]) -> Iterator[Item]:
        kept: list[View] = []
        for moment in moments:
            kept += moment
            whole = len(kept) // self.views * self.views
            for start in range(0, whole, self.views):
                group = kept[start : start + self.views]
                yield Item(tuple(_id(view) for view in group), group)
            kept = kept[whole:] if self._joins else []


def _joined(source: Source) -> Iterator[list[View]]:
    yield source.bootstrap()
    if len(source):
        yield from source.batches()


def _id(view: View) -> str:
    return f"{view.camera}/{view.frame}"


class FilePool(Pool):
    """Image files in groups of `views`, or the entries of tensor files."""

    def __init__(self, entries: list[Callable[[], Item]], names: list[tuple[str, ...]], origin: str) -> None:
        self.entries, self.names, self.origin, self.size = entries, names, origin, len(entries)

    def take(self, count: int, avoid: Sequence[str]) -> list[Item]:
        known = set(avoid)
        free = [i for i, names in enumerate(self.names) if not known & set(names)]
        return [self.entries[free[i]]() for i in _spread(len(free), count)]


def _spread(total: int, count: int) -> list[int]:
    """`count` indices spread evenly over `total`, or all."""
    count = min(count, total)
    return [i * total // count for i in range(count)]


def _pool(options: CalibrationOptions, source: Source, views: int) -> Pool:
    if options.path is None:
        source.check()
        if source.live:
            raise ReconError(
                f"source={source.name} is live: its frames cannot be looked at again", "give calibration.path=DIR"
            )
        return SourcePool(source, views, f"source={source.name}")
    path, origin = options.path, f"calibration.path={options.path}"
    folder = Path(path)
    if folder.is_dir() and any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        from recon.sources.images import Images

        return SourcePool(Images(name="images", path=path), views, origin)
    files = _files(path)
    tensors = [file for file in files if file.suffix.lower() in TENSORS]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    if tensors and images:
        raise ReconError(f"{origin}: both images and tensors", "give one kind, e.g. with a glob like DIR/*.png")
    if not files:
        kinds = ", ".join((*IMAGES, *TENSORS))
        raise ReconError(f"{origin}: no files that end in {kinds}", "give a folder, a glob or a file that has some")
    return _tensor_pool(tensors, views, origin) if tensors else _image_pool(images, views, origin)


def _files(path: str) -> list[Path]:
    """Files of a folder, of a glob, or the one file, in natural order."""
    import glob

    from recon.sources.rig import natural

    folder = Path(path)
    if folder.is_dir():
        found = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    elif folder.is_file():
        found = [folder]
    else:
        found = [Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file()]
        if not found:
            raise ReconError(f"calibration.path={path}: no such file, folder, or match", "check the path")
    return sorted((file for file in found if file.suffix.lower() in IMAGES + TENSORS), key=lambda f: natural(str(f)))


def _image_pool(files: list[Path], views: int, origin: str) -> Pool:
    from recon.sources.imagefiles import read_image

    groups = [files[i : i + views] for i in range(0, len(files) - views + 1, views)]
    if not groups:
        raise ReconError(
            f"{origin}: {len(files)} images, and the network takes {views} views at once",
            f"give {views} or more images, or fewer model.views or depth.batch",
        )

    def decoded(group: list[Path]) -> Item:
        return Item(tuple(map(str, group)), [View(file.stem, 0, read_image(file)) for file in group])

    return FilePool([partial(decoded, g) for g in groups], [tuple(map(str, g)) for g in groups], origin)


def _tensor_pool(files: list[Path], views: int, origin: str) -> Pool:
    """Every file holds one input, or several along a leading axis; which it is, is seen from its shape."""
    entries: list[Callable[[], Item]] = []
    names: list[tuple[str, ...]] = []
    for file in files:
        array = _array(file)
        if array.ndim == 4:  # (N,3,H,W) are N inputs of a network that takes one image
            array = array[:, None] if views == 1 else array[None]
        for index in range(len(array)):
            names.append((f"{file}[{index}]",))
            entries.append(partial(_entry, names[-1], array[index]))
    return FilePool(entries, names, origin)


def _entry(ids: tuple[str, ...], array: np.ndarray) -> Item:
    import torch

    if array.dtype == np.uint8:
        images = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
        return Item(ids, [View(f"view{i}", 0, image) for i, image in enumerate(images)])
    return Item(ids, [], torch.from_numpy(np.array(array, np.float32)))


def _array(file: Path) -> np.ndarray:
    """The one array of a .npy or .npz file, [..,views,3,H,W]; never unpickled."""
    shape = "(views,3,H,W) or (N,views,3,H,W), float32 as the network takes it, or uint8 RGB"
    try:
        found = np.load(file, allow_pickle=False)
        if file.suffix.lower() == ".npz":
            with found as data:
                if len(data.files) != 1:
                    raise ReconError(f"{file}: holds the arrays {data.files}", f"one array is needed: {shape}")
                found = data[data.files[0]]
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ReconError(
            f"{file}: cannot be read as an array: {error}", f"write it with numpy.save: {shape}"
        ) from error
    array = np.asarray(found)
    if array.ndim == 3:
        array = array[None]
    if array.ndim not in (4, 5) or array.shape[-3] != 3 or 0 in array.shape:
        raise ReconError(f"{file}: shape {np.shape(found)}", f"needed is {shape}")
    if array.dtype == np.uint8 or array.dtype.kind == "f":
        return array
    raise ReconError(f"{file}: holds {array.dtype}", f"needed is {shape}")


def _prepared(
    item: Item, preprocess: Preprocess, network: Network, limits: tuple[float, float], origin: str
) -> Tensors:
    """The item as the network takes it, checked."""
    name, spec = next(iter(network.inputs.items()))
    where = f"{origin}: {item.ids[0]}"
    if item.tensor is not None:
        found = {name: item.tensor}
    else:
        if all(int(view.image.max()) == int(view.image.min()) for view in item.views):
            value = int(item.views[0].image.max())
            raise ReconError(f"{where}: every pixel has the value {value}", f"{CONSTANT}: leave it out")
        found = preprocess(item.views)
    _check(found[name], spec.shape, limits, where)
    return found


def _check(tensor: torch.Tensor, shape: tuple[int, ...], limits: tuple[float, float], where: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ReconError(
            f"{where}: geometry {list(tensor.shape)}, and the network takes {list(shape)}",
            "give (views,3,H,W) of the network's own size, or images, which are brought to it",
        )
    if not bool(tensor.isfinite().all()):
        bad = int((~tensor.isfinite()).sum())
        raise ReconError(f"{where}: {bad} values are NaN or infinite", "leave this input out, or mend what wrote it")
    low, high = float(tensor.min()), float(tensor.max())
    if low == high:
        raise ReconError(f"{where}: every value is {low:g}", f"{CONSTANT}: leave it out")
    if low < limits[0] - 1e-3 or high > limits[1] + 1e-3:
        raise ReconError(
            f"{where}: values from {low:g} to {high:g}; this network takes {limits[0]:g} to {limits[1]:g}",
            "store what the network takes, or uint8 RGB images, which are brought to it",
        )
