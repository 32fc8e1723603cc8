"""Flow of the rendered clips: computed once, stored as a memory map, augmented when read.

Values stay in pixels of the frames that flow was computed on, however a clip is cropped: a crop
shows things larger, as a larger input will, and what is one pixel there is still one pixel.
Shapes: N clips, B batch, T frames, H height, W width, C channels, P pose values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdist_e2e.extractors.flow import tvl1
from mmdist_e2e.extractors.flow.fields import FlowPreprocessing
from mmdist_e2e.store import write_json
from world.clipset import ClipSet, Progress, as_volume, cropped, render_clips

FLOW_BLOCK = 64
# 96 is the world's own height: no frame is resized before its flow is solved.
FLOW_PREPROCESSING = FlowPreprocessing(shorter_side=96, size=112, bound=8.0)
GAIN = 0.2  # how much faster or slower a clip may be made


def flow_clips(folder: Path, *, seed: int, count: int, workers: int, progress: Progress) -> ClipSet:
    """Flow of `count` clips of a seed, [N, 16, H, W, 2], as a memory map in `folder`.

    The clips themselves are rendered first where they are not there. Flow is solved in blocks,
    on all cores; a killed run resumes after its last complete block.
    """
    rendered = render_clips(folder, seed=seed, count=count, workers=workers, progress=progress)
    whole = folder / f"clips-{seed}-{count}.flow.npy"
    part, mark = whole.with_suffix(".part.npy"), whole.with_suffix(".part.json")
    if not whole.is_file():
        done = _blocks_done(part, mark)
        shape = (*rendered.clips_NTHWC.shape[:4], 2)
        flow = np.lib.format.open_memmap(
            part, "r+" if done else "w+", dtype=np.float16, shape=None if done else shape
        )
        for first in range(done, count, FLOW_BLOCK):
            last = min(first + FLOW_BLOCK, count)
            flow[first:last] = flow_of(rendered.clips_NTHWC[first:last])
            flow.flush()
            write_json(mark, {"clips": last})
            progress(f"flow of {last} of {count} clips")
        part.replace(whole)
        mark.unlink()
    return ClipSet(np.load(whole, mmap_mode="r"), rendered.labels_N2, rendered.poses_NTP)


def _blocks_done(part: Path, mark: Path) -> int:
    """How many clips of an unfinished map are there."""
    try:
        return int(json.loads(mark.read_text())["clips"]) if part.is_file() else 0
    except (OSError, ValueError, KeyError):
        return 0


def flow_of(clips_NTHWC: NDArray[Any]) -> NDArray[np.float16]:
    """Flow from each frame to the next [N, T, H, W, 2], in pixels; the last is repeated."""
    count, frames = clips_NTHWC.shape[:2]
    frames_NHWC = torch.from_numpy(np.array(clips_NTHWC).reshape(-1, *clips_NTHWC.shape[2:]))
    grey = FLOW_PREPROCESSING.greys(frames_NHWC).numpy()
    grey = grey.reshape(count, frames, *grey.shape[1:])
    size = grey.shape[2:]
    flow_N2HW = tvl1(grey[:, :-1].reshape(-1, *size), grey[:, 1:].reshape(-1, *size))
    flow_NTHWC = flow_N2HW.reshape(count, frames - 1, 2, *size).transpose(0, 1, 3, 4, 2)
    return np.concatenate([flow_NTHWC, flow_NTHWC[:, -1:]], axis=1).astype(np.float16)


def augment_flow(
    clips_BTHWC: Tensor,
    poses_BTP: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    smallest_crop: float,
) -> tuple[Tensor, Tensor]:
    """Random crop around the person, mirror and speed, drawn once per clip.

    Returns fields [B, 2, T, size, size] in [−1, 1], and poses in shares of what is left.
    """
    out, poses = [], []
    for clip_THWC, poses_TP in zip(clips_BTHWC, poses_BTP, strict=True):
        small, moved_TP, draw = cropped(
            clip_THWC, poses_TP, size, generator, smallest_crop=smallest_crop
        )
        gain = (1 - GAIN + 2 * GAIN * draw[2].item()) / FLOW_PREPROCESSING.bound
        sign = -1.0 if draw[1] < 0.5 else 1.0  # in the mirror, what went right goes left
        small *= torch.tensor([sign * gain, gain]).reshape(2, 1, 1)
        out.append(small.clamp_(-1, 1))
        poses.append(moved_TP)
    return as_volume(out), torch.stack(poses)


def flow_windows(clips_NTHWC: NDArray[Any]) -> Tensor:
    """Flow of whole clips as the network reads it after training: [N, 2, T, size, size]."""
    count, frames = clips_NTHWC.shape[:2]
    flat_NHWC = clips_NTHWC.reshape(-1, *clips_NTHWC.shape[2:]).astype(np.float32)
    fields_NHWC = FLOW_PREPROCESSING.fields(torch.from_numpy(flat_NHWC).permute(0, 3, 1, 2))
    return FLOW_PREPROCESSING.to_network(fields_NHWC.view(count, frames, *fields_NHWC.shape[1:]))
