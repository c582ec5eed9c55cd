"""Images into fixed inputs, and back to a hundredth of a pixel."""

import numpy as np
import pytest

from recon.errors import ReconError
from recon.geometry.preprocess import example_images, fit, place

CASES = [  # source (w, h), target (w, h), mode
    ((640, 480), (518, 392), "crop"),  # VGGT's own rule: nothing cropped, nothing white
    ((640, 480), (518, 518), "crop"),  # white above and below
    ((480, 640), (518, 518), "crop"),  # rows cropped
    ((640, 480), (518, 518), "pad"),
    ((333, 517), (518, 518), "pad"),
    ((1280, 720), (308, 224), "pad"),
]


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    """Dark soft disc on white."""
    v, u = np.mgrid[: size[1], : size[0]]
    blob = np.exp(-((u - centre[0]) ** 2 + (v - centre[1]) ** 2) / (2 * radius**2))
    return np.repeat(np.rint(255 * (1 - blob)).astype(np.uint8)[..., None], 3, axis=2)


def centroid(image: np.ndarray) -> np.ndarray:
    """Centre of darkness; squared, so that rounding to grey values far from the disc does not pull at it."""
    weight = (255.0 - image[..., 0]) ** 2
    v, u = np.mgrid[: image.shape[0], : image.shape[1]]
    return np.array([(weight * u).sum(), (weight * v).sum()]) / weight.sum()


@pytest.mark.parametrize(("source", "target", "mode"), CASES)
def test_the_way_back_is_right_to_a_hundredth_of_a_pixel(source, target, mode) -> None:
    placement = place(source, target, mode)
    errors = []
    for share in np.linspace(0.44, 0.56, 6):
        image = disc(source, (source[0] * share, source[1] * (1 - share)), radius=min(source) / 10)
        back = np.linalg.inv(placement.matrix) @ [*centroid(fit(image, placement)), 1]
        errors.append(back[:2] - centroid(image))
    assert np.abs(np.mean(errors, axis=0)).max() < 0.01  # half a pixel forgotten would be 0.1 here


@pytest.mark.parametrize(("source", "target", "mode"), CASES)
def test_intrinsics_and_their_way_back(source, target, mode) -> None:
    placement = place(source, target, mode)
    K = np.array([[500.0, 0, 321.5], [0, 510, 237.25], [0, 0, 1]])
    there = placement.to_network(K)
    assert np.allclose(placement.to_source(there), K, atol=1e-10)
    point = np.array([0.3, -0.2, 1.7])
    before, after = K @ point, there @ point
    assert np.allclose(placement.matrix @ (before / before[2]), after / after[2])


@pytest.mark.parametrize(
    ("source", "mode", "resized", "corner"),
    [
        ((640, 480), "crop", (518, 392), (0, 63)),  # 388.5 -> 27.75 patches -> 28
        ((480, 640), "crop", (518, 686), (0, -84)),  # 690.7 -> 49.3 patches -> 49; upstream's crop starts at 84
        ((640, 480), "pad", (518, 392), (0, 63)),
        ((480, 640), "pad", (392, 518), (63, 0)),
        ((1036, 532), "crop", (518, 266), (0, 126)),  # 266 = 19 patches exactly
        ((518, 259), "crop", (518, 252), (0, 133)),  # 18.5 patches: ties go to even
    ],
)
def test_sizes_of_the_published_loader(source, mode, resized, corner) -> None:
    placement = place(source, (518, 518), mode)
    assert (placement.resized, placement.corner) == (resized, corner)


def test_what_is_no_image_is_white_and_known() -> None:
    placement = place((640, 480), (518, 518), "crop")
    found = fit(np.zeros((480, 640, 3), np.uint8), placement)
    assert (found[~placement.content()] == 255).all()
    assert (found[placement.content()] == 0).all()
    assert placement.content().sum() == 392 * 518


def test_impossible_placements_are_refused() -> None:
    with pytest.raises(ReconError, match="no such mode"):
        place((640, 480), (518, 518), "stretch")
    with pytest.raises(ReconError, match="would become 518x0"):
        place((5000, 40), (518, 518), "pad")


def test_example_images_are_the_same_everywhere() -> None:
    first, again = example_images(2, (56, 42), 3), example_images(2, (56, 42), 3)
    assert first.shape == (2, 42, 56, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, example_images(2, (56, 42), 4))
    assert not np.array_equal(first[0], first[1])
