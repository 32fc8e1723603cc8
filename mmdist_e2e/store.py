"""The feature store: one atomic `.npz` file per video and modality.

A video's id is its path relative to the folder that was searched, without the suffix, with
forward slashes and in Unicode's NFC form. Its features are stored in `ROOT/<id>.<modality>.npz`.
A part of that path that would be longer than 255 bytes is shortened: it ends in `~` and a digest.
A file holds `data` [S, D] float32, `times` [S, 2] float64 and `meta` (JSON, with the whole id).
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmdist_e2e.structures import Features, MmdistError, Provenance, check_choice

VIDEO_SUFFIXES = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip

DIGEST_BLOCK_BYTES = 1 << 20
NAME_MAX_BYTES = 255  # of one file name, on every file system in common use
FOLDER = ".mmdist"  # in an output folder: what runs of mmdist tell each other
TEMPORARY = ".tmp-"  # short, so that a temporary name fits wherever the final one does

# What numpy, zipfile, h5py and json raise for files that are damaged or something else.
DAMAGED = (
    *(OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error),
)

SHORTENED = re.compile(r"~[0-9a-f]{16}(?:/|$)")


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Write a file or replace it; content: the bytes, or a function that writes to an open file.

    After a kill or on a full disk, `path` is the whole old file or absent, never a part.
    Raises MmdistError when the disk is full or the folder cannot be made or written.
    """
    with staged(path, overwrite=True) as temporary, _unnamed(temporary, path) as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content)


