"""A workspace by convention: where commands look for what they are not given.

    videos/         clip.mp4, kitchen/one.mp4: their ids are clip and kitchen/one
    annotations/    train.txt, val.json, test.jsonl; glove.pkl or glove*.txt: word vectors;
                    durations*.json or durations*.csv: seconds by video
    features/       what mmdist extract or another program wrote
    runs/           RECIPE or RECIPE-seedN: what mmdist train wrote

Annotations are .txt, .json or .jsonl, and one word of a file's name tells its split (SPLITS).
Without a test split, val_1 and val_2 are validation and test. Where no name tells training, the
only file whose name tells no split is for training.

Features of a modality: what mmdist extract wrote into features/, an HDF5 file with `rgb` or `flow`
in its name, or the folder features/rgb or features/flow. Else the only HDF5 file without `flow` in
its name holds RGB, or else the files VIDEO.npy do. Where several files fit, the person chooses.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from mmdist_e2e.structures import MODALITIES, MmdistError
from mmdist_e2e.weights.registry import read_config

VIDEOS, ANNOTATIONS, FEATURES, RUNS = map(Path, ("videos", "annotations", "features", "runs"))
SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "dev"},
    "test": {"test", "testing"},
}
NO_ANNOTATIONS = ("durations", "glove", "license", "readme")  # how names of other files begin
RECIPES = ("student", "teacher", "baseline", "cpl")  # of runs, the preferred first

OPTIONS = {  # and arguments, by the names that commands have for them
    "paths": "PATHS", "runs": "RUNS", "teacher": "--teacher", "rgb": "--features",
    "flow": "--flow-features", "train": "--train", "val": "--val", "test": "--test",
    "annotations": "--annotations", "glove": "--glove", "durations": "--durations",
}  # fmt: skip

_LINES = "lines like: clip 2.0 6.5##person opens the door."
_RUN = "made, or resumed, by: mmdist train teacher"
NEEDED = {  # what it is, where a message says to put it, and how
    "paths": ("videos", "videos/", "your videos"),
    "runs": ("finished run", "runs/teacher/", _RUN),
    "teacher": ("finished teacher", "runs/teacher/", _RUN),
    "rgb": ("rgb features", "features/", "made by: mmdist extract videos/"),
    "flow": ("flow features", "features/", "made by: mmdist extract videos/ --modality rgb,flow"),
    "train": ("training annotations", "annotations/train.txt", _LINES),
    "annotations": ("test annotations", "annotations/test.txt", _LINES),
}


def _files(folder: Path, *suffixes: str, begin: str = "") -> list[Path]:
    """Files of a folder by suffix and the begin of their names, sorted, without hidden ones."""
    paths = sorted(folder.glob(f"{begin}*"))
    wanted = (p for p in paths if p.suffix.lower() in suffixes and not p.name.startswith("."))
    return [path for path in wanted if path.is_file()]


def _splits() -> dict[str, list[Path]]:
    """Annotation files by split."""
    found: dict[str, list[Path]] = {split: [] for split in (*SPLITS, "")}
    for path in _files(ANNOTATIONS, ".txt", ".json", ".jsonl"):
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", path.stem)}
        told = [split for split, names in SPLITS.items() if words & names]
        if not path.name.lower().startswith(NO_ANNOTATIONS):
            found[told[0] if len(told) == 1 else ""].append(path)
    if not found["test"] and [path.stem[-2:] for path in found["val"]] == ["_1", "_2"]:
        found["test"].append(found["val"].pop())
    return found | {"train": found["train"] or found[""]}


def _features(modality: str) -> list[Path]:
    """Where the features of a modality are."""

    def outside(folder: str, kind: str) -> list[Path]:
        found = FEATURES.rglob(f"*.{kind}")
        return [FEATURES] if any(p.relative_to(FEATURES).parts[0] != folder for p in found) else []

    own, files = FEATURES / modality, _files(FEATURES, ".hdf5", ".h5", ".hdf")
    places = outside(modality, f"{modality}.npz") + ([own] if own.is_dir() else [])
    places += [path for path in files if modality in path.stem.lower()]
    if places or modality == "flow":
        return places
    return [p for p in files if "flow" not in p.stem.lower()] or outside("flow", "npy")


def newest_run(*recipes: str) -> Path | None:
    """Of the first recipe that has finished runs, the one that was finished last.

    Raises MmdistError for a run whose config.json is damaged.
    """
    from mmdist_e2e.grounding.checkpoint import CONFIG, STATE, is_finished

    found: list[tuple[int, int, Path]] = []
    for run in (path.parent for path in RUNS.glob(f"*/{CONFIG}")):
        config = read_config(run)
        of_these = config.get("kind") == "grounding" and config.get("name") in recipes
        if of_these and is_finished(run):
            files = (run / CONFIG, run / STATE)  # a converted checkpoint has no state
            written = max(file.stat().st_mtime_ns for file in files if file.exists())
            found.append((-recipes.index(config["name"]), written, run))
    return max(found)[2] if found else None


def _candidates(name: str) -> list[Path]:
    """What fits an option or argument."""
    if name == "paths":
        return [VIDEOS] if VIDEOS.is_dir() else []
    if name in ("runs", "teacher"):
        run = newest_run(*(RECIPES if name == "runs" else [name]))
        return [run] if run else []
    if name in MODALITIES:
        return _features(name)
    if name == "glove":
        return _files(ANNOTATIONS, ".txt", ".pkl", begin=name)
    if name == "durations":
        return _files(ANNOTATIONS, ".json", ".csv", begin=name)
    splits = _splits()
    return splits["test"] or splits["val"] if name == "annotations" else splits[name]


def fill(command: str, given: dict[str, Any], *needed: str | tuple[str, ...]) -> str:
    """Set what is None or () in `given`, by the names of OPTIONS; a line on what was chosen.

    () takes all that fits. Flow is not looked for where the place of RGB is given. needed: what
    must be found; of a tuple, one. Raises MmdistError that tells at once all that is missing or
    not clear.
    """
    chosen, unclear = list[str](), dict[str, str]()
    names = [n for n in OPTIONS if n in given and not (n == "flow" and given.get("rgb"))]
    for name in (name for name in names if not given[name]):
        option, found = OPTIONS[name], _candidates(name)
        if isinstance(given[name], tuple):
            given[name] = tuple(found)
        elif len(found) > 1:
            unclear[name] = f"{option} could be {' or '.join(map(str, found))}: give one."
            continue
        elif found:
            given[name] = found[0]
        if name != "flow" or found != [given["rgb"]]:  # one store holds both
            flag = [option] * option.startswith("-")
            chosen += [shlex.join([*flag, str(path)]) for path in found]
    groups = [(group,) if isinstance(group, str) else group for group in needed]
    open_groups = [g for g in groups if g[0] in names and not any(given[n] for n in g)]
    missing = [group[0] for group in open_groups if not unclear.keys() & group]
    told, example = [f"mmdist {command} looked in {Path.cwd()}", *unclear.values()], ""
    if missing:
        kinds = ", ".join("{} ({})".format(*NEEDED[name]) for name in missing)
        told[0] += f" and did not find: {kinds}"
        told.append(f"Give {', '.join(OPTIONS[name] for name in missing)}, or make:")
        rows = {where: how for _, where, how in map(NEEDED.__getitem__, missing)}
        example = "".join(f"\n  {where:<24} {how}" for where, how in rows.items())
    told[0] += f". It found: {' '.join(chosen)}." if chosen else "."
    if missing or unclear:
        raise MmdistError(" ".join(told) + example)
    return f"Found in this folder: {' '.join(chosen)}" if chosen else ""
