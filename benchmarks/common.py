"""What the benchmarks share: clips, full-width networks with random weights, clocks, commands.

Shapes: H height, W width, C channels (always 3, RGB).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.video.writer import write_video
from mmdist_e2e.store import write_json
from mmdist_e2e.weights.registry import ENTRIES

CLIPS = Path(__file__).parents[1] / "runs" / "benchmarks" / "clips"
SIZES = [(320, 240), (640, 360)]  # width, height
FPS = 25
PR_SET_CHILD_SUBREAPER = 36
REAP_SECONDS = 0.2  # orphans have been killed, and need a moment to end


def make_clips(count: int = 10, seconds: float = 10.0, folder: Path = CLIPS) -> list[Path]:
    """H.264 clips of a moving camera and moving objects, of both SIZES; kept for the next run."""
    folder = folder / f"{count}-of-{seconds:g}-seconds"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [SIZES[number % len(SIZES)] for number in range(count)]
    paths = [folder / f"{w}x{h}-{number:02}.mp4" for number, (w, h) in enumerate(sizes)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    if missing:
        print(f"making {len(missing)} clips in {folder} …", file=sys.stderr)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for number in missing:
            pool.submit(_make, paths[number], number, *sizes[number], round(seconds * FPS))
    return paths


def _make(path: Path, seed: int, width: int, height: int, count: int) -> None:
    torch.set_num_threads(1)
    write_video(path, frames(seed, width, height, count), fps=FPS)


def two_frames() -> Path:
    """The shortest clip that has motion: what a run on it costs is the start."""
    path = CLIPS / "two-frames.mp4"
    if not path.exists():
        CLIPS.mkdir(parents=True, exist_ok=True)
        write_video(path, frames(0, 96, 64, 2), fps=FPS)
    return path


def frames(seed: int, width: int, height: int, count: int) -> Iterator[NDArray[np.uint8]]:
    """[H, W, C]: a pan over a texture, six textured objects on curves, a camera's noise."""
    rng = np.random.default_rng(seed)
    margin, side = 160, height // 4
    ground = _texture(rng, height + 2 * margin, width + 2 * margin)
    objects = [_texture(rng, side, side) for _ in range(6)]
    phases, speeds = rng.uniform(0, 6.28, (7, 2)), rng.uniform(0.3, 1.5, (7, 2))
    noise = rng.normal(0, 2.5, (height + 64, width + 64, 3)).round().astype(np.int16)
    for index in range(count):
        # Each of the seven follows sines of its own: from −1 to 1, in both directions.
        curves = np.sin(phases + speeds * index / FPS)
        top, left = (margin * (1 + curves[6])).astype(int)
        frame_HWC = ground[top : top + height, left : left + width].copy()
        for texture, curve in zip(objects, curves, strict=False):
            y, x = ((curve + 1) / 2 * (height - side, width - side)).astype(int)
            frame_HWC[y : y + side, x : x + side] = texture
        y, x = rng.integers(0, 64, 2)
        frame_HWC += noise[y : y + height, x : x + width]
        yield frame_HWC.clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.int16]:
    """Noise of five octaves, the coarse ones stronger, as in photographs."""
    total = torch.zeros(1, 3, height, width)
    for octave in (64, 32, 16, 8, 4):
        coarse = rng.normal(0, octave**0.5 * 5, (1, 3, height // octave + 2, width // octave + 2))
        total += nn.functional.interpolate(
            torch.from_numpy(coarse).float(), (height, width), mode="bicubic"
        )
    texture: NDArray[np.int16] = (total[0].permute(1, 2, 0) + 128).numpy().astype(np.int16)
    return texture


def random_i3d(classes: int = 400, channels: int = 3) -> InceptionI3d:
    """Full width, with weights and statistics that let every row differ from the next."""
    torch.manual_seed(0)
    network = InceptionI3d(classes, channels).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def random_checkpoint(folder: Path, entry: str) -> Path:
    """A checkpoint folder with the profile of a public I3D and random weights."""
    config: dict[str, Any] = {**(ENTRIES[entry].config or {}), "trained_on": "nothing"}
    network = random_i3d(config["num_classes"], config["in_channels"])
    folder.mkdir(parents=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    write_json(folder / "config.json", config)
    return folder


@dataclass
class Cost:
    """Seconds on the wall, and of all cores together."""

    wall: float = 0.0
    cpu: float = 0.0

    def __str__(self) -> str:
        return f"{self.wall:6.1f} s, {self.cpu:6.1f} CPU seconds"


def cost_of(command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None = None) -> Cost:
    """Of a command and all processes below it. Raises RuntimeError with its output if it fails."""
    if sys.platform == "linux":  # orphans become ours, so that their CPU seconds are counted
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with tempfile.TemporaryFile() as log:
        begin, cpu = time.perf_counter(), _children_cpu()
        process = subprocess.Popen(command, env=env, cwd=cwd, stdout=log, stderr=log)
        code = process.wait()
        seconds = time.perf_counter() - begin
        time.sleep(REAP_SECONDS)
        with contextlib.suppress(ChildProcessError):  # multiprocessing's tracker lives on
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        log.seek(0)
        if code != 0:
            raise RuntimeError(f"{command[:5]} failed: {log.read().decode(errors='replace')}")
    return Cost(seconds, _children_cpu() - cpu)


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def best_seconds(run: Callable[[], object], runs: int, device: str = "cpu") -> float:
    """Seconds of the fastest of several runs, the work of a GPU included; warm it up first."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times)
