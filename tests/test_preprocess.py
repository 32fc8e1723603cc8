"""Frames to a network's input: sizes, crops, numbers, the order of colours, and mistakes."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from mmdist_e2e.extractors.profiles import Preprocessing
from mmdist_e2e.extractors.runner import to_network


def ramp(height, width):
    """One frame: red rises to the right, green downwards, blue is flat."""
    frame = np.zeros((1, height, width, 3))
    frame[0, ..., 0] = np.arange(width) * 250 / width
    frame[0, ..., 1] = (np.arange(height) * 250 / height)[:, None]
    frame[0, ..., 2] = 40
    return frame.round().astype(np.uint8)


def expected_ramp(length, full, start, count):
    """The ramp of `full` steps resized to `length`, cropped: pixel centers stay where they are."""
    centers = (np.arange(start, start + count) + 0.5) * full / length - 0.5
    return centers * 250 / full


@pytest.mark.parametrize(
    ("settings", "shape", "resized"),
    [
        ({"size": 32}, (64, 96), (32, 32)),
        ({"size": 32, "shorter_side": 48, "crop": 32}, (64, 96), (48, 72)),
        ({"size": 32, "shorter_side": 48, "crop": 32}, (96, 64), (72, 48)),
        ({"size": 112, "resize": [128, 171], "crop": 112}, (240, 320), (128, 171)),
        ({"size": 112, "resize": [112, 200], "crop": 112}, (360, 480), (112, 200)),
        ({"size": 112, "resize": [128, 171], "crop": 112}, (100, 90), (128, 171)),
    ],
)
def test_frames_are_resized_then_cropped_at_the_center(settings, shape, resized):
    preprocessing = Preprocessing(**settings)
    size = settings["size"]
    assert preprocessing.target(*shape) == resized
    out = preprocessing(torch.from_numpy(ramp(*shape))).numpy()
    assert (out.shape, out.dtype) == ((1, size, size, 3), np.uint8)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    inside = slice(2, -2)  # at the border of the frame a ramp flattens
    down = expected_ramp(resized[0], shape[0], top, size)
    right = expected_ramp(resized[1], shape[1], left, size)
    assert np.abs(out[0, size // 2, inside, 0] - right[inside]).max() < 1.5
    assert np.abs(out[0, inside, size // 2, 1] - down[inside]).max() < 1.5
    assert np.abs(out[..., 2].astype(int) - 40).max() == 0


def test_a_frame_of_the_right_size_is_only_cropped():
    frames = np.random.default_rng(0).integers(0, 256, (2, 128, 171, 3), dtype=np.uint8)
    for size, kept in ((112, frames[:, 8:120, 29:141]), (128, frames[:, :, 21:149])):
        preprocessing = Preprocessing(size=size, resize=[128, 171], crop=size)
        out = preprocessing(torch.from_numpy(frames))
        np.testing.assert_array_equal(out, kept)
        assert not np.shares_memory(out, frames)


def exact_resize(frame_HWC, target):
    """Antialiased bilinear in float64: a triangle of the scale's width around each center."""

    def weights(length, full):
        scale = full / length
        centers = (np.arange(length)[:, None] + 0.5) * scale
        distances = np.abs(np.arange(full)[None] + 0.5 - centers) / max(scale, 1.0)
        table = np.clip(1 - distances, 0, None)
        return table / table.sum(axis=1, keepdims=True)

    height, width = frame_HWC.shape[:2]
    rows, columns = weights(target[0], height), weights(target[1], width)
    return np.einsum("hr,wc,rcd->hwd", rows, columns, frame_HWC.astype(np.float64), optimize=True)


@pytest.mark.parametrize(
    "shape", [(240, 320), (360, 640), (479, 271), (60, 81), (224, 225), (1080, 1920)]
)
@pytest.mark.parametrize("count", [1, 19])
def test_resizing_in_8_bit_is_within_one_level_of_float64(shape, count):
    if count > 1 and shape[0] > 500:
        count = 2
    frames = np.random.default_rng(2).integers(0, 256, (count, *shape, 3), dtype=np.uint8)
    frames[:, : shape[0] // 2] = (frames[:, : shape[0] // 2] > 127) * 255  # hard edges
    preprocessing = Preprocessing(size=224, shorter_side=256, crop=224)
    before = frames.copy()
    out = preprocessing(torch.from_numpy(frames)).numpy()
    np.testing.assert_array_equal(frames, before)
    assert (out.shape, out.dtype) == ((count, 224, 224, 3), np.uint8)
    height, width = preprocessing.target(*shape)
    top, left = (height - 224) // 2, (width - 224) // 2
    for n in {0, count // 2, count - 1}:
        expected = exact_resize(frames[n], (height, width))[top : top + 224, left : left + 224]
        assert np.abs(out[n] - expected).max() <= 1.0
    turned = torch.from_numpy(frames).transpose(1, 2)  # not contiguous
    assert torch.equal(preprocessing(turned), preprocessing(turned.contiguous()))


@pytest.mark.parametrize(
    ("shape", "target"),
    [((180, 320), (226, 402)), ((320, 180), (402, 226)), ((226, 320), (226, 320)),
     ((240, 320), (240, 320)), ((225, 319), (226, 320))],
)  # fmt: skip
def test_small_frames_are_enlarged_as_opencv_does(shape, target):
    """piergiaj/pytorch-i3d: bilinear below 226, then NumPy's rounding of the crop's corner."""
    frames = np.random.default_rng(3).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    preprocessing = Preprocessing(size=224, minimum_side=226, crop=224)
    assert preprocessing.target(*shape) == target
    top, left = (int(np.round((side - 224) / 2)) for side in target)
    for frame, out in zip(frames, preprocessing(torch.from_numpy(frames)).numpy(), strict=True):
        resized = cv2.resize(frame, target[::-1], interpolation=cv2.INTER_LINEAR)
        expected = resized[top : top + 224, left : left + 224].astype(int)
        assert np.abs(out.astype(int) - expected).max() <= 1


def windows():
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8))


