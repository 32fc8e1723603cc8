"""Published annotations: fetched by name, and recognised by their content."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.store import check_out, staged
from mmdist_e2e.structures import MmdistError, check_choice
from mmdist_e2e.weights.download import Entry, fetch, git_blob_sha1

URL = "https://github.com/minghangz/cpl/raw/main/data/"
PAGES = {"charades": "prior.allenai.org/projects/charades", "activitynet": "activity-net.org"}

# By name: what it is, its folder at URL, and by the name of a file here its name there and its id
# as a git object.
DATASETS: dict[str, tuple[str, str, dict[str, tuple[str, str]]]] = {
    "charades-sta": (
        "Charades-STA in CPL's rows (protocol cpl: without queries that end past their video)",
        "charades",
        {
            "train.json": ("train.json", "5f7e6554d1e101db7c08ff63144f379dfcebeac4"),
            "test.json": ("test.json", "5d9687e7d1c6977bbe6ae52c8075fa001a01be17"),
        },
    ),
    "activitynet-captions": (
        "ActivityNet Captions in CPL's rows (protocol official; val is val_1, test is val_2)",
        "activitynet",
        {
            "train.json": ("train_data.json", "debbd00e24bc7bf0595de5fd2effec5b48a7e32c"),
            "val.json": ("val_data.json", "d57356fceedf5580bee0afa06fa176e4fbb3ec3b"),
            "test.json": ("test_data.json", "2ea972a413add2523b0a17f71af4406dd4da511d"),
        },
    ),
    "cpl-vocabulary-charades": (
        "CPL's words and GloVe vectors for Charades-STA",
        "charades",
        {"glove.pkl": ("glove.pkl", "e0320a97dc583316c2b56ace462b1fafc326691b")},
    ),
    "cpl-vocabulary-activitynet": (
        "CPL's words and GloVe vectors for ActivityNet Captions",
        "activitynet",
        {"glove.pkl": ("glove.pkl", "4384500e128d5c450b4b8de9e46f34b1223f8e64")},
    ),
}


def pull(name: str, out: Path) -> list[str]:
    """Fetch the files of a data set by its name into the folder `out`, all or none of them.

    A file that is there already is kept. Returns lines to print: the files, what they are, where
    the videos are. Raises MmdistError for an unknown name, a failed download, a file of another
    digest than the known one, and where `out` holds another file of that name.
    """
    check_choice("The data set", name, list(DATASETS))
    what, origin, files = DATASETS[name]
    check_out(out)
    with staged(out) as folder:
        folder.mkdir()
        for file, (there, digest) in files.items():
            path = out / file
            if path.exists() and not (path.is_file() and git_blob_sha1(path) == digest):
                raise MmdistError(
                    f"{path} exists and is not that of {name}; move it, or give another --out."
                )
            if not path.exists():
                url = f"{URL}{origin}/{there}"
                entry = Entry(f"{name}: {file}", "public", what, url=url, git_sha1=digest)
                with tempfile.TemporaryDirectory(dir=folder) as downloads:
                    fetch(entry, Path(downloads)).replace(folder / file)
    videos = f"Videos may not be redistributed; get them at {PAGES[origin]}."
    return [*(str(out / file) for file in files), f"{what}.", videos]


# The splits that papers report on, by `fingerprint`.
PUBLISHED = {
    "d5c0f45d383d7417": "charades_sta official, training split",
    "e21c438db7ffaa73": "charades_sta official",
    "2ff734e4cf6591d8": "charades_sta cpl, training split",
    "c5cc9b8e512f2779": "charades_sta cpl",
    "e14b4f6f408e6c80": "activitynet val_1 (validation)",
    "c2904e8f6f2d1fe9": "activitynet val_2 (test)",
    "06cceaa5fd796c8c": "activitynet cpl, val_1 (validation)",
    "3e65d31d95a9026a": "activitynet cpl, val_2 (test)",
    "eb9e5c78dd33ca01": "charades_cg, training split",
    "4983d133cb0b5da8": "charades_cg test-trivial",
    "a79db22f05895c43": "charades_cg novel-composition",
    "aa1938001796dcb3": "charades_cg novel-word",
}


def fingerprint(annotations: Sequence[Annotation]) -> str:
    """A digest of queries in any order: videos, times to 0.01 s, words without case."""
    lines = []
    for a in annotations:
        times = " ".join(f"{start:.2f} {end:.2f}" for start, end in a.moments)
        lines.append(f"{a.video} {times} {' '.join(re.findall('[a-z0-9]+', a.sentence.lower()))}")
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogatepass")).hexdigest()[:16]


def protocol_of(path: Path, annotations: Sequence[Annotation]) -> str:
    """Name the protocol of annotations, which belongs beside every number made with them.

    A published split is recognised by its content. Any other file is named with whether it keeps
    queries that end past their video, by which the two protocols of Charades-STA differ.
    """
    if known := PUBLISHED.get(fingerprint(annotations)):
        return known
    if any(a.duration_seconds is None for a in annotations):
        late = "durations unknown"
    elif count := sum(a.ends_late for a in annotations):
        late = f"official: {count} late ends kept"
    else:
        late = "cpl: no late ends"
    return f"{path.name} ({len(annotations)} queries, {late})"
