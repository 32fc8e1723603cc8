"""Which videos to extract: files, folders and lists of them, and their ids."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from mmdist_e2e.extractors.remote import absolute, find, url_of
from mmdist_e2e.store import FOLDER, VIDEO_SUFFIXES, video_key
from mmdist_e2e.structures import MmdistError

Status = Literal["done", "skipped", "failed"]
ROOT_LINE = "# root: "  # in a list: the folder that the paths and ids below it are relative to


def printable(text: str) -> str:
    """The text on one line, with � for control characters and bytes that are not UTF-8."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


@dataclass(frozen=True)
class Video:
    """A video file and its id: the path relative to the given folder, without the suffix."""

    id: str
    path: Path

    @property
    def label(self) -> str:
        """The id as it can be printed."""
        return printable(self.id)


@dataclass(frozen=True)
class Outcome:
    """The result for one video.

    rows: saved, by modality. cause: why it failed, or who has extracted it if not this run.
    error: the class of the failure. seconds: spent, by stage. attempts: how many worker processes
    tried, the last one being `worker`.
    """

    video: Video
    status: Status
    rows: Mapping[str, int] = field(default_factory=dict)
    cause: str = ""
    error: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    video_seconds: float = 0.0
    attempts: int = 0
    worker: int | None = None


class Found(NamedTuple):
    """The result of a search.

    problems: paths that cannot be extracted, as failed outcomes. hidden: how many names that start
    with a dot were ignored. repeated: how many further names of the videos' files were ignored.
    """

    videos: list[Video]
    problems: list[Outcome]
    hidden: int
    repeated: int


def find_videos(paths: Iterable[Path], *, lists: Iterable[tuple[Path | None, Path]] = ()) -> Found:
    """Search the given files and folders for videos; those of a folder come sorted.

    lists: what `read_list` gives. A file in it that is missing is a video all the same, whose
    extraction fails.

    The id of a given file is its name; a video in a folder has its path relative to that folder;
    both without the suffix, in NFC. Hidden files and folders inside a folder are ignored, macOS's
    `._NAME` among them; a file that is given by name is always taken. Links are followed. A file
    with several names is one video: its own name counts before a link's, then the first one.
    What cannot be extracted (missing, a dangling link, a pipe, a folder without videos, files
    that share an id) becomes a problem and does not stop the others.
    """
    search = _Search()
    for given in paths:
        kind = "url" if url_of(given) is not None else search.kind(given)
        if kind == "url":
            search.remote(given)
        elif kind == "file":
            search.add(given.stem, given, given.is_symlink())
        elif kind == "folder":
            search.folder(given)
    for root, given in lists:
        search.listed(root, given)
    return search.result()


class _Search:
    def __init__(self) -> None:
        self.names: list[tuple[Video, bool, Path]] = []  # whether a link led there, the real path
        self.problems: list[Outcome] = []
        self.hidden = 0

    def add(self, name: str, path: Path, linked: bool) -> None:
        self.names.append((Video(video_key(name), path), linked, Path(os.path.realpath(path))))

    def fail(self, path: Path, cause: str) -> None:
        problem = Outcome(Video(str(path), path), "failed", {}, printable(cause), "MmdistError")
        self.problems.append(problem)

    def kind(self, path: Path) -> Literal["file", "folder"] | None:
        """What a path leads to; None after noting why it is neither."""
        try:
            mode = path.stat().st_mode
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            reason = "does not exist" if missing else f"cannot be read ({error.strerror})"
            if stat.S_ISLNK(_mode(path, follow=False)):
                self.fail(path, f"{path} is a link to {path.readlink()}, which {reason}.")
            else:
                self.fail(path, f"{path} {reason}; give a video file or a folder of videos.")
            return None
        if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
            return "folder" if stat.S_ISDIR(mode) else "file"
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket or a device"
        self.fail(path, f"{path} is {kind}, not a regular file; save the video as a file first.")
        return None

    def folder(self, given: Path) -> None:
        """Search a folder in depth; linked folders last, and each real folder once."""
        begin, problems = len(self.names), len(self.problems)
        root, seen = given.resolve(), set[Path]()
        folders, links = [(given, False)], list[tuple[Path, bool]]()
        while folders or links:
            folder, linked = folders.pop() if folders else links.pop(0)
            real = folder.resolve()
            if real in seen or real in root.parents:  # a link that leads back ends here
                continue
            seen.add(real)
            try:
                paths = sorted(folder.iterdir())
            except OSError as error:
                self.fail(folder, f"The folder {folder} cannot be read ({error.strerror}).")
                continue
            for path in paths:
                link, mode = stat.S_ISLNK(_mode(path, follow=False)), _mode(path)
                wanted = path.suffix.lower() in VIDEO_SUFFIXES
                dangling = link and not mode and not path.suffix  # of a folder, by its name
                if path.name.startswith("."):
                    self.hidden += wanted or (stat.S_ISDIR(mode) and path.name != FOLDER)
                elif stat.S_ISDIR(mode):
                    (links if link else folders).append((path, linked or link))
                elif (wanted or dangling) and self.kind(path) == "file":
                    name = path.relative_to(given).as_posix().removesuffix(path.suffix)
                    self.add(name, path, linked or link)
        self.names[begin:] = sorted(self.names[begin:], key=lambda name: name[0].path)
        if len(self.names) == begin and len(self.problems) == problems:
            valid = " ".join(VIDEO_SUFFIXES)
            self.fail(given, f"The folder {given} has no videos (files ending in {valid}).")

    def remote(self, given: Path) -> None:
        """Take a video by its URL, or all that lie under it."""
        try:
            paths = find(given)
        except MmdistError as error:
            self.fail(given, str(error))
            return
        for path in paths:
            name = path.name if path == given else path.relative_to(given).as_posix()
            self.add(name.removesuffix(path.suffix), path, False)
        if not paths:
            valid = " ".join(VIDEO_SUFFIXES)
            self.fail(given, f"{url_of(given)} has no videos (files ending in {valid}).")

    def listed(self, root: Path | None, path: Path) -> None:
        """Take a file of a list; its id is relative to `root`, or its name if there is none."""
        inside = root is None or path.is_relative_to(root)
        name = path.relative_to(root).as_posix() if root is not None and inside else path.name
        if not inside or name.startswith("../"):
            self.fail(path, f"{path} is not in the folder {root}, which is the list's root.")
        elif stat.S_ISDIR(_mode(path)):
            self.fail(path, f"{path} is a folder; a list names video files.")
        elif name.startswith(f"{FOLDER}/"):
            self.fail(path, f"{path} is in a folder that mmdist keeps for itself.")
        else:
            self.add(name.removesuffix(path.suffix), path, path.is_symlink())

    def result(self) -> Found:
        first: dict[Path, Video] = {}
        for video, _, real in sorted(self.names, key=lambda name: name[1]):
            first.setdefault(real, video)
        by_id: dict[str, list[Video]] = {}
        for video, _, real in self.names:
            if first[real] is video:
                by_id.setdefault(video.id, []).append(video)
        for name, same in by_id.items():
            for video, other in zip(same, same[1:] + same[:1], strict=True):
                if video is not other:
                    self.fail(
                        video.path,
                        f"{video.path} and {other.path} both have the video id {name!r}; rename "
                        f"one, or extract them into different folders.",
                    )
        videos = [same[0] for same in by_id.values() if len(same) == 1]
        return Found(videos, self.problems, self.hidden, len(self.names) - len(first))


