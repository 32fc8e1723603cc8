"""Decoding, the parent's side: a child process that may be killed, and frames as they come.

    with Decoder() as decoder:
        for chunk in decoder.frames("clip.mp4", fps=25):
            chunk.frames_NHWC, chunk.times_N

Decoding runs in `python -m mmdist_e2e.extractors.video.worker` (worker.py says why): a subprocess
and not a `multiprocessing` spawn, so that a script without a main guard works. Frames come
through a ring of memory-mapped slots. A crash or a stall of the child fails one video.

Shape suffixes: N frames, H height, W width, C channels (always 3, RGB).
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import mmap
import os
import queue
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.structures import MmdistError, check_choice

FpsPolicy = Literal["ceiling", "exact", "own"]
Pin = Callable[[NDArray[np.uint8]], Callable[[], object]]
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def printable(path: Path) -> str:
    """The path on one line in any terminal: line feeds and bytes that are no UTF-8 are escaped."""
    text = str(path)
    return text if text.isprintable() else repr(text)[1:-1]


def unfit(path: Path) -> str | None:
    """Why a path cannot be opened, found without opening a pipe, which would wait."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            return f"is not a regular file but {kind}; give a video file"
        if found.st_size == 0:
            return "is empty (0 bytes); copy or download it again"
        path.open("rb").close()
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {printable(path.readlink())}, which does not exist"
        return "does not exist; give a video file"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return None


class VideoError(MmdistError):
    """One video cannot be read; the message says why, `path` which."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


def failure(path: Path, problem: str) -> VideoError:
    return VideoError(path, f"{printable(path)} {problem}")


@dataclass(frozen=True)
class VideoInfo:
    """What is known before decoding.

    width, height: pixels as displayed (a rotated video upright).
    fps: average frames a second. duration_seconds: the end of the last frame on a player's clock,
    which starts with the file and may be ahead of the first frame. frame_count: frames shown.
    decoder: the library that decodes this video, "decord" or "pyav".
    """

    width: int
    height: int
    fps: float
    duration_seconds: float
    frame_count: int
    codec: str
    decoder: str


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive samples of a video, the caller's to keep unless he asked for views.

    frames_NHWC: [N, H, W, 3] uint8 RGB.
    times_N: [N] float64 seconds at which each is sampled, on a player's clock.
    """

    frames_NHWC: NDArray[np.uint8]
    times_N: NDArray[np.float64]


class FrameStream:
    """The samples of one video, to be iterated once; another request to the decoder ends it.

    info: the video's facts. fps: the effective rate (see `Decoder.frames`). sample_count: how
    many samples there will be. seconds: how long the child has worked on those that came.
    """

    def __init__(
        self, decoder: Decoder, job: int, path: Path, opened: Mapping[str, Any], *, copy: bool
    ) -> None:
        self.info = VideoInfo(**opened["info"])
        self.fps: float = opened["fps"]
        self.sample_count: int = opened["samples"]
        self.seconds: float = opened["seconds"]
        self._chunks = decoder._chunks(self, job, path, opened["shape"], copy)

    def __iter__(self) -> Iterator[FrameChunk]:
        return self._chunks

    def close(self) -> None:
        """Stop decoding the rest."""
        self._chunks.close()


