"""Published annotations: fetched by name, and recognised by their content."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.store import check_out, staged
from mmdist_e2e.structures import MmdistError, check_choice
from mmdist_e2e.weights.download import Entry, fetch, git_blob_sha1

CPL = "https://github.com/minghangz/cpl/raw/main/data/"
CHARADES_PAGE = "prior.allenai.org/projects/charades"
ACTIVITYNET_PAGE = "activity-net.org"


class Dataset(NamedTuple):
    """Files that `pull` fetches. what: names them; page: where their videos can be had."""

    what: str
    page: str
    files: Mapping[str, Entry]


def _files(**files: tuple[str, str]) -> dict[str, Entry]:
    """By name of the file to write: its path in CPL's repository and its id as a git object."""
    return {
        name.replace("_", "."): Entry(path, "public", "", url=CPL + path, git_sha1=digest)
        for name, (path, digest) in files.items()
    }


DATASETS = {
    "charades-sta": Dataset(
        "Charades-STA in CPL's rows (protocol cpl: without queries that end past their video)",
        CHARADES_PAGE,
        _files(
            train_json=("charades/train.json", "5f7e6554d1e101db7c08ff63144f379dfcebeac4"),
            test_json=("charades/test.json", "5d9687e7d1c6977bbe6ae52c8075fa001a01be17"),
        ),
    ),
    "activitynet-captions": Dataset(
        "ActivityNet Captions in CPL's rows (val: val_1, test: val_2; all queries)",
        ACTIVITYNET_PAGE,
        _files(
            train_json=("activitynet/train_data.json", "debbd00e24bc7bf0595de5fd2effec5b48a7e32c"),
            val_json=("activitynet/val_data.json", "d57356fceedf5580bee0afa06fa176e4fbb3ec3b"),
            test_json=("activitynet/test_data.json", "2ea972a413add2523b0a17f71af4406dd4da511d"),
        ),
    ),
    "cpl-vocabulary-charades": Dataset(
        "CPL's words and GloVe vectors for Charades-STA",
        CHARADES_PAGE,
        _files(glove_pkl=("charades/glove.pkl", "e0320a97dc583316c2b56ace462b1fafc326691b")),
    ),
    "cpl-vocabulary-activitynet": Dataset(
        "CPL's words and GloVe vectors for ActivityNet Captions",
        ACTIVITYNET_PAGE,
        _files(glove_pkl=("activitynet/glove.pkl", "4384500e128d5c450b4b8de9e46f34b1223f8e64")),
    ),
}

# Files that people have from elsewhere, by their ids as git objects.
AS_PUBLISHED = {
    "c4737d4f2877807cc9685724c69dd245697b1176": "Charades-STA train as published by Gao et al.",
    "9268d0e7cfeebea4927903a8692fe86fbd5c3f1c": "Charades-STA test as published by Gao et al.",
    "d727edfa135e5b271aa828e71fce87f3b645eadc": "ActivityNet Captions val_1 as published",
    "6de6c8688c86282dbf0789e8659ca3680a75f477": "ActivityNet Captions val_2 as published",
    "0caae4fb56974946104a303ddfcfd8f62c293e49": "Charades-CG train as published",
    "fa0f40d1bfba06171c0e91494a80ba6d46e166b1": "Charades-CG test-trivial as published",
    "049da90f80dd48ae5cf656198dc93939258e985b": "Charades-CG novel-composition as published",
    "811ee4ac1f4cbe3f8d3b68b1b6f6d6d1fc8dc9fd": "Charades-CG novel-word as published",
}


def published_as(path: Path) -> str:
    """What a file is, if it is a published one, byte for byte; else nothing."""
    digest = git_blob_sha1(path)
    own = {
        entry.git_sha1: f"{dataset.what}: {name}"
        for dataset in DATASETS.values()
        for name, entry in dataset.files.items()
    }
    return AS_PUBLISHED.get(digest) or own.get(digest, "")


def pull(name: str, out: Path) -> tuple[Dataset, list[Path]]:
    """Fetch the files of a data set by its name into the folder `out`, all or none of them.

    A file that is there already is kept. Raises MmdistError for an unknown name, a failed download,
    a file whose digest is not the known one, and where `out` holds another file of that name.
    """
    check_choice("The data set", name, list(DATASETS))
    dataset = DATASETS[name]
    places = {out / file: entry for file, entry in dataset.files.items()}
    for path, entry in places.items():
        if path.exists() and not (path.is_file() and git_blob_sha1(path) == entry.git_sha1):
            raise MmdistError(
                f"{path} exists and is not {name}; move it away, or give another folder with --out."
            )
    check_out(out)
    with staged(out) as folder:
        for path, entry in places.items():
            if not path.exists():
                folder.mkdir(exist_ok=True)
                with tempfile.TemporaryDirectory(dir=folder) as downloads:
                    fetch(entry, Path(downloads)).replace(folder / path.name)
    return dataset, list(places)


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
