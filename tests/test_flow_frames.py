"""Flow fields as a stream, against a brute-force reading of which frame gets which field."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import cv2
import numpy as np
import pytest
import torch

from mmdist_e2e.extractors.flow import fields as flow_frames
from mmdist_e2e.extractors.flow.fields import (
    PAIRS_PER_CALL,
    FlowFrames,
    FlowPreprocessing,
    Repeats,
    grey,
)
from mmdist_e2e.structures import MmdistError

SIDE = 16
PLAIN = FlowPreprocessing(shorter_side=SIDE, size=SIDE, bound=300.0)


@pytest.fixture
def pairs(monkeypatch):
    """A solver whose flow is (second − first, first), and how many pairs each call had."""
    calls: list[int] = []

    def solver(first_NHW, second_NHW, **_):
        calls.append(len(first_NHW))
        first, second = first_NHW.float(), second_NHW.float()
        return torch.stack([second - first, first], dim=1)

    monkeypatch.setattr(flow_frames, "tvl1", solver)
    return calls


def shades(values: list[int]) -> np.ndarray:
    """Frames of one grey each."""
    frames = np.array(values, dtype=np.uint8)[:, None, None, None]
    return np.broadcast_to(frames, (len(values), SIDE, SIDE, 3)).copy()


def stream(
    frames: np.ndarray, chunk: int, *, repeats: bool = False, preprocessing=PLAIN
) -> np.ndarray:
    flow, found, pieces = FlowFrames(preprocessing), Repeats(), []
    for begin in range(0, len(frames), chunk):
        part = frames[begin : begin + chunk].copy()
        repeats_N = found.find(part) if repeats else ()
        pieces += flow.push(torch.from_numpy(part), repeats_N)
        part[:] = 7  # a decoder uses its memory again
    pieces += flow.finish()
    assert all(len(piece) <= PAIRS_PER_CALL for piece in pieces)
    return torch.cat(pieces).numpy()


def brute_force(values: list[int], *, repeats: bool) -> list[tuple[int, int]]:
    """(difference, own grey) of each sample's field."""
    fields: list[tuple[int, int]] = []
    for index, value in enumerate(values):
        rest = values[index + 1 :]
        following = next((v for v in rest if v != value), None) if repeats else (rest or [None])[0]
        if following is not None:
            fields.append((following - value, value))
        else:  # no next frame: the field before, or none at all
            fields.append(fields[-1] if fields else (0, 0))
    return fields


def test_grey_is_the_rounded_luma():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    weights = [Fraction(299, 1000), Fraction(587, 1000), Fraction(114, 1000)]
    got = grey(torch.from_numpy(frames)).numpy()
    assert got.dtype == np.uint8
    for pixel, value in zip(frames.reshape(-1, 3).tolist(), got.ravel().tolist(), strict=True):
        assert abs(sum(w * p for w, p in zip(weights, pixel, strict=True)) - value) <= 0.5
    pure = np.eye(3, dtype=np.uint8)[None, None] * 255
    assert grey(torch.from_numpy(pure)).ravel().tolist() == [76, 150, 29]
    assert grey(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)).min() == 255


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 40, 1000])
def test_every_frame_gets_the_flow_to_its_next_one(pairs, chunk, repeats):
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, PAIRS_PER_CALL, PAIRS_PER_CALL + 1, 3 * PAIRS_PER_CALL + 5):
        # Few shades, so that there are runs of equal ones.
        values = rng.integers(0, 3, count).tolist()
        pairs.clear()
        fields = stream(shades(values), chunk, repeats=repeats)
        assert fields.shape == (count, SIDE, SIDE, 2)
        assert fields.dtype == np.float16
        assert fields[:, 3, 5].tolist() == [list(f) for f in brute_force(values, repeats=repeats)]
        changes = sum(a != b for a, b in itertools.pairwise(values))
        assert sum(pairs) == (changes if repeats else count - 1)
        # Whatever the chunks, the solver gets whole batches.
        assert all(call == PAIRS_PER_CALL for call in pairs[:-1])


