"""I3D against a slow float64 evaluation that shares no code with it."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmdist_e2e.extractors.networks.i3d import InceptionI3d, same_padding

Volume = NDArray[np.float64]


def tf_pads(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """SAME by TensorFlow's own definition: ⌈n/s⌉ outputs, what is missing split, less first."""
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def patches(volume: Volume, kernel: tuple[int, ...], stride: tuple[int, ...]):
    """Yield each kernel offset and the strided view of the SAME-padded volume [C,T,H,W] there."""
    pads = [tf_pads(n, k, s) for n, k, s in zip(volume.shape[1:], kernel, stride, strict=True)]
    padded = np.pad(volume, [(0, 0), *pads])
    outs = [-(-n // s) for n, s in zip(volume.shape[1:], stride, strict=True)]
    for offset in itertools.product(*(range(k) for k in kernel)):
        slices = [
            slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, outs, stride, strict=True)
        ]
        yield offset, padded[(slice(None), *slices)]


class SlowI3d:
    """The published architecture, written out again over numpy in float64."""

    def __init__(self, network: InceptionI3d) -> None:
        self.state = {k: v.double().numpy() for k, v in network.state_dict().items()}

    def unit(self, name: str, volume: Volume, stride: tuple[int, ...] = (1, 1, 1)) -> Volume:
        weight = self.state[f"{name}.conv3d.weight"]
        out: Volume | float = 0.0
        for (i, j, k), view in patches(volume, weight.shape[2:], stride):
            out = out + np.tensordot(weight[:, :, i, j, k], view, axes=1)
        shape = (-1, 1, 1, 1)
        mean, var = (self.state[f"{name}.bn.running_{x}"].reshape(shape) for x in ("mean", "var"))
        gain, bias = (self.state[f"{name}.bn.{x}"].reshape(shape) for x in ("weight", "bias"))
        return np.maximum((out - mean) / np.sqrt(var + 1e-3) * gain + bias, 0)

    def pool(self, volume: Volume, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Volume:
        return np.max([view for _, view in patches(volume, kernel, stride)], axis=0)

    def block(self, name: str, volume: Volume) -> Volume:
        return np.concatenate(
            [
                self.unit(f"{name}.b0", volume),
                self.unit(f"{name}.b1b", self.unit(f"{name}.b1a", volume)),
                self.unit(f"{name}.b2b", self.unit(f"{name}.b2a", volume)),
                self.unit(f"{name}.b3b", self.pool(volume, (3, 3, 3), (1, 1, 1))),
            ]
        )

    def features(self, volume: Volume) -> Volume:
        x = self.unit("Conv3d_1a_7x7", volume, (2, 2, 2))
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        x = self.unit("Conv3d_2c_3x3", self.unit("Conv3d_2b_1x1", x))
        x = self.pool(x, (1, 3, 3), (1, 2, 2))
        x = self.block("Mixed_3c", self.block("Mixed_3b", x))
        x = self.pool(x, (3, 3, 3), (2, 2, 2))
        for letter in "bcdef":
            x = self.block(f"Mixed_4{letter}", x)
        x = self.pool(x, (2, 2, 2), (2, 2, 2))
        x = self.block("Mixed_5c", self.block("Mixed_5b", x))
        maps = x.mean(axis=(2, 3))  # [D, T]: the pool covers the whole final map
        if maps.shape[1] == 1:
            return maps.T
        return ((maps[:, :-1] + maps[:, 1:]) / 2).T


def randomised(in_channels: int) -> InceptionI3d:
    """A tiny network whose every parameter and statistic is random and matters."""
    torch.manual_seed(3)
    network = InceptionI3d(5, in_channels, 0.125)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.001, 0.5)  # near eps, so that a wrong eps shows
    for name, parameter in network.named_parameters():
        if name.endswith("bn.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith("bn.bias"):
            torch.nn.init.normal_(parameter, 0, 0.2)
    return network.eval()


@pytest.mark.parametrize(
    ("channels", "shape"),
    [(3, (16, 32, 32)), (3, (9, 33, 47)), (2, (25, 40, 34)), (3, (1, 17, 65))],
)
def test_features_equal_the_slow_float64_evaluation(channels, shape):
    network = randomised(channels)
    frames = torch.rand(1, channels, *shape, dtype=torch.float64) * 2 - 1
    expected = SlowI3d(network).features(frames[0].numpy())
    with torch.no_grad():
        actual = network.double().features(frames)[0].numpy()
    assert actual.shape == (max(-(-shape[0] // 8) - 1, 1), 128)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


def test_single_precision_stays_close_to_float64():
    network = randomised(3)
    frames = torch.rand(2, 3, 16, 41, 56) * 2 - 1
    with torch.no_grad():
        single = network.features(frames)
        double = network.double().features(frames.double())
    assert ((single - double).norm() / double.norm()).item() < 1e-5


def hashed(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in [−1, 1) from integer arithmetic alone, the same on every machine for ever."""
    bits = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor) % np.uint64(2**32)
    return torch.from_numpy((bits / 2**31 - 1).reshape(shape))


def hashed_network(in_channels: int) -> InceptionI3d:
    """A narrow network whose weights follow from their names."""
    network = InceptionI3d(5, in_channels, 0.125).double().eval()
    for name, value in network.state_dict().items():
        kind, numbers = name.rsplit(".", 2)[-2:], hashed(name, tuple(value.shape))
        if kind == ["conv3d", "weight"]:
            value.copy_(numbers * (6 / value[0].numel()) ** 0.5)
        elif kind == ["bn", "running_var"]:
            value.copy_(0.55 + 0.45 * numbers)
        elif kind == ["bn", "weight"]:
            value.copy_(1 + 0.5 * numbers)
        elif value.is_floating_point():
            value.copy_(0.2 * numbers)
    return network


# Every twentieth channel of SlowI3d's rows, once computed, of `hashed_network` and the frames
# `hashed("frames", shape)`. What gives other numbers is another network.
GOLDEN = {
    (3, 24, 33, 47): [
        [1316.51264, 747.157147, 3217.93916, 763.022883, 0, 0, 0],
        [368.351581, 439.911854, 4343.89268, 310.680275, 137.486717, 24.391814, 0],
    ],
    (2, 17, 40, 34): [
        [852.477817, 696.785408, 3479.79543, 359.836532, 0, 0, 0],
        [197.483128, 652.573551, 3914.67889, 205.55125, 124.542618, 1.27611613, 0],
    ],
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_golden_values(shape):
    network, frames = hashed_network(shape[0]), hashed("frames", shape)
    with torch.no_grad():
        rows = network.features(frames[None])[0]
    np.testing.assert_allclose(rows[:, 1::20], GOLDEN[shape], rtol=1e-7)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_padding_is_tensorflows_same(kernel, stride):
    for size in range(1, 40):
        assert same_padding(size, kernel, stride) == tf_pads(size, kernel, stride)


def test_full_width_has_the_published_parameters_and_keys():
    network = InceptionI3d()
    counted = sum(
        p.numel() for name, p in network.named_parameters() if not name.startswith("logits")
    )
    assert round(counted / 1e6, 2) == 12.29
    state = network.state_dict()
    assert state["Mixed_4f.b2b.conv3d.weight"].shape == (128, 32, 3, 3, 3)
    assert state["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert state["logits.conv3d.bias"].shape == (400,)
    # 57 units of a kernel and four BatchNorm vectors, and the logits' kernel and bias.
    assert len([key for key in state if "num_batches" not in key]) == 57 * 5 + 2


def test_wrong_channels_and_widths_are_named():
    with pytest.raises(ValueError, match=r"batch, 3, time"):
        InceptionI3d(5, 3, 0.125).features(torch.zeros(1, 2, 16, 32, 32))
    with pytest.raises(ValueError, match=r"width 0\.1"):
        InceptionI3d(5, 3, 0.1)


def test_logits_are_averaged_over_time():
    network = randomised(3)
    frames = torch.rand(2, 3, 24, 32, 32)
    with torch.no_grad():
        rows = network.features(frames)
        weight = network.logits.conv3d.weight.flatten(1)
        expected = (rows @ weight.T + network.logits.conv3d.bias).mean(dim=1)
        torch.testing.assert_close(network(frames), expected, rtol=1e-4, atol=1e-5)
