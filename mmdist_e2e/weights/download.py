"""Fetching public weights and checking them against their digests."""

from __future__ import annotations

import hashlib
import http.client
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from mmdist_e2e.structures import MmdistError


@dataclass(frozen=True)
class Entry:
    r"""One set of weights of a video network.

    Attributes:
        kind: "shipped" (a folder in the wheel) or "public" (fetched, or brought by its user).
        facts: licence and origin, for people.
        config: the network's shape, preprocessing and sampling, as in a checkpoint's config.json.
        url: address of a public file.
        git_sha1: its id as a git object, sha1 of b"blob <size>\\0" followed by the content.
        sha256: of the content.
        rename: turns a key of the public file into ours, where they differ.
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
        """Whether a download could be verified, and so may be made."""
        return self.git_sha1 is not None or self.sha256 is not None


FETCH_TIMEOUT_SECONDS = 60

FETCH_BLOCK_BYTES = 1 << 20


def git_blob_sha1(path: Path) -> str:
    """The id of a file as a git object."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(FETCH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_digest(entry: Entry, path: Path) -> None:
    """Compare a file with every digest that the entry knows.

    Raises MmdistError for a wrong one, or a file that cannot be read.
    """
    for expected, compute in ((entry.git_sha1, git_blob_sha1), (entry.sha256, file_sha256)):
        if expected is None:
            continue
        try:
            actual = compute(path)
        except OSError as error:
            raise MmdistError(
                f"'{path}' cannot be read ({error.strerror}); give a readable file."
            ) from error
        if actual != expected:
            raise MmdistError(
                f"The file has the digest {actual}, not {expected}: it is not the file of the "
                f"weights {entry.name!r}; fetch it again from {entry.url}."
            )


def fetch(entry: Entry, path: Path) -> None:
    """Download an entry's file to `path` and verify it; a wrong file is never left behind.

    Raises MmdistError when the address cannot be reached or the content is not the expected one.
    """
    assert entry.url is not None
    assert entry.has_digest
    url = entry.url

    def copy(stream: IO[bytes]) -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "mmdist"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=FETCH_TIMEOUT_SECONDS) as answer:  # noqa: S310
            while block := answer.read(FETCH_BLOCK_BYTES):
                stream.write(block)

    temporary = path.with_name(path.name + ".unverified")
    try:
        _download(copy, temporary, url, entry.name)
        check_digest(entry, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _download(copy: Callable[[IO[bytes]], None], path: Path, url: str, name: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            copy(stream)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise MmdistError(
            f"The weights {name!r} could not be fetched from {url} ({error}); a network is needed "
            f"once, or use a network that ships (mmdist weights list)."
        ) from error
