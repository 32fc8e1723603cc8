"""What a run of `mmdist extract` must survive: broken videos, killed processes, full disks.

    python tests/drill.py [PART ...] [ARGUMENTS OF mmdist extract, as --engine ray]

PART: survive, resume, share, shards, full, unwritable, clock, mutations; by default all. mutations
needs real videos in FOLDER/videos, by MMDIST_DATA=FOLDER or --data FOLDER. Everything is made from
fixed seeds. tests/test_drill.py runs smaller numbers of the same. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from make_videos import cut, make_audio, make_video, pictures

ROOT = Path(__file__).parents[1]
RATE = 30.0  # of sampling: that of the fastest video, so that decord decodes too
QUIET = {"libx265": {"x265-params": "log-level=none:pools=none:frame-threads=1"}}

# Good videos: codec and suffix. One that cannot be encoded here is replaced by the first.
KINDS = (
    ("mpeg4", "mp4"),
    ("libx264", "mp4"),
    ("libx264", "mkv"),
    ("libx264", "mov"),
    ("libx264", "ts"),
    ("libx264", "flv"),
    ("libx265", "mp4"),
    ("libx265", "mkv"),
    ("libvpx-vp9", "webm"),
    ("libvpx", "webm"),
    ("mpeg4", "avi"),
    ("mjpeg", "avi"),
    ("ffv1", "mkv"),
    ("mpeg2video", "mpg"),
    ("wmv2", "wmv"),
)


def encodable(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.UnknownCodecError:
        return False
    return True


def make_good(folder: Path, count: int) -> list[Path]:
    """Videos of about a second, no two alike in size and length: 15 codecs and containers."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind if encodable(kind[0]) else KINDS[0] for kind in KINDS]
    made = []
    for i in range(count):
        codec, suffix = kinds[i % len(kinds)]
        fixed = codec == "libx265"  # which writes past its memory at some small sizes
        rates = (24, 25, 30) if codec == "mpeg2video" else (8, 10, 12, 15, 24, 25, 30)
        made.append(
            make_video(
                folder / f"good-{i:03}.{suffix}",
                10 + i % 31,
                width=96 if fixed else 48 + 8 * (i % 9),
                height=64 if fixed else 32 + 8 * (i % 7),
                rate=rates[i % len(rates)],
                codec=codec,
                pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
                b_frames=2 if codec in ("libx264", "libx265") and suffix != "flv" else 0,
                options=QUIET.get(codec),
                audio=i % 5 == 1 and suffix in ("mp4", "mov", "mkv"),
            )
        )
    return made


# ---- ways of being broken. Each makes three variants: path (suffix to be chosen) and 0, 1 or 2.


def truncated(stem: Path, variant: int) -> Path:
    """Without its index; with its index but not all pictures; Matroska."""
    suffix, fraction = ((".mp4", 0.5), (".mov", 0.7), (".mkv", 0.6))[variant]
    front = {"movflags": "faststart"} if variant == 1 else None
    whole = make_video(stem.with_suffix(".whole" + suffix), 40, container_options=front)
    whole.rename(stem.with_suffix(".whole"))
    made = cut(stem.with_suffix(".whole"), stem.with_suffix(suffix), fraction)
    stem.with_suffix(".whole").unlink()
    return made


