"""Videos in object storage, by fsspec: s3://bucket/videos/clip.mp4, https://…, gs://… .

As a `Path` a URL loses a slash (s3:/bucket/videos/clip.mp4). It travels in that form through lists,
claims and logs; here the slash comes back. A video is fetched whole to a temporary file before it
is decoded, since decoders seek. Features are written to file systems only.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdist_e2e.extractors.video.reader import VideoError, failure, unfit
from mmdist_e2e.store import VIDEO_SUFFIXES, fast_digest, fast_digest_of
from mmdist_e2e.structures import MmdistError

SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])")  # two letters at least: C:/ is a drive


def url_of(path: Path) -> str | None:
    """The URL that became this path; None for a path of a file system."""
    match = SCHEME.match(str(path))
    if match is None or os.path.lexists(path):
        return None
    return f"{match[1]}://{str(path)[match.end() :]}"


def absolute(path: Path) -> Path:
    """The path from anywhere; links stay as they are."""
    return path if url_of(path) else Path(os.path.abspath(path))  # noqa: PTH100


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of a URL, and its name there. What fails is a VideoError."""
    try:
        import fsspec

        yield fsspec.core.url_to_fs(url, use_listings_cache=False)
    except MmdistError:
        raise
    except Exception as error:  # of many libraries
        extra = " (pip install 'mmdist-e2e[s3]')" if "s3fs" in str(error) else ""
        raise VideoError(
            Path(url), f"{url} cannot be read: {type(error).__name__}: {error}{extra}."
        ) from error


def find(path: Path) -> list[Path]:
    """The videos under a URL, sorted; hidden ones are left out. Raises MmdistError."""
    with _opened(url_of(path) or "") as (files, name):
        found = sorted(Path(files.unstrip_protocol(each)) for each in files.find(name))
    inside = {p: p.relative_to(path).parts for p in found if p.is_relative_to(path)}
    return [
        p
        for p, parts in inside.items()
        if p == path
        or (p.suffix.lower() in VIDEO_SUFFIXES and not any(x.startswith(".") for x in parts))
    ]


def source_of(path: Path) -> dict[str, Any]:
    """`fast_digest` of a video, which is the same wherever it lies. Raises VideoError."""
    if (url := url_of(path)) is None:
        if (problem := unfit(path)) is not None:
            raise failure(path, f"{problem}.")
        return fast_digest(path)
    with _opened(url) as (files, name):
        size = int(files.size(name))
        return fast_digest_of(size, lambda begin, end: files.cat_file(name, start=begin, end=end))


@contextlib.contextmanager
def fetched(path: Path) -> Iterator[Path]:
    """The file of a video: itself, or a copy of what a URL names. Raises VideoError."""
    if (url := url_of(path)) is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="mmdist-") as folder:
        copy = Path(folder) / f"video{path.suffix}"
        with _opened(url) as (files, name):
            files.get_file(name, str(copy))
        try:
            yield copy
        except VideoError as error:
            raise VideoError(path, str(error).replace(str(copy), url)) from error
