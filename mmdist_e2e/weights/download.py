"""Downloading public files, continuing partial downloads, and checking digests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mmdist_e2e.structures import MmdistError

TIMEOUT_SECONDS = 60
BLOCK_BYTES = 1 << 14  # less than this is lost where a connection drops

Progress = Callable[[str, int, int], None] | None  # what, done, of how many


@dataclass(frozen=True)
class Entry:
    r"""What is known by a name.

    Attributes:
        kind: of a video network "shipped" (in the wheel) or "public" (downloaded, or supplied by
            the user); "model" is a grounding checkpoint, "file" what is used as it is.
        facts: origin, training data and, after the last semicolon, the licence.
        config: the network's shape, preprocessing and sampling, as in a checkpoint's config.json.
        url: address of a public file; None of what ships.
        git_sha1: the file's id as a git object: SHA-1 of b"blob <size>\\0" and the content.
        sha256: SHA-256 of the content.
        rename: converts a key of the public file to ours, where they differ.
        needs: of a model, its extractor, its PCA, if any, and its vocabulary: names, or paths.
    """

    name: str
    kind: Literal["shipped", "public", "file", "model"]
    facts: str
    config: Mapping[str, Any] | None = None
    url: str | None = None
    git_sha1: str | None = None
    sha256: str | None = None
    rename: Callable[[str], str] | None = None
    needs: tuple[str, ...] = ()

    @property
    def ships(self) -> bool:
        """Whether it is part of the wheel."""
        return self.url is None

    @property
    def digest(self) -> str | None:
        """By which a download is verified; without one nothing is downloaded."""
        return self.git_sha1 or self.sha256

    @property
    def command(self) -> str:
        """The command that puts it into the cache."""
        return f"mmdist pull {self.name}{'' if self.digest else ' --from FILE'}"


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
    """Compare a file with every digest of the entry. Raises MmdistError when one differs."""
    for expected, compute in ((entry.git_sha1, git_blob_sha1), (entry.sha256, file_sha256)):
        if expected and (actual := compute(path)) != expected:
            raise MmdistError(
                f"The file has the digest {actual}, not {expected}: it is not the file "
                f"{entry.name!r}; download it again from {entry.url}."
            )


def fetch(entry: Entry, folder: Path, progress: Progress = None) -> Path:
    """Download an entry's file into `folder` and verify it; returns `folder`/DIGEST.part.

    An interrupted download stays there and is continued by the next call; a wrong digest or a full
    disk deletes it. MMDIST_MIRROR replaces the scheme and host of the address. Raises MmdistError
    when the download fails or the digest is wrong.
    """
    import requests

    assert entry.url is not None
    part, url = folder / f"{entry.digest}.part", entry.url
    if mirror := os.environ.get("MMDIST_MIRROR"):
        url = mirror.rstrip("/") + urlsplit(url).path
    with suppress(MmdistError):
        if _size(part):
            check_digest(entry, part)
            return part
    for is_last in (False, False, True):  # each attempt continues the one before
        before = _size(part)
        try:
            _download(url, part, f"downloading {entry.name} (MB)", progress)
            break
        except requests.RequestException as error:
            size = _size(part)
            if size != before and not is_last:
                continue
            kept = f", which continues after the {size:,} bytes that are kept" if size else ""
            raise MmdistError(
                f"{entry.name!r} could not be downloaded from {url} ({_reason(error)}); connect to "
                f"the network and try again{kept}, or bring the file from another machine: "
                f"mmdist pull {entry.name} --from FILE."
            ) from error
        except OSError as error:
            part.unlink(missing_ok=True)
            raise MmdistError(
                f"{entry.name!r} could not be written to {part.parent} "
                f"({error.strerror or error}), and the partial file was deleted; make room, or "
                f"set MMDIST_CACHE to another folder."
            ) from error
    try:
        check_digest(entry, part)
    except MmdistError as error:
        part.unlink()
        raise MmdistError(f"{error} What {url} sent was deleted.") from error
    return part


def _download(url: str, part: Path, what: str, progress: Progress) -> None:
    """Append what `part` lacks; from the start where the server does not send parts of files."""
    import requests

    have = _size(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()  # it is not the beginning of this file: the next attempt starts again
        response.raise_for_status()
        continued = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        done = have if continued else 0
        total = done + int(response.headers.get("Content-Length", 0))
        with part.open("ab" if continued else "wb") as stream:
            for block in response.iter_content(BLOCK_BYTES):
                stream.write(block)
                done += len(block)
                if progress:
                    progress(what, done // 10**6, total // 10**6)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _reason(error: BaseException) -> str:
    """The innermost cause in words; the outer messages of requests hold object addresses."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