@contextlib.contextmanager
def _unnamed(temporary: Path, path: Path) -> Iterator[IO[bytes]]:
    """A new file, which becomes `path` at the end. Until then a kill leaves none, on Linux.

    Where a file without a name cannot be made, it is `temporary`, and the caller's to rename.
    """
    try:
        descriptor = os.open(temporary.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except (AttributeError, OSError):
        with temporary.open("xb") as stream:
            yield stream
        return
    with os.fdopen(descriptor, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(descriptor)
        # A source folder, though unused, makes Python follow the link.
        source = f"/proc/self/fd/{descriptor}"
        os.link(source, temporary, src_dir_fd=descriptor, follow_symlinks=True)
        temporary.replace(path)


@contextlib.contextmanager
def staged(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary path; what is written there appears in `target` at the end.

    It lies beside `target`, or in it if that is a folder: on the same file system in any case.
    Write a file, or a folder of files, which are added to those of an existing folder. An
    exception or a full disk while it is written changes nothing. A kill while the files are put in
    their places leaves whole files, but perhaps not all of them.
    Raises MmdistError when a file exists with another content (unless `overwrite`), when the disk
    is full or the place cannot be written.
    """
    folder = target if target.is_dir() else target.parent
    temporary = folder / (TEMPORARY + secrets.token_hex(6))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield temporary
        made = [path for path in (temporary, *temporary.rglob("*")) if path.is_file()]
        places = {path: target / path.relative_to(temporary) for path in made}
        for path, place in places.items():
            if not (overwrite or not place.exists() or filecmp.cmp(path, place, shallow=False)):
                raise MmdistError(
                    f"{place} exists and holds something else; give another target or move it."
                )
            with path.open("r+b") as stream:
                os.fsync(stream.fileno())
        if temporary.is_dir() and not target.exists():
            places = {temporary: target}
        for path, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
    except OSError as error:
        raise MmdistError(
            f"{target} could not be written ({error.strerror or error}). Free some space or choose "
            f"another folder, and run again: finished files are kept."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path) -> None:
    """Write and delete a small file in the folder `out`, or where that folder would be made.

    Raises MmdistError when `out` is a file or nothing can be written there.
    """
    try:
        if out.is_file():
            raise MmdistError(f"{out} is a file; --out needs a folder (it is made if missing).")
        for folder in (out.absolute(), *out.absolute().parents):
            with contextlib.suppress(FileNotFoundError):
                folder.lstat()  # unlike exists(), it sees dangling links and too long names
                break
        with tempfile.NamedTemporaryFile(dir=folder, prefix=TEMPORARY) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise MmdistError(
            f"The output folder {out} cannot be made or written ({error.strerror or error}); "
            f"choose another one with --out."
        ) from error


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write indented JSON atomically, with a stable key order. Raises as write_atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    # Bytes of file names that are not UTF-8 arrive as surrogates: JSON writes those as \udcXX.
    write_atomically(path, text.encode(errors="backslashreplace"))


def row_writer(path: Path) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """A function that writes rows to `path` atomically: Parquet or JSON lines, by its suffix.

    Raises MmdistError at once for another suffix, and where pyarrow is needed and missing.
    """
    if path.suffix == ".jsonl":
        return lambda rows: write_atomically(
            path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        )
    check_choice(f"The suffix of {path}", path.suffix, (".parquet", ".jsonl"))
    pyarrow = require("pyarrow", "parquet", f"Writing {path}")
    parquet = require("pyarrow.parquet", "parquet", f"Writing {path}")

    def write(rows: Sequence[Mapping[str, Any]]) -> None:
        columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
        table = pyarrow.table(columns)
        write_atomically(path, lambda stream: parquet.write_table(table, stream))

    return write


def require(module: str, extra: str, what: str) -> Any:
    """Import an optional module. Raises MmdistError that says which extra `what` needs."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MmdistError(
            f"{what} needs {module}; run pip install 'mmdist-e2e[{extra}]'."
        ) from error


def fast_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and a digest of the first, middle and last mebibyte of a file.

    It detects a replaced video without reading all of it.
    Raises MmdistError when the path is no regular file (reading a pipe may wait for ever).
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise MmdistError(f"{path} is not a regular file; give a video file.")
    with path.open("rb") as stream:

        def read(begin: int, end: int) -> bytes:
            stream.seek(begin)
            return stream.read(end - begin)

        return fast_digest_of(status.st_size, read)


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys, in 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fast_digest_of(size: int, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """`fast_digest` of anything of which `read(begin, end)` gives a part; offsets in bytes."""
    digest = hashlib.sha256(str(size).encode())
    for begin in sorted({0, max(0, size // 2), max(0, size - DIGEST_BLOCK_BYTES)}):
        digest.update(read(begin, min(begin + DIGEST_BLOCK_BYTES, size)))
    return {"bytes": size, "digest": digest.hexdigest()[:16]}


def video_key(video_id: str) -> str:
    """The one form in which video ids are compared and stored: Unicode NFC."""
    return unicodedata.normalize("NFC", video_id)


def _fitting(name: str, suffix: str = "") -> str:
    """`name` + `suffix`, with the name shortened where the whole is too long for a file name."""
    if len(os.fsencode(name + suffix)) <= NAME_MAX_BYTES:
        return name + suffix
    data = os.fsencode(name)
    tail = f"~{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    return data[: NAME_MAX_BYTES - len(tail)].decode(errors="ignore") + tail


class FeatureStore:
    """Features of many videos under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, video_id: str, modality: str) -> Path:
        """The feature file of a video, whether or not it exists.

        A file that another program wrote in another Unicode normal form is found as well.
        """
        path = found = self._path(video_key(video_id), modality)
        if not video_id.isascii() and not path.is_file():
            found = self.root
            for part in path.relative_to(self.root).parts:
                same = (p for p in found.glob("*") if video_key(p.name) == video_key(part))
                found = next(same, found / part)
        return found

    def _path(self, video_id: str, modality: str) -> Path:
        *folders, name = video_id.split("/")
        if {"", ".", ".."} & {*folders} or "\0" in video_id:
            raise MmdistError(
                f"The video id {video_id!r} is no path inside {self.root}; ids are relative, "
                f"without '.' and '..'."
            )
        return self.root.joinpath(*map(_fitting, folders), _fitting(name, f".{modality}.npz"))

    def save(self, video_id: str, features: Features) -> Path:
        """Write one video's features atomically; returns the file. Raises as write_atomically."""
        meta = {
            "format": 1,
            "video": video_key(video_id),
            "modality": features.modality,
            "duration_seconds": features.duration_seconds,
            "provenance": features.provenance.to_json(),
        }
        encoded = np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8)
        data = features.data.astype(np.float32, copy=False)
        times = features.times.astype(np.float64, copy=False)
        path = self.path(video_id, features.modality)
        write_atomically(
            path, lambda stream: np.savez(stream, data=data, times=times, meta=encoded)
        )
        return path

    def load(self, video_id: str, modality: str) -> Features:
        """Read one video's features.

        Raises MmdistError when there are none, or the file is not a whole feature file.
        """
        path = self.path(video_id, modality)
        if not path.is_file():
            raise MmdistError(
                f"No {modality} features of the video {video_id!r} in {self.root}; "
                f"make them with: mmdist extract VIDEOS --modality {modality} --out {self.root}"
            )
        return read_features(path)

    def up_to_date(
        self, video_id: str, modality: str, *, matters: Mapping[str, Any], source: Mapping[str, Any]
    ) -> bool:
        """Whether the stored features were made in this way from this very file.

        Never by name alone: without a digest of the source the answer is no.
        """
        try:
            made = self.load(video_id, modality).provenance
        except MmdistError:
            return False  # missing, or damaged and to be made again
        return bool(source) and (dict(made.matters), made.source) == (dict(matters), source)

    def videos(self, modality: str) -> list[str]:
        """Ids of all videos with features of a modality, sorted."""
        found = (self._id(path, modality) for path in self.root.rglob(f"*.{modality}.npz"))
        return sorted({name for name in found if name is not None})

    def _id(self, path: Path, modality: str) -> str | None:
        """The id of a feature file; None for a hidden file that is none (macOS `._NAME`)."""
        name = path.relative_to(self.root).as_posix().removesuffix(f".{modality}.npz")
        if name.startswith(TEMPORARY):
            return None  # of an import that was killed
        hidden = any(part.startswith(".") for part in name.split("/"))
        if not hidden and SHORTENED.search(name) is None:
            return video_key(name)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                video = str(json.loads(arrays["meta"].tobytes())["video"])
        except DAMAGED:
            return None if hidden else video_key(name)
        return video if self._path(video, modality) == path else video_key(name)


def read_features(path: Path) -> Features:
    """Read one `.npz` feature file. Raises MmdistError when it is not a whole one."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            return Features(
                data=arrays["data"],
                times=arrays["times"],
                duration_seconds=float(meta["duration_seconds"]),
                modality=meta["modality"],
                provenance=Provenance.from_json(meta["provenance"]),
            )
    except MmdistError as error:
        raise MmdistError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise MmdistError(
            f"{path} is not a whole feature file; delete it and run mmdist extract again."
        ) from error