def _mode(path: Path, *, follow: bool = True) -> int:
    """The mode of what a path leads to, or of a link itself; 0 if it cannot be read."""
    try:
        return path.stat(follow_symlinks=follow).st_mode
    except OSError:
        return 0


def read_list(data: bytes, root: Path | None = None) -> list[tuple[Path | None, Path]]:
    """The (root, path) pairs of a list of videos, one path a line; see `list_lines`.

    A path is absolute or relative to the root in force: that of the last line "# root: DIR", else
    `root`, else the working directory. Other lines that begin with "#" are comments. Parts "." and
    ".." are resolved by name, so a path that leaves its root is seen as such.
    Raises MmdistError for a line that begins with a quotation mark and is no JSON string.
    """
    found: list[tuple[Path | None, Path]] = []
    for number, line in enumerate(os.fsdecode(data).removeprefix("\ufeff").split("\n"), 1):
        text = line.removesuffix("\r")
        is_root = text.startswith(ROOT_LINE)
        if not text.strip() or (text.startswith("#") and not is_root):
            continue
        name = text.removeprefix(ROOT_LINE)
        if name.startswith('"'):
            try:
                name = str(json.loads(name))
                os.fsencode(name)
            except ValueError as error:
                raise MmdistError(
                    f"Line {number} of the list begins with a quotation mark but is no JSON string "
                    f"({error}); write the plain path, or quote all of it."
                ) from error
        if "\0" in name:
            raise MmdistError(f"Line {number} of the list has a NUL character; save it as UTF-8.")
        path = Path(os.path.normpath(name))
        if is_root:
            root = path
            continue
        # A relative path without a root is relative to the working directory, and so is its id.
        whole = path.is_absolute() or url_of(path) is not None
        start = root if root is not None or whole else Path()
        found.append((start, path if whole else Path(os.path.normpath((start or Path()) / path))))
    return found


def list_lines(videos: Iterable[Video]) -> str:
    r"""A list that `read_list` reads back with the same ids, whatever bytes the names hold.

    One path a line, under lines that name the root. A name that would not survive as plain text is
    a JSON string: with line feeds and other control characters, bytes that are not UTF-8
    (`\udcXX`), spaces at its ends, or a first character that means something (`#` and `"`).
    """
    by_root: dict[Path, list[str]] = {}
    for video in videos:
        path = absolute(video.path)
        name = Path(*path.parts[-1 - video.id.count("/") :])
        same = video_key(name.as_posix().removesuffix(path.suffix)) == video.id
        if name.is_absolute() or not same:  # not found in a folder: the id is the file's name
            name = Path(path.name)
        root = path.parents[len(name.parts) - 1]
        by_root.setdefault(root, []).append(_quoted(name.as_posix()))
    lines = (
        line
        for root, names in by_root.items()
        for line in (ROOT_LINE + _quoted(url_of(root) or str(root)), *names)
    )
    return "".join(f"{line}\n" for line in lines)


def _quoted(name: str) -> str:
    plain = name.isprintable() and name == name.strip() and name[:1] not in ("#", '"')
    return name if plain else json.dumps(name)


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether the video of this id belongs to shard (index from 0, count): by its id alone."""
    index, count = shard
    digest = hashlib.sha256(os.fsencode(name)).digest()
    return int.from_bytes(digest[:8], "big") % count == index