def test_the_default_maps_bytes_to_minus_one_and_one():
    out = to_network(windows())
    assert (out.shape, out.dtype) == ((2, 3, 3, 4, 5), torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    expected = windows().numpy().astype(np.float64).transpose(0, 4, 1, 2, 3) / 127.5 - 1
    np.testing.assert_allclose(out, expected, atol=1e-6)
    assert torch.equal(out, to_network(windows(), Preprocessing(size=4)))
    assert to_network(torch.full((1, 1, 1, 1, 3), 255, dtype=torch.uint8)).max() == 1
    assert to_network(torch.zeros((1, 1, 1, 1, 3), dtype=torch.uint8)).min() == -1


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_mean_and_std_are_those_of_red_green_and_blue_in_any_order(order):
    mean, std = [104, 117.5, 128], [1, 57.375, 3]
    preprocessing = Preprocessing(size=4, mean=mean, std=std, channel_order=order)
    before = windows()
    out = to_network(before, preprocessing).numpy()
    assert torch.equal(before, windows()), "the caller's windows are his own"
    for place, colour in enumerate(order):
        c = "rgb".index(colour)
        expected = (windows()[..., c].numpy().astype(np.float64) - mean[c]) / std[c]
        np.testing.assert_allclose(out[:, place], expected, rtol=1e-6, atol=1e-4)


def test_json_gives_the_same_as_python():
    settings = {"size": 112, "resize": (128, 171), "crop": 112, "mean": (1, 2, 3), "std": (4, 5, 6)}
    again = Preprocessing(**json.loads(json.dumps(settings)))
    assert again == Preprocessing(**settings)
    assert hash(again) == hash(Preprocessing(**settings))
    assert Preprocessing(224, 256, 224).target(480, 640) == (256, 341)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": 0}, "size must be .* got 0"),
        ({"size": "224"}, "size must be .* got '224'"),
        ({"size": 112.0}, "got 112.0"),
        ({"size": 224, "shorter_side": 256}, "crop goes with .* crop None with .*shorter_side"),
        ({"size": 224, "crop": 224}, "crop goes with"),
        ({"size": 224, "shorter_side": 256, "crop": 200}, "200 != 224"),
        ({"size": 224, "shorter_side": 200, "crop": 224}, "shorter_side .* got 200"),
        ({"size": 112, "resize": [128, 171]}, "crop goes with"),
        ({"size": 112, "resize": [128], "crop": 112}, r"resize must be 2 .* got \[128\]"),
        ({"size": 112, "resize": [128, 100], "crop": 112}, "resize .* at least 112; got 100"),
        ({"size": 112, "resize": [128.5, 171], "crop": 112}, "resize .* got 128.5"),
        (
            {"size": 112, "resize": [128, 171], "shorter_side": 128, "crop": 112},
            "one of shorter_side, minimum_side and resize",
        ),
        ({"size": 112, "resize": 128, "shorter_side": 128, "crop": 112}, "'resize': 128"),
        ({"size": 112, "minimum_side": 128, "shorter_side": 128, "crop": 112}, "'minimum_side'"),
        ({"size": 224, "minimum_side": 226}, "crop goes with"),
        ({"size": 224, "minimum_side": 200, "crop": 224}, "minimum_side .* got 200"),
        ({"size": 112, "mean": [1, 2]}, r"mean must be 3 .* got \[1, 2\]"),
        ({"size": 112, "mean": "abc"}, "mean must be 3 .* got 'abc'"),
        ({"size": 112, "mean": 104}, "mean must be 3 .* got 104"),
        ({"size": 112, "mean": [1, 2, float("nan")]}, "mean must be 3"),
        ({"size": 112, "std": [1, 0, 1]}, r"std must be above 0; got \[1, 0, 1\]"),
        ({"size": 112, "channel_order": "gbr"}, "'gbr' is unknown; valid: rgb, bgr"),
    ],
)
def test_mistakes_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        Preprocessing(**settings)
