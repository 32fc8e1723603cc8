"""Downloading public weights and checking them against their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmdist_e2e.structures import MmdistError

TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Entry:
    r"""The weights of one video network.

    Attributes:
        kind: "shipped" (a folder in the wheel) or "public" (downloaded, or supplied by the user).
        facts: origin and licence, for people.
        config: the network's shape, preprocessing and sampling, as in a checkpoint's config.json.
        url: address of a public file.
        git_sha1: the file's id as a git object: SHA-1 of b"blob <size>\\0" and the content.
        sha256: SHA-256 of the content.
        rename: converts a key of the public file to ours, where they differ.
    """

    name: str
    kind: Literal["shipped", "public"]
    facts: str
    config: Mapping[str, Any] | None = None
    url: str | None = None
    git_sha1: str | None = None
    sha256: str | None = None
    rename: Callable[[str], str] | None = None

    @property
    def has_digest(self) -> bool:
        """Whether a download can be verified; without a digest nothing is downloaded."""
        return self.git_sha1 is not None or self.sha256 is not None


def git_blob_sha1(path: Path) -> str:
    """The id of a file as a git object."""
    header = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, header.copy).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_digest(entry: Entry, path: Path) -> None:
    """Compare a file with every digest of the entry.

    Raises MmdistError when one differs, or when the file cannot be read.
    """
    for expected, compute in ((entry.git_sha1, git_blob_sha1), (entry.sha256, file_sha256)):
        try:
            actual = expected and compute(path)
        except OSError as error:
            raise MmdistError(
                f"'{path}' cannot be read ({error.strerror}); give a readable file."
            ) from error
        if actual != expected:
            raise MmdistError(
                f"The file has the digest {actual}, not {expected}: it is not the file of the "
                f"weights {entry.name!r}; download it again from {entry.url}."
            )


def fetch(entry: Entry, folder: Path) -> Path:
    """Download an entry's file into an existing `folder` and verify it.

    Raises MmdistError when the download fails or the digest is wrong.
    """
    import pooch

    assert entry.has_digest
    pooch.get_logger().setLevel("ERROR")
    downloader = pooch.HTTPDownloader(timeout=TIMEOUT_SECONDS)
    raw = folder / "download.pt"
    try:
        pooch.retrieve(entry.url, None, raw.name, folder, downloader=downloader)
    except OSError as error:  # those of requests are OSErrors without a number
        advice = (
            "connect to the network and try again, or use weights that need no download (see: "
            "mmdist weights list)"
            if error.errno is None
            else "make room, or set MMDIST_CACHE to another folder"
        )
        raise MmdistError(
            f"The weights {entry.name!r} could not be downloaded from {entry.url} "
            f"({_reason(error)}); {advice}."
        ) from error
    check_digest(entry, raw)
    return raw


def _reason(error: BaseException) -> str:
    """The innermost cause in words; the outer messages of requests hold object addresses."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
