"""Peak memory of `mmdist extract`, all its processes together: long videos and large pictures.

    python benchmarks/memory.py [--minutes 60] [--only TEXT] [EXTRA ARGUMENTS OF mmdist extract]

A video of 96×64 that lasts 60 minutes is set beside one of 1 minute (the difference is held to
300 MB), and clips of 4K in several codecs are held to 1.5 GB; by the shipped networks, RGB and
RGB with flow. Counted is the proportional set size (PSS, where shared pages count once) of every
process of the run, summed, 20 times a second. MB are 10^6 bytes. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SAMPLES_A_SECOND = 20
GROWTH_MB = 300
LARGE_MB = 1500
CODECS = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9"}
OPTIONS = {
    "libx264": {"preset": "ultrafast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
}


def encode(path: Path, codec: str, width: int, height: int, frames: int) -> Path:
    """A random texture that moves, at 25 fps."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    texture_HWC = coarse.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = OPTIONS[codec]
        for i in range(frames):
            picture_HWC = np.roll(texture_HWC, (2 * i, 3 * i), axis=(0, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def repeat(source: Path, target: Path, seconds: float) -> Path:
    """The pictures of a video without B-frames, muxed again and again."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        group = [bytes(packet) for packet in old.demux(video=0) if packet.size]
        for i in range(round(seconds * 25)):
            packet = av.Packet(group[i % len(group)])
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = i
            packet.duration, packet.is_keyframe = 1, i % len(group) == 0
            new.mux(packet)
    return target


def family(root: int) -> list[int]:
    """A process and its descendants."""
    children = collections.defaultdict(list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text().partition(" ")
            children[int(rest.rpartition(")")[2].split()[1])].append(int(pid))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def role(pid: int) -> str:
    """The process's place in the run, by its module."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return next((w.removeprefix("mmdist_e2e.") for w in words if "mmdist_e2e." in w), words[0])
    return "ended"


def measure(video: Path, modality: str, extra: list[str]) -> int:
    """Extract one video; prints and returns the peak in bytes."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "mmdist_e2e.cli.main", "extract", str(video)]
        command += ["--out", out, "--modality", modality, "--device", "cpu", *extra]
        begin = time.monotonic()
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        peak, parts = 0, ""
        while run.poll() is None:
            sizes = {pid: pss_bytes(pid) for pid in family(run.pid)}
            if sum(sizes.values()) > peak:
                peak = sum(sizes.values())
                parts = ", ".join(f"{role(pid)} {n / 1e6:.0f}" for pid, n in sizes.items() if n)
            time.sleep(1 / SAMPLES_A_SECOND)
        assert run.stdout is not None
        said = run.stdout.read().decode(errors="replace")
        if run.returncode:
            sys.exit(f"{video.name}: mmdist extract ended with {run.returncode}:\n{said}")
    seconds = time.monotonic() - begin
    print(f"{video.name} {modality}: {peak / 1e6:.0f} MB ({parts}), {seconds:.0f} s", flush=True)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--clip-seconds", type=float, default=4.0)
    given, extra = parser.parse_known_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    failed = []

    def wanted(name: str) -> bool:
        return given.only in name

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for modality in ("rgb", "rgb,flow"):
            if wanted(f"long {modality}"):
                seed = folder / "seed.mp4"
                encode(seed, "libx264", 96, 64, 12)
                short = repeat(seed, folder / "short.mp4", 60)
                long = repeat(seed, folder / "long.mp4", 60 * given.minutes)
                first = measure(short, modality, extra)
                growth = (measure(long, modality, extra) - first) / 1e6
                print(f"{given.minutes:g} minutes over 1, {modality}: {growth:+.0f} MB")
                if growth > GROWTH_MB:
                    failed.append(f"long {modality}: {growth:+.0f} MB > {GROWTH_MB}")
            for name, codec in CODECS.items():
                if wanted(f"4k {name} {modality}"):
                    path = folder / f"4k-{name}.mp4"
                    if not path.exists():
                        encode(path, codec, 3840, 2160, round(25 * given.clip_seconds))
                    peak = measure(path, modality, extra) / 1e6
                    if peak > LARGE_MB:
                        failed.append(f"4K {name} {modality}: {peak:.0f} MB > {LARGE_MB}")
    sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
