"""Published annotations: fetched by name, and recognised by their content."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from mmdist_e2e.grounding.data.annotations import Annotation
from mmdist_e2e.store import check_out, staged
from mmdist_e2e.structures import check_choice
from mmdist_e2e.weights.download import Progress
from mmdist_e2e.weights.registry import ENTRIES, pulled_file

PAGES = {  # of the videos, by data set
    "charades-sta": "prior.allenai.org/projects/charades",
    "activitynet-captions": "activity-net.org",
}
VOCABULARIES = [name for name in ENTRIES if name.startswith("cpl-vocabulary-")]


def pull(name: str, out: Path, progress: Progress = None) -> list[str]:
    """Fetch the files of a data set by its name into the folder `out`, all or none of them.

    Returns lines to print: the files, what they are, where the videos are. Raises MmdistError for
    an unknown name, a failed download, a file of another digest than the known one, and where
    `out` holds another file of that name.
    """
    check_choice("The data set", name, [*PAGES, *VOCABULARIES])
    check_out(out)
    found = [entry for entry in ENTRIES.values() if f"{entry.name}-".startswith(f"{name}-")]
    lines = []
    with staged(out) as folder:
        folder.mkdir()
        for entry in found:
            file = Path(str(entry.url)).name.replace("_data", "")
            shutil.copyfile(pulled_file(entry.name, progress), folder / file)
            lines.append(f"{out / file}: {entry.facts}.")
    if name in PAGES:
        lines.append(f"Videos may not be redistributed; get them at {PAGES[name]}.")
    return lines


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
