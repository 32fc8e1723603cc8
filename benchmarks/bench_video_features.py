"""Extraction beside v-iashin/video_features: the same videos, windows and I3D weights, on the CPU.

    python benchmarks/bench_video_features.py CHECKOUT [--python PYTHON] [--clips N] [--seconds S]

CHECKOUT: of github.com/v-iashin/video_features, which is copied and not changed; its weights may be
absent. PYTHON: an interpreter that has omegaconf beside what we need (default: this one).

Both commands run from start to end, one after the other, I3D RGB at full width with one set of
random weights, windows of 16 frames every 8, at the clips' own 25 fps, shorter side 256, crop 224.
What differs: theirs resizes with PIL, decodes with OpenCV, computes in fp32, one window at a time,
and has no rows for the last 16 frames, where ours repeats the last frame. Rows are compared where
both have one, after subtracting the mean over time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_extract import Way
from common import Cost, cost_of, make_clips, random_checkpoint
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from mmdist_e2e.store import FeatureStore

WINDOW, STRIDE = 16, 8
KEYS = {
    "logits.": "conv3d_0c_1x1.",
    "Conv3d_": "conv3d_",
    "Mixed_": "mixed_",
    ".bn.": ".batch3d.",
    ".b0.": ".branch_0.",
    ".b1a.": ".branch_1.0.",
    ".b1b.": ".branch_1.1.",
    ".b2a.": ".branch_2.0.",
    ".b2b.": ".branch_2.1.",
    ".b3b.": ".branch_3.1.",
}


def their_weights(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function of the input: their BatchNorm adds 1e-5 to a variance, ours 1e-3."""
    theirs = {}
    for key, value in ours.items():
        if key.endswith("running_var"):
            value = value + (1e-3 - 1e-5)
        for our_part, their_part in KEYS.items():
            key = key.replace(our_part, their_part)
        theirs[key] = value
    return theirs


def run_theirs(python: str, checkout: Path, clips: list[Path], out: Path) -> Cost:
    settings = {
        "feature_type": "i3d",
        "streams": "rgb",
        "stack_size": WINDOW,
        "step_size": STRIDE,
        "device": "cpu",
        "on_extraction": "save_numpy",
        "output_path": out,
        "tmp_path": out.with_name("temporary"),
        "video_paths": f"[{','.join(map(str, clips))}]",
    }
    command = [python, "main.py", *(f"{key}={value}" for key, value in settings.items())]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return cost_of(command, env=env, cwd=checkout)


def cosines(ours_SD: NDArray[np.float32], theirs_SD: NDArray[np.float32]) -> NDArray[np.float32]:
    a, b = (rows - rows.mean(axis=0) for rows in (ours_SD[: len(theirs_SD)], theirs_SD))
    out: NDArray[np.float32] = (
        (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each clip")
    args = parser.parse_args()
    if not (args.checkout / "models/i3d/extract_i3d.py").is_file():
        sys.exit(f"{args.checkout} is no checkout of github.com/v-iashin/video_features.")
    clips = make_clips(args.clips, args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoint = random_checkpoint(root / "i3d-rgb-imagenet", "i3d-rgb-imagenet")
        theirs = root / "theirs"
        shutil.copytree(args.checkout, theirs, ignore=shutil.ignore_patterns(".git", "*.pt*"))
        weights = theirs / "models/i3d/checkpoints/i3d_rgb.pt"
        weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(their_weights(load_file(checkpoint / "model.safetensors")), weights)
        our_cost = Way("ours").run(clips, [str(checkpoint)], root / "ours")
        their_cost = run_theirs(args.python, theirs, clips, root / "rows")
        store = FeatureStore(root / "ours")
        ours = [store.load(clip.stem, "rgb").data for clip in clips]
        rows = [np.load(root / "rows" / "i3d" / f"{clip.stem}_rgb.npy") for clip in clips]
    agreement = np.concatenate([cosines(a, b) for a, b in zip(ours, rows, strict=True)])
    print(f"{len(clips)} clips of {args.seconds:g} seconds; whole commands, their start included")
    for name, cost, made in (("mmdist", our_cost, ours), ("video_features", their_cost, rows)):
        print(f"{name:<16}{cost}, {sum(map(len, made))} rows")
    print(f"rows of both: cosine {agreement.mean():.4f} on average, {agreement.min():.4f} at worst")
    print(f"video_features over mmdist: ratio {their_cost.wall / our_cost.wall:.2f}")


if __name__ == "__main__":
    main()
