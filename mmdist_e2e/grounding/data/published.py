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
from mmdist_e2e.weights.registry import CPL, ENTRIES

DIGESTS = {  # of CPL's annotations, as git objects
    "charades/train.json": "5f7e6554d1e101db7c08ff63144f379dfcebeac4",
    "charades/test.json": "5d9687e7d1c6977bbe6ae52c8075fa001a01be17",
    "activitynet/train_data.json": "debbd00e24bc7bf0595de5fd2effec5b48a7e32c",
    "activitynet/val_data.json": "d57356fceedf5580bee0afa06fa176e4fbb3ec3b",
    "activitynet/test_data.json": "2ea972a413add2523b0a17f71af4406dd4da511d",
}
PAGES = {"charades": "prior.allenai.org/projects/charades", "activitynet": "activity-net.org"}
DATASETS = {  # by name: their folder, and what they are
    "charades-sta": ("charades", "Charades-STA in CPL's rows (protocol cpl)"),
    "activitynet-captions": (
        "activitynet",
        "ActivityNet Captions in CPL's rows (protocol official; val is val_1, test is val_2)",
    ),
}
VOCABULARIES = ("cpl-vocabulary-charades", "cpl-vocabulary-activitynet")  # of the registry


def pull(name: str, out: Path) -> list[str]:
    """Fetch the files of a data set by its name into the folder `out`, all or none of them.

    A file that is there already is kept. Returns lines to print: the files, what they are, where
    the videos are. Raises MmdistError for an unknown name, a failed download, a file of another
    digest than the known one, and where `out` holds another file of that name.
    """
    check_choice("The data set", name, [*DATASETS, *VOCABULARIES])
    check_out(out)
    if name in VOCABULARIES:
        files, about = {out / "glove.pkl": ENTRIES[name]}, [f"{ENTRIES[name].facts}."]
    else:
        data, what = DATASETS[name]
        files = {
            out / Path(there).name.replace("_data", ""): Entry(
                there, "file", what, url=f"{CPL}/data/{there}", git_sha1=digest
            )
            for there, digest in DIGESTS.items()
            if there.startswith(data)
        }
        videos = f"Videos may not be redistributed; get them at {PAGES[data]}."
        about = [f"{what}.", videos]
    with staged(out) as folder:
        folder.mkdir()
        for path, entry in files.items():
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=folder) as downloads:
                    fetch(entry, Path(downloads)).replace(folder / path.name)
            elif not path.is_file() or git_blob_sha1(path) != entry.git_sha1:
                raise MmdistError(
                    f"{path} exists and is not that of {name}; move it, or give another --out."
                )
    return [*map(str, files), *about]


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
