"""I3D: the Inflated 3D Inception network (Carreira & Zisserman, CVPR 2017).

State-dict keys are those of the public PyTorch release, so its checkpoints load strictly.
Padding is TensorFlow's SAME, computed from the input's size at run time.

Shapes: B batch, C channels, T frames, H height, W width, D = 1024 · width feature channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist_e2e.extractors.networks import scaled
from mmdist_e2e.structures import MmdistError

Size = tuple[int, int, int]  # of time, height, width

# Channels of an inception block's units: b0; b1a, b1b; b2a, b2b; b3b (table in Szegedy et al. 2015,
# inflated).
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}

# Max-pooling before a block: name, kernel, stride.
POOL_BEFORE = {
    "Mixed_3b": ("MaxPool3d_3a_3x3", (1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ("MaxPool3d_4a_3x3", (3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ("MaxPool3d_5a_2x2", (2, 2, 2), (2, 2, 2)),
}


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis, before and after.

    The total is max(kernel − r, 0) with r = size mod stride, or stride where that is 0;
    the smaller half comes first.
    """
    remainder = size % stride or stride
    total = max(kernel - remainder, 0)
    return total // 2, total - total // 2


def _pads(volume_BCTHW: Tensor, kernel: Size, stride: Size) -> list[tuple[int, int]]:
    axes = zip(volume_BCTHW.shape[2:], kernel, stride, strict=True)
    return [same_padding(*axis) for axis in axes]


class SameMaxPool3d(nn.Module):
    """Max-pooling with SAME padding, of volumes after a ReLU.

    The release pads with zeros, which never exceed a maximum there. So no padded copy is needed:
    `ceil_mode` lets the last window reach as far beyond the end as SAME pads.
    """

    def __init__(self, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, volume_BCTHW: Tensor) -> Tensor:
        before = [first for first, _ in _pads(volume_BCTHW, self.kernel, self.stride)]
        return F.max_pool3d(volume_BCTHW, self.kernel, self.stride, before, ceil_mode=True)


class Unit3D(nn.Module):
    """Convolution with SAME padding, then batch normalisation and ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: Size = (1, 1, 1),
        stride: Size = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        # Momentum 0.01 as in the release; pretraining of small networks sets its own.
        self.bn = nn.BatchNorm3d(out_channels, eps=1e-3, momentum=0.01)

    def forward(self, volume_BCTHW: Tensor) -> Tensor:
        volume = volume_BCTHW
        pads = _pads(volume, self.kernel, self.stride)
        padding = [before for before, _ in pads]
        if any(before != after for before, after in pads):
            # Symmetric padding is the convolution's own and saves this copy.
            volume = F.pad(volume, [side for pad in reversed(pads) for side in pad])
            padding = [0, 0, 0]
        out = F.conv3d(volume, self.conv3d.weight, self.conv3d.bias, self.stride, padding)
        return F.relu(self.bn(out), inplace=True)


class InceptionBlock(nn.Module):
    """Four branches concatenated: 1×1×1; two of 1×1×1 → 3×3×3; max-pool → 1×1×1."""

    def __init__(self, in_channels: int, outs: list[int]) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = outs
        cube = (3, 3, 3)
        self.b0 = Unit3D(in_channels, b0)
        self.b1a = Unit3D(in_channels, b1a)
        self.b1b = Unit3D(b1a, b1b, kernel=cube)
        self.b2a = Unit3D(in_channels, b2a)
        self.b2b = Unit3D(b2a, b2b, kernel=cube)
        self.b3a = SameMaxPool3d(cube, (1, 1, 1))
        self.b3b = Unit3D(in_channels, b3b)
        self.out_channels = b0 + b1b + b2b + b3b

    def forward(self, volume: Tensor) -> Tensor:
        first, second = self.b0(volume), self.b1b(self.b1a(volume))
        third, fourth = self.b2b(self.b2a(volume)), self.b3b(self.b3a(volume))
        return torch.cat((first, second, third, fourth), dim=1)


class InceptionI3d(nn.Module):
    """I3D with `width` scaling every branch; width 1 has 12.29 M parameters without logits.

    Args:
        num_classes: outputs of the logits layer, which `features` does not run.
        in_channels: 3 for RGB, 2 for flow.
        width: factor on every channel count; D = 1024 · width. Raises ValueError unless all stay
            whole numbers.
        dropout: before the logits.
    """

    def __init__(
        self,
        num_classes: int = 400,
        in_channels: int = 3,
        width: float = 1.0,
        *,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_channels, self.width = num_classes, in_channels, width
        stem, channels = scaled(64, width), scaled(192, width)
        self.Conv3d_1a_7x7 = Unit3D(in_channels, stem, kernel=(7, 7, 7), stride=(2, 2, 2))
        self.MaxPool3d_2a_3x3 = SameMaxPool3d((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(stem, stem)
        self.Conv3d_2c_3x3 = Unit3D(stem, channels, kernel=(3, 3, 3))
        for name, outs in MIXED.items():
            if name in POOL_BEFORE:
                pool, kernel, stride = POOL_BEFORE[name]
                self.add_module(pool, SameMaxPool3d(kernel, stride))
            block = InceptionBlock(channels, [scaled(out, width) for out in outs])
            self.add_module(name, block)
            channels = block.out_channels
        self.body = [name for name, _ in self.named_children()]
        self.feature_channels = channels
        self.dropout = nn.Dropout(dropout)
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(channels, num_classes, 1)

    def features(self, frames_BCTHW: Tensor) -> Tensor:
        """Features [B, T', D] of frames in [−1, 1]; T' = max(⌈T/8⌉ − 1, 1); at least float32.

        They average 2 × the whole final map [⌈T/8⌉, ⌈H/32⌉, ⌈W/32⌉], with stride 1; fewer than nine
        frames leave one final map, which is pooled alone. Raises MmdistError when the channels are
        not the network's.
        """
        if frames_BCTHW.ndim != 5 or frames_BCTHW.shape[1] != self.in_channels:
            raise MmdistError(
                f"I3D needs frames of the shape [batch, {self.in_channels}, time, height, width]; "
                f"got {list(frames_BCTHW.shape)}."
            )
        volume = frames_BCTHW
        for name in self.body:
            volume = self.get_submodule(name)(volume)
        # A network in bf16 averages in float32: bf16 rows would be less precise than the maps.
        wide = torch.promote_types(volume.dtype, torch.float32)
        maps_BDT = volume.mean(dim=(3, 4), dtype=wide)
        return F.avg_pool1d(maps_BDT, min(2, maps_BDT.shape[2]), stride=1).transpose(1, 2)

    def forward(self, frames_BCTHW: Tensor) -> Tensor:
        """Class scores [B, num_classes], averaged over time."""
        features_BTD = self.dropout(self.features(frames_BCTHW)).to(frames_BCTHW.dtype)
        pooled_BDT = features_BTD.transpose(1, 2)
        logits: Tensor = self.logits.conv3d(pooled_BDT[..., None, None])  # type: ignore[operator]
        return logits.mean(dim=(2, 3, 4))
