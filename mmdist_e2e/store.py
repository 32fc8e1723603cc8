"""The feature store: one atomic `.npz` per video and modality, importable by every room.

A video's id is its path relative to the root it was given by, without the suffix, with forward
slashes; its features live at `ROOT/<id>.<modality>.npz`. A file holds `data` [S, D] float32,
`times` [S, 2] float64 and `meta` (JSON). Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from mmdist_e2e.structures import Features, MmdistError, Provenance

DIGEST_BLOCK_BYTES = 1 << 20


def write_atomically(path: Path, content: bytes | Callable[[IO[bytes]], None]) -> None:
    """Write a temporary file beside `path`, fsync it and rename it onto `path`.

    content: the bytes, or what writes them to an open file.
    A killed run or a full disk leaves the whole old file or none, never a part.
    Raises MmdistError when the disk is full or the folder cannot be made or written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                content(stream)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes private files; a feature file is as readable as any other output.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        temporary = None
    except OSError as error:
        reason = error.strerror or str(error)
        raise MmdistError(
            f"{path} could not be written ({reason}); make room or choose another folder and "
            f"run again: what is already done stays done."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def check_out(out: Path) -> None:
    """Raises MmdistError when what shall become a folder is a file."""
    if out.exists() and not out.is_dir():
        raise MmdistError(f"{out} is a file; --out needs a folder (a new one is made).")


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write indented JSON atomically, with a stable key order. Raises as write_atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())


def fast_digest(path: Path) -> dict[str, Any]:
    """Size in bytes and a digest of the first, middle and last mebibyte of a file.

    It tells a replaced video from the same one without reading an hour of it.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for offset in sorted({0, max(0, size // 2), max(0, size - DIGEST_BLOCK_BYTES)}):
            stream.seek(offset)
            digest.update(stream.read(DIGEST_BLOCK_BYTES))
    return {"bytes": size, "digest": digest.hexdigest()[:16]}


class FeatureStore:
    """Features of many videos under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def path(self, video_id: str, modality: str) -> Path:
        return self.root / f"{video_id}.{modality}.npz"

    def save(self, video_id: str, features: Features) -> Path:
        """Write one video's features atomically; returns the file. Raises as write_atomically."""
        meta = {
            "format": 1,
            "video": video_id,
            "modality": features.modality,
            "duration_seconds": features.duration_seconds,
            "provenance": features.provenance.to_json(),
        }
        encoded = np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8)
        path = self.path(video_id, features.modality)
        write_atomically(
            path,
            lambda stream: np.savez(
                stream,
                data=features.data.astype(np.float32, copy=False),
                times=features.times.astype(np.float64, copy=False),
                meta=encoded,
            ),
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
        self,
        video_id: str,
        modality: str,
        *,
        matters: Mapping[str, Any],
        source: Mapping[str, Any],
    ) -> bool:
        """Whether stored features were made in this very way from this very file."""
        if not self.path(video_id, modality).is_file():
            return False
        try:
            provenance = self.load(video_id, modality).provenance
        except MmdistError:
            return False  # an unreadable file is made again
        return dict(provenance.matters) == dict(matters) and dict(provenance.source) == dict(source)

    def videos(self, modality: str) -> list[str]:
        """Ids of all videos with features of a modality, sorted."""
        suffix = f".{modality}.npz"
        return sorted(
            path.relative_to(self.root).as_posix().removesuffix(suffix)
            for path in self.root.rglob(f"*{suffix}")
            if not path.name.startswith(".")
        )


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
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, MmdistError):
            raise MmdistError(f"{path}: {error}") from error
        raise MmdistError(
            f"{path} is not a whole feature file; delete it and run mmdist extract again."
        ) from error