@pytest.mark.parametrize("chunk", [1, 3, 40, 1000])
def test_still_repeats_have_the_flow_between_consecutive_samples(pairs, chunk):
    still = replace(PLAIN, repeats="still")
    rng = np.random.default_rng(1)
    for count in (2, 3, PAIRS_PER_CALL, PAIRS_PER_CALL + 1, 3 * PAIRS_PER_CALL + 5):
        for shade_count in (1, 2, 3, 200):
            values = rng.integers(0, shade_count, count).tolist()
            pairs.clear()
            fields = stream(shades(values), chunk, repeats=True, preprocessing=still)
            assert fields[:, 3, 5, 0].tolist() == np.diff(values).tolist()  # n − 1 of them
            assert sum(pairs) == np.count_nonzero(np.diff(values))
    assert not stream(
        shades([7]), chunk, repeats=True, preprocessing=still
    ).any()  # a row needs a field


@pytest.mark.parametrize("shape", [(180, 320), (320, 180), (224, 300), (250, 240)])
def test_charades_fields_are_the_recipes(shape):
    """8 bits at the frames' size, then enlarged to 224 by OpenCV, then NumPy's center crop."""
    charades = FlowPreprocessing(
        None, 224, crop=224, quantise=True, minimum_side=224, repeats="still"
    )
    coarse = np.random.default_rng(5).uniform(-30, 30, (2, 8, 8)).astype(np.float32)
    flow = np.stack([cv2.resize(part, shape[::-1]) for part in coarse])
    (field,) = charades.fields(torch.from_numpy(flow[None])).numpy()
    for axis in range(2):
        stored = np.rint(255 * (flow[axis].clip(-20, 20).astype(np.float64) + 20) / 40)
        image, scale = stored.astype(np.uint8), 224 / min(shape)
        if scale > 1:
            image = cv2.resize(image, tuple(round(n * scale) for n in shape[::-1]))
        top, left = (int(np.round((n - 224) / 2)) for n in image.shape)
        expected = image[top : top + 224, left : left + 224].astype(int)
        assert np.abs(field[..., axis].astype(int) - expected).max() <= 1
    assert charades.greys(torch.zeros((1, *shape, 3), dtype=torch.uint8)).shape == (1, *shape)


def test_video_that_does_not_move_or_has_no_frame(pairs):
    for repeats in (False, True):
        assert not stream(shades([7]), 1, repeats=repeats).any()
        assert list(FlowFrames(PLAIN).finish()) == []
    assert len(stream(shades([7] * 50), 8, repeats=True)) == 50
    assert pairs == []


def test_memory_does_not_grow_with_length(pairs):
    flow, found = FlowFrames(PLAIN), Repeats()
    still = shades([1] * 100)
    for _ in range(100):
        assert list(flow.push(torch.from_numpy(still), found.find(still))) == []
    assert len(flow._greys) == 1
    moving = shades([0, 1] * 50)
    for _ in range(20):
        for piece in flow.push(torch.from_numpy(moving), found.find(moving)):
            assert len(piece) <= PAIRS_PER_CALL
        assert len(flow._greys) <= PAIRS_PER_CALL


def ramp(height: int, width: int) -> torch.Tensor:
    """A flow of the column's and the row's number, [1, 2, H, W]."""
    rows, columns = np.mgrid[0:height, 0:width]
    return torch.from_numpy(np.stack([columns, rows])[None].astype(np.float32))


def test_field_is_cropped_from_the_center_and_clipped():
    cropped = FlowPreprocessing(shorter_side=20, size=16, crop=16, bound=10.0)
    fields = cropped.fields(ramp(20, 30))
    assert fields.shape == (1, 16, 16, 2)
    rows, columns = np.mgrid[2:18, 7:23]
    np.testing.assert_array_equal(fields[0, ..., 0], np.minimum(columns, 10))
    np.testing.assert_array_equal(fields[0, ..., 1], np.minimum(rows, 10))