class Decoder:
    """Reads videos, one at a time, in one child process that is started again after a failure.

    Starting it takes about half a second, so keep one for many videos. Use as a context manager.

    stall_seconds: the child is killed, and the video fails, when nothing comes for so long.
    chunk_bytes: size of a chunk of frames at most (but at least one frame, and at most
    CHUNK_FRAMES); the ring holds two.
    pin: called with the memory of each new ring; what it returns is called before the ring goes.
    """

    def __init__(
        self,
        *,
        stall_seconds: float = 60.0,
        chunk_bytes: int = 16 * 2**20,
        pin: Pin | None = None,
    ) -> None:
        if not stall_seconds > 0:
            raise MmdistError(f"stall_seconds must be positive; got {stall_seconds}.")
        self._stall_seconds = stall_seconds
        self._chunk_bytes = chunk_bytes
        self._pin = pin
        self._child: Child | None = None
        self._job = 0

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child and give its memory back; the decoder can be used again."""
        child, self._child = self._child, None  # another thread may close it, too
        if child is not None:
            child.end()

    def probe(self, path: str | Path) -> VideoInfo:
        """The facts of a video whose first frame decodes.

        Raises:
            VideoError: missing, empty, not a video, without pictures, cut off, or damaged.
        """
        return VideoInfo(**self._open("probe", Path(path))["info"])

    def frames(
        self,
        path: str | Path,
        *,
        fps: float | None = 25.0,
        fps_policy: FpsPolicy = "ceiling",
        longer_side: int | None = None,
        copy: bool = True,
    ) -> FrameStream:
        """Sample a video by timestamp: sample j is the frame displayed at j / fps seconds.

        Before the first picture (sound may start earlier) the first picture is sampled.
        "ceiling": a video that is not faster than `fps` keeps its own frames and average rate
        (one of variable rate is sampled at the fastest rate that it sustains). "exact": frames
        are repeated or dropped to reach `fps`, and sample j is the latest frame whose time
        rounds to j / fps or earlier, as by ffmpeg's fps filter. "own", or no `fps`: every frame
        once, at its own time. Memory does not grow with length. A file whose packets do not tell
        its times is decoded twice.

        longer_side: scale the sampled frames so, in pixels, as by ffmpeg's scale filter (bicubic).
        copy: False gives views, valid until the next chunk is asked for.

        Raises:
            VideoError: here as `probe` does, or while iterating where damage shows up later,
                when the child crashes or stalls.
        """
        if fps is not None and not 0 < fps <= 1000:
            raise MmdistError(f"fps must be between 0 and 1000; got {fps}.")
        check_choice("The fps policy", fps_policy, get_args(FpsPolicy))
        path = Path(path)
        how = {"fps": fps, "policy": fps_policy, "longer_side": longer_side}
        opened = self._open("frames", path, **how)
        return FrameStream(self, self._job, path, opened, copy=copy)

    def _open(self, do: str, path: Path, **options: Any) -> dict[str, Any]:
        problem = unfit(path)
        if problem is not None:
            raise failure(path, f"{problem}.")
        if self._child is None:
            self._child = Child()
        self._job += 1
        self._send(path, do=do, file=str(path.absolute()), **options)
        return self._receive(self._job, path)

    def _chunks(
        self, stream: FrameStream, job: int, path: Path, shape: Sequence[int], copy: bool
    ) -> Generator[FrameChunk, None, None]:
        self._check_current(job, path)
        assert self._child is not None
        ring = self._child.ring_for(max(self._chunk_bytes, math.prod(shape)), self._pin)
        how = {"ring": ring.name, "slot_bytes": ring.slot_bytes, "frames": CHUNK_FRAMES}
        self._send(path, do="go", **how)
        last = False
        try:
            while not last:
                message = self._receive(job, path)
                ring.unlink()
                times_N = np.array(message["times"], dtype=np.float64)
                frames_NHWC = ring.frames(message["slot"], (len(times_N), *shape))
                stream.seconds += message["seconds"]
                last = message["last"]
                if copy:  # 4 ms for 16 MiB, and the slot is free before the caller works on it
                    frames_NHWC = frames_NHWC.copy()
                if copy and not last:
                    self._send(path, do="free")
                yield FrameChunk(frames_NHWC, times_N)
                if not last:
                    self._check_current(job, path)
                if not copy and not last:
                    self._send(path, do="free")
        finally:
            if not last and self._child is not None and job == self._job:
                with contextlib.suppress(VideoError):
                    self._send(path, do="stop")

    def _check_current(self, job: int, path: Path) -> None:
        if job != self._job or self._child is None:
            raise failure(
                path,
                "is no longer being read, as its decoder was closed or given another video; use "
                "one decoder for each video read at the same time.",
            )

    def _send(self, path: Path, **message: Any) -> None:
        assert self._child is not None
        try:
            self._child.send({"job": self._job, **message})
        except OSError:
            raise self._crashed(path) from None

    def _receive(self, job: int, path: Path) -> dict[str, Any]:
        """The next message of this job that matters; a failure ends the child."""
        while True:
            assert self._child is not None
            try:
                message = self._child.messages.get(timeout=self._stall_seconds)
            except queue.Empty:
                self.close()
                raise failure(
                    path,
                    f"was given up because its decoder delivered nothing for "
                    f"{self._stall_seconds:g} seconds; the file may be damaged.",
                ) from None
            if message is None:
                raise self._crashed(path)
            if message["job"] != job or "alive" in message:
                continue
            if "error" in message:
                raise failure(path, message["error"])
            return message

    def _crashed(self, path: Path) -> VideoError:
        assert self._child is not None
        how = self._child.end()
        self._child = None
        return failure(path, f"made its decoder crash ({how}); the file may be damaged.")


SLOTS = 2  # one chunk is decoded while the parent works on the other
CHUNK_FRAMES = 64  # at most: small frames may be enlarged, each to 150 kB
PACKAGE_PARENT = Path(__file__).resolve().parents[3]
GRACE_SECONDS = 0.2
KILLED_SECONDS = 10.0  # that the end of a killed process is waited for
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
Messages = queue.Queue[dict[str, Any] | None]


class Child:
    """The process, and threads that read what it says, so that waiting can have a deadline.

    messages: what it sent; None when its pipe has ended, that is when it is dead. `hear` is called
    with them instead, if given. leader: it has a session of its own, and its children die with it.
    """

    def __init__(
        self,
        module: str = "mmdist_e2e.extractors.video.worker",
        environment: Mapping[str, str] = ONE_THREAD,
        *,
        hear: Callable[[dict[str, Any] | None], None] | None = None,
        leader: bool = False,
    ) -> None:
        paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # -P: somebody's numpy.py in the working directory must not become ours.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            start_new_session=leader,
        )
        self._stdin = cast(IO[bytes], self._process.stdin)
        self.messages: Messages = queue.Queue()
        self._noise: collections.deque[bytes] = collections.deque(maxlen=20)
        self._readers = [
            threading.Thread(
                target=_read_messages,
                args=(self._process.stdout, hear or self.messages.put),
                daemon=True,
            ),
            threading.Thread(
                target=_read_noise, args=(self._process.stderr, self._noise), daemon=True
            ),
        ]
        for reader in self._readers:
            reader.start()
        self.ring: Ring | None = None
        self._finalizer = weakref.finalize(self, _kill, self._process, leader)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Raises OSError when the process is dead."""
        self._stdin.write(json.dumps(message).encode() + b"\n")
        self._stdin.flush()

    def ring_for(self, slot_bytes: int, pin: Pin | None = None) -> Ring:
        """A ring with slots of at least that size, kept as long as it is large enough."""
        if self.ring is None or self.ring.slot_bytes < slot_bytes:
            if self.ring is not None:
                self.ring.close()
            self.ring = Ring(slot_bytes, pin)
        return self.ring

    def hang_up(self) -> None:
        """Close its stdin: it should end."""
        with contextlib.suppress(OSError):
            self._stdin.close()

    def end(self, grace_seconds: float = GRACE_SECONDS) -> str:
        """Make sure that the process is dead; say how it died, with its last words."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=grace_seconds)
        code = self._process.poll()
        self._finalizer()
        for reader in self._readers:
            reader.join(timeout=GRACE_SECONDS)
        if self.ring is not None:
            self.ring.close()
        how = f"exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = f"signal {signal.Signals(-code).name}"
        words = [line.decode(errors="replace").strip() for line in self._noise]
        return ": ".join([how, *[line for line in words if line][-1:]])


class Ring:
    """SLOTS slots of frames in a memory-mapped file, in memory where the system has a place.

    On Linux it has no name in any folder, so a kill at any time leaves nothing behind.
    """

    def __init__(self, slot_bytes: int, pin: Pin | None = None) -> None:
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size = SLOTS * self.slot_bytes
        for folder in (None, "/dev/shm", tempfile.gettempdir()):  # noqa: S108 - named by mkstemp
            try:
                if folder is None:
                    self._descriptor = os.memfd_create("mmdist")
                    self.name = f"/proc/{os.getpid()}/fd/{self._descriptor}"
                else:
                    self._descriptor, self.name = tempfile.mkstemp(prefix="mmdist-", dir=folder)
            except (AttributeError, OSError):
                continue
            try:
                # Reserved now: in a container with a small /dev/shm a later write would be SIGBUS.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._descriptor, 0, size)
                else:
                    os.ftruncate(self._descriptor, size)
                self._map = mmap.mmap(self._descriptor, size)
            except OSError:
                self.unlink()
                continue
            self._unpin = pin(np.frombuffer(self._map, np.uint8)) if pin else None
            return
        raise MmdistError(
            f"The decoder needs {size / 2**20:.0f} MiB for frames, and neither /dev/shm nor "
            f"{tempfile.gettempdir()} has them; free some space or set TMPDIR."
        )

    def frames(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The first frames of a slot, as a view."""
        flat = np.frombuffer(self._map, np.uint8, math.prod(shape), slot * self.slot_bytes)
        return flat.reshape(shape)

    def unlink(self) -> None:
        """Take the name away, which is not needed once both sides have mapped the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(OSError):  # /proc names are gone already
                Path(self.name).unlink()

    def close(self) -> None:
        self.unlink()
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        with contextlib.suppress(BufferError):  # somebody has a view: the map goes with that
            self._map.close()


def _read_messages(stdout: IO[bytes], hear: Callable[[dict[str, Any] | None], None]) -> None:
    with stdout, contextlib.suppress(ValueError):  # death may cut a line short
        for line in stdout:
            hear(json.loads(line))
    hear(None)


def _read_noise(stderr: IO[bytes], noise: collections.deque[bytes]) -> None:
    with stderr:
        noise.extend(stderr)


def _kill(process: subprocess.Popen[bytes], leader: bool) -> None:
    process.kill()
    if leader and hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver or file system that hangs
        process.wait(KILLED_SECONDS)