def flipped(stem: Path, variant: int) -> Path:
    """Every 20th byte of the middle has a bit changed."""
    codec, suffix = (("libx264", ".mp4"), ("mpeg4", ".mp4"), ("libx264", ".mkv"))[variant]
    made = make_video(stem.with_suffix(suffix), 40, codec=codec, b_frames=0)
    data = np.frombuffer(made.read_bytes(), np.uint8).copy()
    middle = slice(len(data) // 4, 3 * len(data) // 4, 20)
    bits = np.random.default_rng(variant).integers(0, 8, data[middle].shape, np.uint8)
    data[middle] ^= np.left_shift(np.uint8(1), bits)
    made.write_bytes(data.tobytes())
    return made


def zero_bytes(stem: Path, variant: int) -> Path:
    """Empty, all zeros, zeros after a good start (as after a power cut)."""
    made = stem.with_suffix(".mp4")
    if variant == 2:
        make_video(made, 40)
    head = made.read_bytes()[:48] if variant == 2 else b""
    made.write_bytes(head + bytes((0, 20_000, 50_000)[variant]))
    return made


def wrong_container(stem: Path, variant: int) -> Path:
    """A text, an archive, a picture, all with a video's suffix."""
    made = stem.with_suffix((".mp4", ".mkv", ".avi")[variant])
    if variant == 0:
        made.write_text("<html><body>404: the video is gone</body></html>\n" * 9)
    elif variant == 1:
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("video.mp4", b"\0" * 5000)
    else:
        with av.open(str(made), "w", format="image2") as container:
            stream = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
            frame = av.VideoFrame.from_ndarray(pictures(1)[0], format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return made


def over_reported(stem: Path, variant: int) -> Path:
    """More claimed than there is: Matroska's seconds, MP4's table of sizes, AVI's index lost."""
    made = stem.with_suffix((".mkv", ".mp4", ".avi")[variant])
    codec = "mpeg4" if variant == 2 else "libx264"
    front = {"movflags": "faststart"} if variant == 1 else None
    make_video(made, 65, codec=codec, b_frames=0, container_options=front)
    data = bytearray(made.read_bytes())
    if variant == 0:  # one packet and the index of seeks are gone
        data = data[: int(len(data) * 0.97)]
    elif variant == 1:  # half of the pictures are gone, and the box of pictures says so
        at = data.index(b"mdat") - 4
        data = data[: at + (len(data) - at) // 2]
        data[at : at + 4] = (len(data) - at).to_bytes(4, "big")
    else:
        data = data[: len(data) // 2]
    made.write_bytes(data)
    return made


def hang(stem: Path, variant: int) -> Path:
    """A good video whose name makes TRAPS stop the decoder, at three places."""
    place = ("open", "reader", "next")[variant]
    return make_video(stem.with_name(f"{stem.name}-{place}.mp4"), 40 + variant, rate=10)


def absurd_size(stem: Path, variant: int) -> Path:
    """Pictures of 2×2 pixels; headers that are changed to say 16384×16384 and 65500×16."""
    if variant == 0:
        return make_video(stem.with_suffix(".mp4"), 20, width=2, height=2)
    made = make_video(stem.with_suffix(".avi"), 5, codec="mjpeg", pix_fmt="yuvj420p", b_frames=0)
    height, width = ((16384, 16384), (16, 65500))[variant - 1]
    data = made.read_bytes()
    # MJPEG's frame header: 8 bits, height, width; AVI's headers: width, height
    data = data.replace(struct.pack(">BHH", 8, 64, 96), struct.pack(">BHH", 8, height, width))
    data = data.replace(struct.pack("<II", 96, 64), struct.pack("<II", width, height))
    made.write_bytes(data)
    return made


def no_pictures(stem: Path, variant: int) -> Path:
    """Sound alone: in MP4, in Matroska, and beside a cover picture."""
    return make_audio(stem.with_suffix((".mp4", ".mkv", ".m4v")[variant]))


def unreadable(stem: Path, variant: int) -> Path:
    """A link to nothing, a pipe, a link to itself. (Permissions do not bind root.)"""
    made = stem.with_suffix(".mp4")
    if variant == 1:
        os.mkfifo(made)
    else:
        made.symlink_to(stem.parent / "gone" if variant == 0 else made)
    return made


def deleted(stem: Path, variant: int) -> Path:
    """A good video that the drill deletes once the run has begun; the shortest, so the last."""
    return make_video(stem.with_name(f"zz-{stem.name}.mp4"), 5 + variant)


BROKEN: dict[str, Callable[[Path, int], Path]] = {
    way.__name__: way
    for way in (
        truncated,
        flipped,
        zero_bytes,
        wrong_container,
        over_reported,
        hang,
        absurd_size,
        no_pictures,
        unreadable,
        deleted,
    )
}


def make_broken(folder: Path, each: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [way(folder / f"{name}-{i}", i) for name, way in BROKEN.items() for i in range(each)]


# ---- mutations of real videos


def remux(source: Path, target: Path, seconds: float, **options: str) -> Path:
    """The first seconds of a video, its packets unchanged."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        pairs = {s.index: new.add_stream_from_template(s) for s in old.streams if s.type != "data"}
        for packet in old.demux():
            if packet.dts is not None and packet.dts * packet.time_base < seconds:
                packet.stream = pairs[packet.stream.index]
                new.mux(packet)
    return target


def boxes(data: bytes) -> list[tuple[int, int]]:
    """Start and end of the outermost boxes of an MP4; halves of anything else."""
    found, at = [], 0
    while at + 8 <= len(data) and data[at + 4 : at + 8].isalnum():
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:
            break
        found.append((at, min(at + size, len(data))))
        at += size
    return found if len(found) > 1 else [(0, len(data) // 2), (len(data) // 2, len(data))]


def header(data: bytes) -> tuple[int, int]:
    """Where the facts of the file are: an MP4's moov, else the first 2 KiB."""
    at = data.find(b"moov")
    return (at - 4, at - 4 + int.from_bytes(data[at - 4 : at], "big")) if at > 0 else (0, 2048)


def mutate(data: bytes, kind: str, strength: int, rng: np.random.Generator) -> bytes:
    """Damage a file; strength 0, 1 or 2."""
    size = len(data)
    new = np.frombuffer(data, np.uint8).copy()
    at = int(rng.integers(0, size))
    length = min(int(size * (0.001, 0.02, 0.2)[strength]) + 1, size - at)
    if kind == "bytes":
        where = rng.integers(0, size, (5, 100, 2000)[strength])
        new[where] = rng.integers(0, 256, len(where))
    elif kind == "bits":
        where = rng.integers(0, size, (1, 30, 500)[strength])
        new[where] ^= np.left_shift(np.uint8(1), rng.integers(0, 8, len(where), np.uint8))
    elif kind == "header":
        where = rng.integers(*header(data), (1, 5, 60)[strength]).clip(0, size - 1)
        extreme = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), len(where))
        new[where] = np.where(rng.random(len(where)) < 0.5, extreme, new[where] ^ 255)
    elif kind == "fields":
        for _ in range((1, 2, 6)[strength]):
            name = FIELDS[rng.integers(len(FIELDS))]
            field = max(data.find(name), 0) + len(name) + int(rng.integers(0, 40))
            value = rng.choice(np.array([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
            new[field : field + 4] = np.frombuffer(int(value).to_bytes(4, "big"), np.uint8)[
                : max(size - field, 0)
            ]
    elif kind == "zeros":
        new[at : at + length] = 0
    elif kind == "double":
        return data[: at + length] + data[at:]
    elif kind == "remove":
        return data[:at] + data[at + length :]
    elif kind == "truncate":
        return data[: int(size * (0.995, 0.8, 0.2)[strength] * rng.uniform(0.95, 1))]
    elif kind == "swap":
        parts = [data[start:end] for start, end in boxes(data)]
        rng.shuffle(parts)  # type: ignore[arg-type]
        return b"".join(parts)
    return new.tobytes()


# Boxes of MP4 and elements of Matroska that say sizes, times and positions.
FIELDS = (
    *(b"mvhd", b"tkhd", b"mdhd", b"elst", b"stts", b"ctts", b"stsd", b"avcC", b"stsc", b"stsz"),
    *(b"\x2a\xd7\xb1", b"\x44\x89", b"\xae", b"\xe0", b"\xb0", b"\xba", b"\xe7", b"\xa3"),
)
MUTATIONS = ("bytes", "bits", "header", "fields", "zeros", "double", "remove", "truncate", "swap")
FORMATS = (("mp4", {}), ("mp4", {"movflags": "faststart"}), ("mkv", {}), ("ts", {}))


def make_mutations(
    data: Path, folder: Path, count: int, *, first: int = 0, seconds: float = 2.0
) -> list[Path]:
    """Copies of the videos in `data`, cut and damaged, each by its own seed from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for path, (suffix, options) in itertools.product(sorted(data.glob("*.mp4")), FORMATS):
        target = folder / f"source-{len(sources)}.{suffix}"
        sources.append(remux(path, target, seconds, **options))
    contents = [(path.suffix, path.read_bytes()) for path in sources]
    for path in sources:
        path.unlink()
    made = []
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        kind = MUTATIONS[i % len(MUTATIONS)]
        suffix, content = contents[rng.integers(len(contents))]
        made.append(folder / f"m{i:03}-{kind}{suffix}")
        made[-1].write_bytes(mutate(content, kind, int(rng.integers(3)), rng))
    return made


@dataclass
class Decoded:
    """What became of one mutated video."""

    path: Path
    seconds: float
    frames: int = 0
    cause: str = ""
    peak_bytes: int = 0  # of the decoder's process, so far


def decode_all(paths: list[Path], *, stall_seconds: float = 20.0) -> Iterator[Decoded]:
    """Decode one after the other; only a VideoError is no fault."""
    from mmdist_e2e.extractors.video.reader import Decoder, VideoError

    with Decoder(stall_seconds=stall_seconds) as decoder:
        for path in paths:
            result, begin = Decoded(path, 0), time.monotonic()
            try:
                for chunk in decoder.frames(path, fps=RATE):
                    result.frames += len(chunk.times_N)
            except VideoError as error:
                result.cause = str(error)
            result.seconds = time.monotonic() - begin
            if decoder._child is not None:
                with contextlib.suppress(OSError):
                    status = Path(f"/proc/{decoder._child.pid}/status").read_text()
                    lines = dict(line.split(":", 1) for line in status.splitlines())
                    result.peak_bytes = int(lines["VmHWM"].split()[0]) * 1024
            yield result


# ---- runs of the command

# On PYTHONPATH of a run: in the decoder's process a video named hang-… holds the interpreter lock
# for ever, and in every process the wall clock may jump.
TRAPS = """
import os, sys, time

if shift := float(os.environ.get("DRILL_CLOCK", "0")):
    begin, now, now_ns = time.monotonic(), time.time, time.time_ns
    passed = lambda: shift if time.monotonic() > begin + 2 else 0
    time.time = lambda: now() + passed()
    time.time_ns = lambda: now_ns() + int(passed() * 1e9)

if "mmdist_e2e.extractors.video.worker" in sys.orig_argv:
    sys.modules["nvidia"] = None
    import ctypes
    import av, decord

    def stop(file, place):
        name = os.path.basename(str(getattr(file, "name", file)))
        if name.startswith("hang-") and place in name:
            ctypes.PyDLL(None).sleep(3600)

    opens, Reader = av.open, decord.VideoReader

    def av_open(file, *rest, **options):
        stop(file, "-open")
        return opens(file, *rest, **options)

    class VideoReader(Reader):
        def __init__(self, file, *rest, **options):
            stop(file, "-reader")
            self.file, self.given = file, 0
            super().__init__(file, *rest, **options)

        def next(self):
            self.given += 1
            if self.given > 3:
                stop(self.file, "-next")
            return super().next()

    av.open, decord.VideoReader = av_open, VideoReader
"""


def tiny_extractor(folder: Path) -> Path:
    """`conftest.make_extractor`, but of the videos' own rate, which decord can decode."""
    from conftest import make_extractor

    return make_extractor(folder, fps=RATE)


@dataclass
class Ended:
    """A run that has ended, or was killed."""

    code: int
    output: str
    seconds: float
    left: list[str] = field(default_factory=list)  # processes and temporary files

    @property
    def causes(self) -> list[str]:
        """Every `failed: ` line."""
        lines = self.output.splitlines()
        return [line.partition("failed: ")[2] for line in lines if line.startswith("failed: ")]


class Drill:
    """Runs `mmdist extract` in `folder` with a tiny random network, and looks after it.

    extra: arguments of every run, such as `--engine ray`. base: a folder for what several drills
    share: good videos and their features.
    """

    def __init__(self, folder: Path, extra: Sequence[str] = (), base: Path | None = None) -> None:
        self.folder, self.extra, self.base = folder, list(extra), base or folder
        folder.mkdir(parents=True, exist_ok=True)
        self.network = tiny_extractor(folder / "network" / "tiny")
        (folder / "traps").mkdir()
        (folder / "traps" / "sitecustomize.py").write_text(TRAPS)
        self.rings = {*orphaned_rings()}  # of others
        self.token = f"{os.getpid()}-{time.monotonic_ns()}"

    def start(
        self, *arguments: object, environment: Mapping[str, str] | None = None, **how: Any
    ) -> Running:
        command = [sys.executable, "-m", "mmdist_e2e.cli.main", "extract", *map(str, arguments)]
        command += ["--extractor", str(self.network), "--precision", "fp32", "--devices", "cpu"]
        return Running(self, command + self.extra, environment or {}, how)

    def run(self, *arguments: object, timeout: float = 300, **how: Any) -> Ended:
        return self.start(*arguments, **how).wait(timeout)

    def processes(self) -> dict[int, str]:
        """Those that any run of this drill has started: pid and command."""
        found = {}
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if f"DRILL_TOKEN={self.token}".encode() in environ.read_bytes():
                    command = environ.with_name("cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(environ.parent.name)] = command.decode(errors="replace")
        return found

    def workers(self) -> list[int]:
        """Processes that run networks."""
        found = self.processes().items()
        return sorted(pid for pid, command in found if "mmdist_e2e.extractors.worker" in command)

    def settle(self, seconds: float = 10) -> list[str]:
        """Processes that are still there after so long, and temporary files in the outputs."""
        deadline = time.monotonic() + seconds
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = [f"process {pid}: {command}" for pid, command in self.processes().items()]
        return (
            left
            + [str(path) for path in self.folder.rglob(".tmp-*")]
            + [ring for ring in orphaned_rings() if ring not in self.rings]
        )


class Running:
    """A run in a process group of its own."""

    def __init__(
        self, drill: Drill, command: list[str], environment: Mapping[str, str], how: dict[str, Any]
    ) -> None:
        path = os.pathsep.join([str(drill.folder / "traps"), str(ROOT)])
        own = {"PYTHONPATH": path, "DRILL_TOKEN": drill.token, "OMP_NUM_THREADS": "1"}
        self.drill, self.begin = drill, time.monotonic()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - ends with the object
        self.process = subprocess.Popen(
            command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **own, **environment},
            start_new_session=True,
            **how,
        )

    def wait(self, timeout: float = 300) -> Ended:
        """The end of the run; a timeout kills it and is an AssertionError."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"it hangs after {timeout} s:\n{self.output()}") from None
        return Ended(code, self.output(), time.monotonic() - self.begin)

    def output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill -9 of everything that the drill has running."""
        for pid in self.drill.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def until(self, done: Callable[[], bool], timeout: float = 120) -> bool:
        """Wait for something; False when the run has ended before."""
        deadline = time.monotonic() + timeout
        while not done():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"nothing after {timeout} s:\n{self.output()}"
            time.sleep(0.01)
        return True


def orphaned_rings() -> list[str]:
    """Decoders' frames in /dev/shm that no living process uses."""
    names = {str(path) for path in Path("/dev/shm").glob("mmdist-*")}  # noqa: S108
    if names:
        time.sleep(1)  # time to be taken up, or away
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with contextlib.suppress(OSError):
                text = maps.read_text()
                names = {name for name in names if name not in text}
    return sorted(name for name in names if Path(name).exists())


def features(folder: Path) -> dict[str, str]:
    """Digest of every feature file, by its name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.npz"))
    }


def listed(log: Path) -> list[dict[str, Any]]:
    """The lines of a --log."""
    return [json.loads(line) for line in log.read_text().splitlines()]


def link(paths: Iterable[Path], folder: Path) -> Path:
    """The same files in another folder."""
    folder.mkdir(parents=True)
    for path in paths:
        os.link(path, folder / path.name)
    return folder


def undisturbed(drill: Drill, count: int) -> tuple[Path, dict[str, str]]:
    """A folder of good videos, and the digests of their features by an undisturbed run."""
    good, plain = drill.base / f"good-{count}", drill.base / f"plain-{count}"
    if not plain.exists():
        make_good(good, count)
        ended = drill.run(good, "--out", plain)
        assert ended.code == 0, ended.output
    expected = features(plain)
    assert len(expected) == len([*good.iterdir()]) == count
    return good, expected


def survive(drill: Drill, *, good: int = 170, each: int = 3, kills: int = 5, seed: int = 0) -> str:
    """Good and broken videos by two workers that are killed at random moments."""
    source, expected = undisturbed(drill, good)
    videos = link(source.iterdir(), drill.folder / "videos")
    broken = make_broken(videos, each)
    out, log = drill.folder / "out", drill.folder / "log.jsonl"
    rng = np.random.default_rng(seed)
    moments = sorted(rng.integers(1, good, kills).tolist())
    arguments = [videos, "--out", out, "--workers", 2, "--deadline", 5, "--log", log]
    running = drill.start(*arguments)
    assert running.until(lambda: len(features(out)) > 0), running.output()
    for path in videos.glob("zz-deleted*"):
        path.unlink()
    killed = 0
    for moment in moments:
        if not running.until(
            lambda moment=moment: len(features(out)) >= moment and drill.workers()
        ):
            break
        os.kill(int(rng.choice(drill.workers())), signal.SIGKILL)
        killed += 1
        time.sleep(float(rng.uniform(0, 0.3)))
    ended = running.wait()
    check_whole(drill, out, expected)
    rows = {row["path"]: row for row in listed(log)}
    for path in broken:
        row = rows[str(path)]
        assert row["status"] == "failed", row
        assert path.name in row["cause"], row
        assert any(str(path) in cause for cause in ended.causes), path
    assert len(rows) == good + len(broken), len(rows)
    assert ended.code == 3, ended.output
    assert "Traceback" not in ended.output, ended.output
    return (
        f"{good} of {good} good ones identical, {len(broken)} of {len(broken)} broken ones "
        f"reported, {killed} workers killed, {ended.seconds:.0f} s"
    )


def check_whole(drill: Drill, out: Path, expected: Mapping[str, str]) -> None:
    """The features are those of the undisturbed run, and nothing is left behind."""
    assert not (left := drill.settle()), left
    found = features(out)
    assert sorted(found) == sorted(expected), {*found} ^ {*expected}
    assert found == expected, [name for name in found if found[name] != expected[name]]
    assert not any((out / ".mmdist" / "claims").glob("*"))


def resume(drill: Drill, *, good: int = 60, kills: int = 10, seed: int = 0) -> str:
    """Kill -9 of the whole run at random moments, every third time of its first process alone."""
    source, expected = undisturbed(drill, good)
    out, rng = drill.folder / "out", np.random.default_rng(seed)
    arguments = [source, "--out", out, "--workers", 2]
    killed = 0
    for attempt in range(kills):
        running = drill.start(*arguments)
        already = len(features(out))
        aim = already + int(rng.integers(0, max(2, (good - already) // (kills - attempt))))
        more = running.until(lambda aim=aim: len(features(out)) >= aim and drill.workers())
        time.sleep(float(rng.uniform(0, 0.2)))
        killed += more
        if attempt % 3 == 2:
            running.process.kill()
            running.process.wait()
            gone = [line for line in drill.settle() if line.startswith("process")]
            assert not gone, gone
        else:
            running.kill()
        found = features(out)
        assert found.items() <= expected.items(), f"differs after kill {attempt}"
    done = len(features(out))
    ended = drill.run(*arguments)
    assert ended.code == 0, ended.output
    check_whole(drill, out, expected)
    return f"{killed} kills, {done} of {good} done by then; identical after resuming"


def share(drill: Drill, *, good: int = 60, runs: int = 2, shards: bool = False) -> str:
    """Several runs at the same time on one output folder, or as many shards."""
    source, expected = undisturbed(drill, good)
    out = drill.folder / "out"
    begun = []
    for i in range(runs):
        part = ["--shard", f"{i}/{runs}"] if shards else []
        log = ["--log", drill.folder / f"log-{i}.jsonl"]
        begun.append(drill.start(source, "--out", out, *log, *part))
    ended = [running.wait() for running in begun]
    assert [run.code for run in ended] == [0] * runs, [run.output for run in ended]
    check_whole(drill, out, expected)
    done = [
        row["id"]
        for i in range(runs)
        for row in listed(drill.folder / f"log-{i}.jsonl")
        if row["status"] == "done"
    ]
    assert sorted(done) == sorted({name.removesuffix(".rgb.npz") for name in expected})
    return f"{len(done)} videos done once each by {runs} {'shards' if shards else 'runs'}"


def full(drill: Drill, *, good: int = 60) -> str:
    """The disk becomes full, then has space again. Needs the right to mount."""
    source, expected = undisturbed(drill, good)
    out = drill.folder / "out"
    out.mkdir()
    size = sum(path.stat().st_size for path in (drill.base / f"plain-{good}").glob("*.npz"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(out)],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        raise Unable("a small file system cannot be mounted here")
    try:
        arguments = [source, "--out", out, "--workers", 2]
        ended = drill.run(*arguments)
        assert ended.code in (1, 3), ended.output
        assert "No space left on device" in ended.output, ended.output
        assert "Traceback" not in ended.output, ended.output
        found = features(out)
        assert found.items() < expected.items(), len(found)
        assert not (left := drill.settle()), left
        subprocess.run(["mount", "-o", "remount,size=64m", str(out)], check=True)  # noqa: S607
        again = drill.run(*arguments)
        assert again.code == 0, again.output
        check_whole(drill, out, expected)
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)  # noqa: S607
    return f"{len(found)} of {good} written before it was full ({ended.seconds:.0f} s), then all"


def unwritable(drill: Drill, *, good: int = 60) -> str:
    """The output folder is replaced by a file during the run, which also binds root."""
    source, expected = undisturbed(drill, good)
    out, away = drill.folder / "out", drill.folder / "away"
    arguments = [source, "--out", out, "--workers", 2]
    running = drill.start(*arguments)
    assert running.until(lambda: len(features(out)) > good // 4), running.output()
    out.rename(away)
    out.touch()
    ended = running.wait(120)
    assert ended.code in (1, 3), ended.output
    assert "could not be written" in ended.output, ended.output
    assert "Traceback" not in ended.output, ended.output
    out.unlink()
    away.rename(out)
    found = features(out)
    assert found.items() <= expected.items()
    again = drill.run(*arguments)
    assert again.code == 0, again.output
    check_whole(drill, out, expected)
    return f"{len(found)} of {good} written, then {ended.causes[-1] if ended.causes else ''}"


def clock(drill: Drill, *, good: int = 60) -> str:
    """The wall clock is set back by a day, two seconds after each process began."""
    source, expected = undisturbed(drill, good)
    out = drill.folder / "out"
    arguments = [source, "--out", out, "--workers", 2]
    ended = drill.run(*arguments, environment={"DRILL_CLOCK": "-86400"})
    assert ended.code == 0, ended.output
    check_whole(drill, out, expected)
    return f"{good} of {good} identical with the clock set back"


class Unable(Exception):  # noqa: N818 - not an error
    """This machine cannot play this part."""


def mutations(drill: Drill, *, data: Path, count: int = 500) -> str:
    """Mutated copies of real videos: decoded one by one, then extracted."""
    made = make_mutations(data, drill.folder / "videos", count)
    slowest = peak = 0.0
    good = set()
    for result in decode_all(made):
        slowest, peak = max(slowest, result.seconds), max(peak, result.peak_bytes)
        assert result.cause or result.frames, result
        if result.cause:
            check_sentence(result.path, result.cause)
        else:
            good.add(f"{result.path.stem}.rgb.npz")
    ended = drill.run(drill.folder / "videos", "--out", drill.folder / "out", "--deadline", 20)
    found = features(drill.folder / "out")
    assert {*found} == good, {*found} ^ good
    assert ended.code == 3, ended.output
    assert len(ended.causes) == count - len(found)
    assert not (left := drill.settle()), left
    return (
        f"{count} mutations, {len(found)} decode, {count - len(found)} are reported; the slowest "
        f"took {slowest:.1f} s, the decoder {peak / 1e6:.0f} MB; extraction {ended.seconds:.0f} s"
    )


def check_sentence(path: Path, cause: str) -> None:
    """It names the file, and is a sentence on one line and not an exception."""
    assert cause.startswith(str(path)), cause
    assert cause.endswith("."), cause
    assert "\n" not in cause, cause
    assert "Error" not in cause, cause


PARTS: dict[str, Callable[..., str]] = {
    "survive": survive,
    "resume": resume,
    "share": share,
    "shards": partial(share, runs=3, shards=True),
    "full": full,
    "unwritable": unwritable,
    "clock": clock,
    "mutations": mutations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--data", type=Path, default=os.environ.get("MMDIST_DATA"))
    given, extra = parser.parse_known_args()
    shared = tempfile.TemporaryDirectory()
    for part in given.parts:
        more = {}
        if part == "mutations":
            if given.data is None:
                parser.error("mutations need --data or MMDIST_DATA: a folder that has videos/")
            more["data"] = Path(given.data) / "videos"
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            try:
                said = PARTS[part](Drill(Path(folder), extra, Path(shared.name)), **more)
            except Unable as reason:
                said = f"not done: {reason}"
            print(f"{part}: {said} [{time.monotonic() - begin:.0f} s]", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
