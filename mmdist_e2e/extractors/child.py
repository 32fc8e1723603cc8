"""The parent's hold on the decoder process: its pipes, its ring of frames, and its end.

The protocol is JSON lines: every message carries the `job` it belongs to, so that what crosses
the end of a video is told apart. decoder.py is the other side.
"""

from __future__ import annotations

import collections
import contextlib
import json
import mmap
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.structures import MmdistError

SLOTS = 2  # as in decoder.py: one chunk is decoded while the parent works on the other
PACKAGE_PARENT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 0.2

Messages = queue.Queue[dict[str, Any] | None]


class Child:
    """The process, and threads that read what it says, so that waiting can have a deadline.

    messages: what it sent; None when its pipe has ended, that is when it is dead.
    """

    def __init__(self) -> None:
        paths = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # -P: somebody's numpy.py in the working directory must not become ours.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mmdist_e2e.extractors.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"},
        )
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        self._stdin = stdin
        self.messages: Messages = queue.Queue()
        self._noise: collections.deque[bytes] = collections.deque(maxlen=20)
        self._readers = [
            threading.Thread(target=_read_messages, args=(stdout, self.messages), daemon=True),
            threading.Thread(target=_read_noise, args=(stderr, self._noise), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        self.ring: Ring | None = None
        self._finalizer = weakref.finalize(self, _kill, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: dict[str, Any]) -> None:
        """Raises OSError when the process is dead."""
        self._stdin.write(json.dumps(message).encode() + b"\n")
        self._stdin.flush()

    def ring_for(self, slot_bytes: int) -> Ring:
        """A ring with slots of at least that size, kept as long as it is large enough."""
        if self.ring is None or self.ring.slot_bytes < slot_bytes:
            if self.ring is not None:
                self.ring.close()
            self.ring = Ring(slot_bytes)
        return self.ring

    def end(self) -> str:
        """Make sure that the process is dead; say how it died, with its last words."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=GRACE_SECONDS)
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
    """SLOTS slots of frames in a memory-mapped file, in memory where the system has a place."""

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        size = SLOTS * self.slot_bytes
        for folder in ("/dev/shm", tempfile.gettempdir()):  # noqa: S108 - named by mkstemp
            try:
                descriptor, self.name = tempfile.mkstemp(prefix="mmdist-", dir=folder)
            except OSError:
                continue
            try:
                # Reserved now: in a container with a small /dev/shm a later write would be SIGBUS.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(descriptor, 0, size)
                else:
                    os.ftruncate(descriptor, size)
                self._map = mmap.mmap(descriptor, size)
            except OSError:
                self.unlink()
                continue
            finally:
                os.close(descriptor)
            return
        raise MmdistError(
            f"The decoder needs {size / 2**20:.0f} MiB for frames, and neither /dev/shm nor "
            f"{tempfile.gettempdir()} has them; free some space or set TMPDIR."
        )

    def copy(self, slot: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """A copy of the first frames of a slot."""
        start = slot * self.slot_bytes
        flat = np.frombuffer(self._map, np.uint8, int(np.prod(shape)), start)
        return flat.reshape(shape).copy()

    def unlink(self) -> None:
        """Take the name away: once both sides have it mapped, a kill leaves nothing behind."""
        with contextlib.suppress(OSError):
            Path(self.name).unlink()

    def close(self) -> None:
        self.unlink()
        self._map.close()


def _read_messages(stdout: IO[bytes], messages: Messages) -> None:
    with stdout:
        for line in stdout:
            messages.put(json.loads(line))
    messages.put(None)


def _read_noise(stderr: IO[bytes], noise: collections.deque[bytes]) -> None:
    with stderr:
        noise.extend(stderr)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
