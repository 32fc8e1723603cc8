"""C3D against a slow float64 evaluation that shares no code with it, and against its numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmdist_e2e.extractors.networks.c3d import C3D

Array = NDArray[np.float64]
CLASSES = 5
# The architecture as Table and Figure 3 of the paper give it: after which layer a pool comes.
POOL_AFTER = {"conv1": 1, "conv2": 2, "conv3b": 3, "conv4b": 4, "conv5b": 5}
LAYERS = ("conv1", "conv2", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b")


def slow(state: dict[str, Array], frames: Array) -> dict[str, Array]:
    """fc6 and fc7 (rectified) of frames [3, 16, 112, 112], in float64 over numpy."""
    volume = frames
    for name in LAYERS:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        padded = np.pad(volume, [(0, 0), (1, 1), (1, 1), (1, 1)])
        t, h, w = volume.shape[1:]
        total: Array = np.zeros((len(weight), t, h, w)) + bias[:, None, None, None]
        for i, j, k in itertools.product(range(3), repeat=3):
            view = padded[:, i : i + t, j : j + h, k : k + w]
            total += np.tensordot(weight[:, :, i, j, k], view, axes=1)
        volume = np.maximum(total, 0)
        if name in POOL_AFTER:
            volume = slow_pool(volume, POOL_AFTER[name])
    assert volume.shape[1:] == (1, 4, 4)
    fc6 = np.maximum(state["fc6.weight"] @ volume.reshape(-1) + state["fc6.bias"], 0)
    fc7 = np.maximum(state["fc7.weight"] @ fc6 + state["fc7.bias"], 0)
    return {"fc6": fc6, "fc7": fc7}


def slow_pool(volume: Array, number: int) -> Array:
    """Max-pooling: 1×2×2 first, then 2×2×2; the fifth adds a border of one row and column."""
    depth = 1 if number == 1 else 2
    if number == 5:
        volume = np.pad(volume, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    t, h, w = (n // s for n, s in zip(volume.shape[1:], (depth, 2, 2), strict=True))
    whole = volume[:, : t * depth, : h * 2, : w * 2]
    return whole.reshape(len(volume), t, depth, h, 2, w, 2).max(axis=(2, 4, 6))


def made_up(shape: tuple[int, ...], seed: int) -> Array:
    """Numbers in [−0.5, 0.5) from whole-number arithmetic: the same on every machine."""
    i = np.arange(np.prod(shape), dtype=np.int64)
    return ((i * i * 97 + i * 31 + seed * 1013) % 100_003 / 100_003 - 0.5).reshape(shape)


def made_up_network(width: float = 1 / 16) -> C3D:
    """Weights that keep the activations' size from layer to layer; every bias matters."""
    network = C3D(CLASSES, width).double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            shape = tuple(parameter.shape)
            gain = (24 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.5
            parameter.copy_(torch.from_numpy(made_up(shape, number) * gain))
    return network


def made_up_frames(count: int = 1) -> torch.Tensor:
    return torch.from_numpy(made_up((count, 3, 16, 112, 112), 77) * 2)


def as_numpy(network: C3D) -> dict[str, Array]:
    return {name: value.numpy() for name, value in network.state_dict().items()}


def outputs(network: C3D, frames: torch.Tensor) -> dict[str, Array]:
    with torch.no_grad():
        return {
            "fc6": network.features(frames, "fc6")[:, 0].numpy(),
            "fc7": network.features(frames)[:, 0].numpy(),
        }


def test_all_layers_equal_the_slow_float64_evaluation():
    network, frames = made_up_network(1 / 32), made_up_frames(2)
    actual = outputs(network, frames)
    for row in range(2):
        for layer, expected in slow(as_numpy(network), frames[row].numpy()).items():
            assert 0.2 < np.count_nonzero(expected) / expected.size <= 1
            np.testing.assert_allclose(actual[layer][row], expected, rtol=1e-9, atol=1e-12)


# Made by `slow` on the made-up network and frames: the norm and the first numbers.
GOLDEN = {
    "fc6": (21.14065848, [0.93543612, 0.11144986, 1.66970484, 0.0, 0.0, 1.03341408]),
    "fc7": (19.24991421, [0.30017373, 2.74830717, 2.09016760, 0.50219520, 0.0, 0.63687252]),
}


def test_single_precision_gives_the_recorded_numbers():
    actual = outputs(made_up_network().float(), made_up_frames().float())
    for layer, (norm, first) in GOLDEN.items():
        row = actual[layer][0]
        assert np.linalg.norm(row) == pytest.approx(norm, rel=1e-5)
        np.testing.assert_allclose(row[: len(first)], first, rtol=1e-4, atol=1e-5 * norm)


def test_full_width_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        state = C3D().state_dict()
        without = C3D(0).state_dict()
    layers = [*LAYERS, "fc6", "fc7", "fc8"]
    assert list(state) == [f"{name}.{kind}" for name in layers for kind in ("weight", "bias")]
    assert [tuple(state[f"{name}.weight"].shape) for name in layers] == [
        (64, 3, 3, 3, 3), (128, 64, 3, 3, 3), (256, 128, 3, 3, 3), (256, 256, 3, 3, 3),
        (512, 256, 3, 3, 3), (512, 512, 3, 3, 3), (512, 512, 3, 3, 3), (512, 512, 3, 3, 3),
        (4096, 8192), (4096, 4096), (487, 4096),
    ]  # fmt: skip
    assert list(without) == list(state)[:-2]
    # The public file without fc8 is of float32 and has 311,985,866 bytes: 2.7 kB of wrapping.
    assert sum(value.numel() for value in without.values()) * 4 == 311_983_104


def test_features_have_the_shape_of_the_contract():
    network = C3D(0, 1 / 64)
    assert network.in_channels == 3
    frames = torch.rand(2, 3, 16, 112, 112)
    for layer in ("fc6", "fc7"):
        assert (
            network.features(frames, layer).shape == (2, 1, network.feature_channels) == (2, 1, 64)
        )


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 8, 112, 112), (1, 3, 32, 112, 112), (1, 3, 16, 128, 171), (1, 2, 16, 112, 112),
     (3, 16, 112, 112)],
)  # fmt: skip
def test_frames_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"\[batch, 3, 16, 112, 112\]") as caught:
        C3D(0, 1 / 64).features(torch.zeros(shape))
    assert str(list(shape)) in str(caught.value)


def test_other_layers_and_widths_are_named():
    with pytest.raises(ValueError, match="'fc8' is unknown; valid: fc6, fc7"):
        C3D(0, 1 / 64).features(torch.zeros(1, 3, 16, 112, 112), "fc8")
    with pytest.raises(ValueError, match=r"width 0\.01"):
        C3D(0, 0.01)