def test_field_is_resized_whole_and_keeps_its_pixels():
    whole = FlowPreprocessing(shorter_side=32, size=16, bound=50.0)
    fields = whole.fields(ramp(32, 48))[0].double().numpy()
    # Pixel centers: column c of 16 lies at 3 (c + ½) − ½ of 48; displacements are not scaled.
    inner = np.arange(2, 14)
    np.testing.assert_allclose(fields[8, 2:14, 0], 3 * (inner + 0.5) - 0.5, atol=0.02)
    np.testing.assert_allclose(fields[2:14, 8, 1], 2 * (inner + 0.5) - 0.5, atol=0.02)


@pytest.mark.parametrize("quantise", [False, True])
def test_network_reads_minus_one_to_one(quantise):
    preprocessing = FlowPreprocessing(shorter_side=16, size=16, quantise=quantise)
    flow = np.zeros((3, 2, 16, 16), np.float32)
    flow[0, 0], flow[0, 1], flow[1, 0], flow[1, 1] = 20, -20, 99, -3.3
    fields = preprocessing.fields(torch.from_numpy(flow))
    assert fields.dtype == (torch.uint8 if quantise else torch.float16)
    read = preprocessing.to_network(fields[None])
    assert read.shape == (1, 2, 3, 16, 16)
    assert read.dtype == torch.float32
    expected = [[1, 1, 0], [-1, -3.3 / 20, 0]]
    error = np.abs(read[0, :, :, 4, 4].numpy() - expected)
    assert error.max() <= (1 / 255 + 1e-6 if quantise else 1e-4)
    if quantise:
        assert error[0, 2] > 0  # 256 buckets have none for zero, as in the original data


def test_flow_is_in_pixels_of_the_shorter_side():
    """A texture that moves 4 pixels a frame at 64 pixels moves 2 at 32."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(0, 255, (1, 1, 16, 32)))
    texture = torch.nn.functional.interpolate(coarse, (64, 128), mode="bicubic")[0, 0]
    texture = texture.clamp(0, 255).numpy().astype(np.uint8)
    frames = np.stack([texture[:, 16 - 4 * i : 112 - 4 * i] for i in range(3)])
    frames = np.repeat(frames[..., None], 3, axis=3)
    flow = FlowFrames(FlowPreprocessing(shorter_side=32, size=32, crop=32))
    pieces = [*flow.push(torch.from_numpy(frames)), *flow.finish()]
    fields = torch.cat(pieces).float().numpy()
    assert fields.shape == (3, 32, 32, 2)
    inner = fields[:, 6:-6, 6:-6]
    assert np.abs(inner[..., 0].mean() - 2) < 0.2
    assert np.abs(inner[..., 1].mean()) < 0.2
    np.testing.assert_array_equal(fields[2], fields[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shorter_side": 15, "size": 15}, "at least 16"),
        ({"shorter_side": 32, "size": 32, "bound": 0.0}, "above 0"),
        ({"shorter_side": 32, "size": 32, "crop": 24}, "crop 24"),
        ({"shorter_side": 32, "size": 48, "crop": 48}, "size 48 and 32"),
        ({"shorter_side": None, "size": 32}, "either a shorter_side or a minimum_side"),
        ({"shorter_side": 32, "size": 32, "minimum_side": 32}, "either"),
        ({"shorter_side": None, "size": 32, "minimum_side": 32, "crop": 32}, "quantise"),
        ({"shorter_side": 32, "size": 32, "repeats": "twice"}, "valid: distinct, still"),
    ],
)
def test_bad_preprocessing_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        FlowPreprocessing(**settings)


def test_unknown_backend_is_one_sentence():
    flow = FlowFrames(PLAIN, backend="magic")
    list(flow.push(torch.from_numpy(shades([1, 2]))))
    with pytest.raises(MmdistError, match="'magic' is unknown"):
        list(flow.finish())
