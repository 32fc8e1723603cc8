"""Flow: known motions of textured images come back, by OpenCV's solver, on ten pairs."""

from __future__ import annotations

import numpy as np
import pytest

from mmdist_e2e.extractors.flow import TVL1Settings, tvl1
from mmdist_e2e.structures import MmdistError

cv2 = pytest.importorskip("cv2")
SIDE = 64


def textured(seed: int) -> np.ndarray:
    """A smooth random texture, larger than what the pair shows."""
    noise = np.random.default_rng(seed).uniform(0, 255, (2 * SIDE, 2 * SIDE)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    smooth -= smooth.min()
    return smooth / smooth.max() * 255


def translated_pair(seed: int, shift: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    texture = textured(seed)
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], dtype=np.float32)
    moved = cv2.warpAffine(texture, matrix, texture.shape[::-1], flags=cv2.INTER_CUBIC)
    crop = slice(SIDE // 2, SIDE // 2 + SIDE)
    return tuple(
        image[crop, crop].round().clip(0, 255).astype(np.uint8) for image in (texture, moved)
    )


def test_ten_known_translations_come_back():
    rng = np.random.default_rng(0)
    shifts = [tuple(rng.uniform(-3, 3, 2)) for _ in range(10)]
    pairs = [translated_pair(seed, shift) for seed, shift in enumerate(shifts)]
    first = np.stack([a for a, _ in pairs])
    second = np.stack([b for _, b in pairs])
    flow = tvl1(first, second)
    assert flow.shape == (10, 2, SIDE, SIDE)
    assert flow.dtype == np.float32
    inner = flow[:, :, 8:-8, 8:-8]
    for got, shift in zip(inner, shifts, strict=True):
        error = np.hypot(got[0] - shift[0], got[1] - shift[1]).mean()
        assert error < 0.15, (shift, error)
    # Each pair is solved alone: a batch changes nothing.
    np.testing.assert_array_equal(tvl1(first[3:4], second[3:4])[0], flow[3])


def test_settings_reach_the_solver():
    first, second = (image[None] for image in translated_pair(1, (2.0, 0.0)))
    full = tvl1(first, second)
    barely = tvl1(first, second, settings=TVL1Settings(scales=1, warps=1, iterations=1))
    assert np.abs(barely[0, 0] - 2).mean() > 5 * np.abs(full[0, 0] - 2).mean()


@pytest.mark.parametrize(
    ("first", "second", "backend", "words"),
    [
        (np.zeros((1, 32, 32), np.uint8), np.zeros((1, 32, 32), np.uint8), "magic", "auto, opencv"),
        (np.zeros((1, 32, 32), np.uint8), np.zeros((2, 32, 32), np.uint8), "auto", "one shape"),
        (np.zeros((1, 32, 32), np.float32), np.zeros((1, 32, 32), np.float32), "auto", "uint8"),
        (np.zeros((1, 8, 32), np.uint8), np.zeros((1, 8, 32), np.uint8), "auto", "16 pixels"),
    ],
)
def test_bad_input_is_one_sentence(first, second, backend, words):
    with pytest.raises(MmdistError, match=words):
        tvl1(first, second, backend=backend)
