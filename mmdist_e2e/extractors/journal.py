"""What runs leave beside the features, so that other runs and people know.

In the output folder OUT:

    .mmdist/claims/DIGEST.lock    locked by the run that is extracting a video: {"id": …}
    .mmdist/failures/DIGEST.json  why a video lacks modalities: see `Failure`
    failed.txt                    the videos that failed, as `mmdist extract --list` reads

DIGEST is of the video's id, 16 digits. A lock is the operating system's (flock): it ends with its
process. No decision depends on a clock or on a file's time.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmdist_e2e.extractors.remote import url_of
from mmdist_e2e.extractors.search import Outcome, Video, list_lines, printable
from mmdist_e2e.store import FOLDER, digest_of, write_atomically, write_json
from mmdist_e2e.structures import MmdistError


@dataclass(frozen=True)
class Failure:
    """Why a video lacks modalities.

    path: absolute. what: a digest of the id, the video file and all that matters in how features
    are made. error: the class of the failure. attempts: worker processes that tried.
    run: the run that wrote this, a random name.
    """

    id: str
    path: str
    modalities: Sequence[str]
    what: str
    error: str
    cause: str
    attempts: int
    run: str


class Journal:
    """Claims and failures of one output folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folder = root / FOLDER

    def claim(self, video_id: str) -> contextlib.ExitStack | None:
        """Claim a video, until the stack is closed; None if another run, or one here, has it.

        Where the file system has no locks, a warning says so, and every claim succeeds.
        """
        path = self._folder / "claims" / f"{digest_of(video_id)[:16]}.lock"
        try:
            while True:
                with contextlib.ExitStack() as claim:
                    try:
                        path.parent.mkdir(parents=True, exist_ok=True)
                        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                    except FileNotFoundError:
                        continue  # another run has just removed the empty folder
                    claim.callback(os.close, descriptor)
                    if not _lock(descriptor):
                        return None
                    if os.fstat(descriptor).st_nlink:  # else its owner has just removed it
                        os.ftruncate(descriptor, 0)
                        os.pwrite(descriptor, json.dumps({"id": video_id}).encode(), 0)
                        claim.callback(_remove, path)  # while it is locked
                        return claim.pop_all()
        except (OSError, ImportError) as error:
            # The text must be the same for all videos: a warning is shown once for a text.
            warnings.warn(
                f"No locks can be had in {self._folder} ({getattr(error, 'strerror', error)}): "
                f"several runs on this folder would do the same videos.",
                stacklevel=2,
            )
            return contextlib.ExitStack()

    def running(self) -> list[str]:
        """Ids of the videos that runs are extracting now, sorted."""
        return sorted(self._claimed())

    def _claimed(self, *, clean: bool = False) -> Iterator[str]:
        """Ids of claims that are held. clean: delete those that a killed run has left."""
        for path in (self._folder / "claims").glob("*.lock"):
            with contextlib.suppress(OSError, ImportError, ValueError, LookupError):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    if not _lock(descriptor, shared=not clean):
                        yield str(json.loads(os.pread(descriptor, 1 << 16, 0))["id"])
                    elif clean and os.fstat(descriptor).st_nlink:  # see `claim`
                        path.unlink()
                finally:
                    os.close(descriptor)

    def failure_of(self, video_id: str) -> Failure | None:
        """The failure of a video, if one is recorded."""
        return _read(self._failure(video_id))

    def failures(self) -> list[Failure]:
        """All failures that are recorded, by id."""
        found = map(_read, (self._folder / "failures").glob("*.json"))
        return sorted(filter(None, found), key=lambda failure: failure.id)

    def note(self, failure: Failure) -> None:
        """Record a failure in place of an older one. What cannot be written is left out."""
        with contextlib.suppress(MmdistError):
            write_json(self._failure(failure.id), asdict(failure))

    def forget(self, video_id: str, modalities: Iterable[str]) -> None:
        """Delete the record of a video, unless it is about other modalities too."""
        failure = self.failure_of(video_id)
        if failure is not None and {*failure.modalities} <= {*modalities}:
            _remove(self._failure(video_id))

    def close(self) -> None:
        """Remove what killed runs have left of claims, and empty folders."""
        collections.deque(self._claimed(clean=True), maxlen=0)
        for folder in (self._folder / "claims", self._folder / "failures", self._folder):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write_list(self, outcomes: Sequence[Outcome]) -> Path | None:
        """Write failed.txt after a run; None if it is not needed, and then it is removed.

        It names what failed in this run, and videos of other runs whose failures are recorded, if
        they still exist: shards and concurrent runs share the file.
        Raises MmdistError when it cannot be written.
        """
        path = self.root / "failed.txt"
        failed = {o.video.id: o.video for o in outcomes if o.status == "failed"}
        ours = {outcome.video.id for outcome in outcomes}
        for failure in self.failures():
            video = Video(failure.id, Path(failure.path))
            if failure.id not in ours and (os.path.lexists(video.path) or url_of(video.path)):
                failed[failure.id] = video
        if not failed:
            _remove(path)
            return None
        write_atomically(path, os.fsencode(list_lines(failed[name] for name in sorted(failed))))
        return path

    def _failure(self, video_id: str) -> Path:
        return self._folder / "failures" / f"{digest_of(video_id)[:16]}.json"


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _lock(descriptor: int, *, shared: bool = False) -> bool:
    """Whether the lock could be taken. ImportError, OSError: there are no locks here."""
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(path: Path) -> Failure | None:
    try:
        return Failure(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


class Log:
    """A file of JSON lines, one for each video as it finishes.

    Its folder is made if it is missing. Raises MmdistError when it cannot be opened. When it cannot
    be written any more, a warning says so and the run continues.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a", encoding="ascii")
        except OSError as error:
            why = f"{error.filename}: {error.strerror}"
            raise MmdistError(f"The log {path} cannot be written ({why}).") from error

    def write(self, outcome: Outcome) -> None:
        told = asdict(outcome)
        video = told.pop("video")
        line = {"id": video["id"], "path": str(video["path"]), **told}
        try:
            # One write for each line, so that the lines of several runs do not mix.
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as error:
            warnings.warn(
                f"The log {printable(self._stream.name)} cannot be written ({error.strerror}).",
                stacklevel=2,
            )
