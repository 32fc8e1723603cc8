"""Rendered clips to train on: rendered once, stored as memory maps, augmented when read.

Shapes: N clips, B batch, T frames, H height, W width, C channels, P pose values, I instants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mmdist_e2e.store import write_atomically
from world.clips import Clip, sample_clip

WINDOW = 16
RENDER_BLOCK = 64
# Poses are read at these frames of a clip, relative to the hip at the middle one.
INSTANTS, MIDDLE = (1, 6, 10, 14), 8
POSE_SHARE = 0.2  # of the picture's side counts as one; arms are about this long
JOINTS = 5
JOINT_VALUES = 2 * JOINTS  # their x and y come before the two levels
POSE_TARGETS = len(INSTANTS) * 12

Progress = Callable[[str], None]


@dataclass(frozen=True)
class ClipSet:
    """clips_NTHWC, labels_N2 (action, object), poses_NTP: what the person does in each.

    Clips are uint8 frames (C is 3), or their flow as float16 pixels (C is 2).
    """

    clips_NTHWC: NDArray[np.uint8] | NDArray[np.float16]
    labels_N2: NDArray[np.int64]
    poses_NTP: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels_N2)


def _render_block(job: tuple[int, int, int]) -> list[Clip]:
    seed, first, count = job
    return [sample_clip(seed, index, frames=WINDOW) for index in range(first, first + count)]


def render_clips(
    folder: Path, *, seed: int, count: int, workers: int, progress: Progress
) -> ClipSet:
    """`count` clips of a seed, as memory maps in `folder`; reused when they are complete."""
    stem = folder / f"clips-{seed}-{count}"
    paths = [stem.with_suffix(f".{part}.npy") for part in ("frames", "labels", "poses")]
    if not paths[2].is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        example = sample_clip(seed, 0, frames=WINDOW)
        clips = np.lib.format.open_memmap(
            paths[0], "w+", dtype=np.uint8, shape=(count, *example.frames_THWC.shape)
        )
        labels = np.zeros((count, 2), dtype=np.int64)
        poses = np.zeros((count, *example.poses_TP.shape), dtype=np.float32)
        jobs = [
            (seed, first, min(RENDER_BLOCK, count - first))
            for first in range(0, count, RENDER_BLOCK)
        ]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for (_, first, size), block in zip(jobs, pool.map(_render_block, jobs), strict=True):
                for offset, clip in enumerate(block):
                    clips[first + offset] = clip.frames_THWC
                    labels[first + offset] = clip.action, clip.object
                    poses[first + offset] = clip.poses_TP
                progress(f"rendered {first + size} of {count} clips")
        clips.flush()
        write_atomically(paths[1], lambda stream: np.save(stream, labels))
        write_atomically(paths[2], lambda stream: np.save(stream, poses))
    return ClipSet(np.load(paths[0], mmap_mode="r"), np.load(paths[1]), np.load(paths[2]))


def motion_targets(poses_BTP: Tensor) -> Tensor:
    """How the person moves: [B, POSE_TARGETS].

    Joints at four instants relative to the hip at the middle of the clip, and by how much
    anything has opened or lit up since then.
    """
    origin = poses_BTP[:, MIDDLE : MIDDLE + 1].clone()
    origin[..., :JOINT_VALUES] = origin[..., :2].repeat(1, 1, JOINTS)
    targets = poses_BTP[:, list(INSTANTS)] - origin
    targets[..., :JOINT_VALUES] /= POSE_SHARE
    return targets.flatten(1)


def place_targets(poses_BTP: Tensor, times: int, rows: int, columns: int) -> Tensor:
    """The cell of a map [times, rows, columns] that each joint is in: [B, times, JOINTS].

    Joints outside the picture count as at its border.
    """
    frames = poses_BTP.shape[1]
    middles = ((torch.arange(times) + 0.5) * frames / times).long()
    joints = poses_BTP[:, middles, :JOINT_VALUES].reshape(len(poses_BTP), times, JOINTS, 2)
    column = (joints[..., 0] * columns).long().clamp(0, columns - 1)
    row = (joints[..., 1] * rows).long().clamp(0, rows - 1)
    cell: Tensor = row * columns + column
    return cell


def crop_window(
    poses_TP: Tensor, share: float, axis: int, side: int, generator: torch.Generator
) -> tuple[int, int]:
    """Start and length (pixels) of a crop along one axis that keeps the hip, hand and thing.

    Where they do not fit, the crop is centered on them.
    """
    length = round(side * share)
    places = poses_TP[:, [axis, 4 + axis, 8 + axis]].clamp(0, 1) * side
    low, high = float(places.max()) - length, float(places.min())
    low, high = (low, high) if low < high else ((low + high) / 2,) * 2
    start = low + (high - low) * float(torch.rand((), generator=generator))
    return int(min(max(start, 0), side - length)), length


def cropped(
    clip_THWC: Tensor,
    poses_TP: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    smallest_crop: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A random crop around the person, resized to `size`², and mirrored half of the time.

    Returns it as [T, C, size, size], uint8 as it came or else float32; the poses in shares of
    what is left; and five draws from [0, 1): the second is below a half where it was mirrored,
    the last three are the caller's.
    """
    draw = torch.rand(5, generator=generator)
    height, width = clip_THWC.shape[1:3]
    share = smallest_crop + (1 - smallest_crop) * draw[0].item()
    left, w = crop_window(poses_TP, share, 0, width, generator)
    top, h = crop_window(poses_TP, share, 1, height, generator)
    crop_TCHW = clip_THWC[:, top : top + h, left : left + w].permute(0, 3, 1, 2)
    if crop_TCHW.dtype != torch.uint8:
        crop_TCHW = crop_TCHW.float()
    # 8-bit images take torch's fast path, six times as quick here as float ones.
    small = F.interpolate(crop_TCHW, (size, size), mode="bilinear", antialias=True)
    poses = poses_TP.clone()
    across = (poses[:, 0:JOINT_VALUES:2] * width - left) / w
    poses[:, 1:JOINT_VALUES:2] = (poses[:, 1:JOINT_VALUES:2] * height - top) / h
    if draw[1] < 0.5:
        small, across = small.flip(3), 1 - across
    poses[:, 0:JOINT_VALUES:2] = across
    return small, poses, draw


def augment(
    clips_BTHWC: Tensor,
    poses_BTP: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    smallest_crop: float,
) -> tuple[Tensor, Tensor]:
    """Random crop around the person, mirror, light and colour, drawn once per clip.

    Returns frames [B, C, T, size, size] in [−1, 1], and poses in shares of what is left.
    Mirroring keeps every label: no action of the world is told from another by its side.
    """
    out, poses = [], []
    for clip_THWC, poses_TP in zip(clips_BTHWC, poses_BTP, strict=True):
        small, moved_TP, draw = cropped(
            clip_THWC, poses_TP, size, generator, smallest_crop=smallest_crop
        )
        tint = 1 + (torch.rand(3, 1, 1, generator=generator) - 0.5) * 0.2
        gain, light = (0.8 + 0.4 * draw[2]) * tint, (draw[3] - 0.5) * 0.4
        out.append((small.float() * (gain * 2 / 255) + (light - gain)).clamp_(-1, 1))
        poses.append(moved_TP)
    return as_volume(out), torch.stack(poses)


def as_volume(clips_TCHW: list[Tensor]) -> Tensor:
    """Clips as a network's input [B, C, T, H, W], in the memory layout it is fastest on."""
    volume = torch.stack(clips_TCHW).permute(0, 2, 1, 3, 4)
    return volume.contiguous(memory_format=torch.channels_last_3d)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Indices of whole batches in random order, sorted within each for fast reads."""
    order = torch.randperm(count, generator=generator).numpy()
    for first in range(0, count - size + 1, size):
        yield np.sort(order[first : first + size])
