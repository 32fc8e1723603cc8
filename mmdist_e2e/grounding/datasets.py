"""Annotations in, batches out.

Shape suffixes: V videos, L positions, F feature channels, B batch, W words, E word dimension.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdist_e2e.grounding.text import Sentence, Vocabulary
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import Features, MmdistError, Provenance, differences

NAMED_AT_MOST = 5  # so many offenders are named in a message, the rest are counted
CONTENT_WEIGHT = 2.0  # a word's logit when masks are drawn
OTHER_WEIGHT = 1.0


@dataclass(frozen=True)
class Annotation:
    """A sentence and where it happens, in seconds; `duration_seconds` None where not known yet."""

    video: str
    duration_seconds: float | None
    start: float
    end: float
    sentence: str


def load_annotations(path: Path, *, durations: Path | None = None) -> list[Annotation]:
    """Read `VID start end##sentence` lines (Charades-STA) or CPL rows.

    CPL rows: JSON [[video, duration, [start, end], sentence], …]. `durations`: a JSON file of
    seconds by video; without it Charades-STA's durations come from the features.
    Raises MmdistError naming the first bad line or row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        seconds = json.loads(durations.read_text()) if durations else {}
    except OSError as error:
        raise MmdistError(
            f"'{error.filename}' cannot be read ({error.strerror}); give an annotation file."
        ) from error
    except ValueError as error:
        raise MmdistError(
            f"'{durations or path}' is not readable text or JSON: {error}."
        ) from error
    is_json = text.lstrip().startswith("[") or path.suffix == ".json"
    annotations = _cpl_rows(path, text) if is_json else _charades_lines(path, text)
    if not annotations:
        raise MmdistError(f"'{path}' holds no annotations; give at least one line.")
    if not isinstance(seconds, dict):
        raise MmdistError(f"'{durations}' must map every video to its duration in seconds.")
    return [replace(a, duration_seconds=float(seconds[a.video])) if a.video in seconds else a
            for a in annotations]  # fmt: skip


def _check(path: Path, where: str, annotation: Annotation) -> Annotation:
    if not annotation.sentence.strip():
        raise MmdistError(f"{where} of '{path}' has no sentence.")
    if not 0 <= annotation.start <= annotation.end:
        raise MmdistError(
            f"{where} of '{path}' spans {annotation.start} to {annotation.end} seconds; a moment "
            f"starts at 0 or later and does not end before it starts."
        )
    return annotation


def _charades_lines(path: Path, text: str) -> list[Annotation]:
    annotations = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        head, separator, sentence = line.partition("##")
        fields = head.rsplit(maxsplit=2)  # a video's id may hold spaces
        try:
            video, start, end = fields
            parsed = Annotation(video, None, float(start), float(end), sentence.strip())
        except ValueError as error:
            raise MmdistError(
                f"Line {number} of '{path}' is not 'VIDEO start end##sentence'."
            ) from error
        if not separator:
            raise MmdistError(f"Line {number} of '{path}' is not 'VIDEO start end##sentence'.")
        annotations.append(_check(path, f"Line {number}", parsed))
    return annotations


def _cpl_rows(path: Path, text: str) -> list[Annotation]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise MmdistError(f"'{path}' is not readable JSON: {error}.") from error
    annotations = []
    for number, row in enumerate(rows, start=1):
        try:
            video, seconds, (start, end), sentence = row
            parsed = Annotation(str(video), float(seconds), float(start), float(end), str(sentence))
        except (TypeError, ValueError) as error:
            raise MmdistError(
                f"Row {number} of '{path}' is not [video, duration, [start, end], sentence]."
            ) from error
        annotations.append(_check(path, f"Row {number}", parsed))
    return annotations


def protocol_of(path: Path, annotations: Sequence[Annotation]) -> str:
    """Name the evaluation protocol of Charades-STA's test splits, else the file.

    Its two protocols differ in which queries are left out, and their numbers must not be mixed.
    """
    name = {3720: "charades_sta official", 3158: "charades_sta cpl"}.get(len(annotations))
    return name or f"{path.name} ({len(annotations)} queries)"


@dataclass(frozen=True)
class FeatureTable:
    """Features of many videos at L positions, resident as one tensor.

    data_VLF float32. matters: the provenance all of them share, which a model must agree with.
    """

    videos: tuple[str, ...]
    data_VLF: Tensor
    durations_seconds: Mapping[str, float | None]
    matters: Mapping[str, Any]
    modality: str

    @property
    def rows(self) -> dict[str, int]:
        return {video: row for row, video in enumerate(self.videos)}


def load_features(
    path: Path, videos: Sequence[str], *, modality: str = "rgb", length: int
) -> FeatureTable:
    """Features of `videos`, resampled to `length`, from our store or an HDF5 file.

    HDF5: one dataset [S, F] a video, or a group a video that holds `c3d_features`; durations are
    then None. Raises MmdistError when videos lack features (how many, and which first), or when
    their features were not made in one way.
    """
    wanted = sorted(set(videos))
    loaded = (
        _from_store(path, wanted, modality) if path.is_dir() else _from_hdf5(path, wanted, modality)
    )
    missing = [video for video in wanted if video not in loaded]
    if missing:
        raise MmdistError(
            f"{len(missing)} of {len(wanted)} videos have no {modality} features in '{path}' "
            f"({_some(missing)}); extract them first, or leave them out of the annotations."
        )
    first = loaded[wanted[0]]
    for video, features in loaded.items():
        unlike = differences(first.provenance.matters, features.provenance.matters)
        if unlike or features.data.shape[1] != first.data.shape[1]:
            unlike = unlike or [f"{features.data.shape[1]} channels, not {first.data.shape[1]}"]
            raise MmdistError(
                f"Features in '{path}' were not all made in one way: '{video}' differs from "
                f"'{wanted[0]}' ({'; '.join(unlike)}); extract them all alike."
            )
    data = np.stack([loaded[video].resample(length).data for video in wanted])
    external = str(first.provenance.matters.get("extractor", "")).startswith("external:")
    return FeatureTable(
        videos=tuple(wanted),
        data_VLF=torch.from_numpy(data),
        durations_seconds={
            v: None if external and not path.is_dir() else loaded[v].duration_seconds
            for v in wanted
        },
        matters=dict(first.provenance.matters),
        modality=modality,
    )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


def _from_store(path: Path, videos: Sequence[str], modality: str) -> dict[str, Features]:
    store = FeatureStore(path)
    return {v: store.load(v, modality) for v in videos if store.path(v, modality).is_file()}


def _from_hdf5(path: Path, videos: Sequence[str], modality: str) -> dict[str, Features]:
    if not path.is_file():
        raise MmdistError(f"There are no features at '{path}'; give a feature folder or HDF5 file.")
    try:
        import h5py
    except ImportError as error:
        raise MmdistError(
            f"Reading '{path}' needs h5py; run pip install 'mmdist-e2e[hdf5]'."
        ) from error
    loaded = {}
    try:
        with h5py.File(path, "r") as file:
            for video in videos:
                if video not in file:
                    continue
                node = file[video]
                data = (node["c3d_features"] if isinstance(node, h5py.Group) else node)[()]
                # An HDF5 file of features knows no times: they are even, in units of the video.
                edges = np.linspace(0.0, 1.0, len(data) + 1)
                loaded[video] = Features(
                    data=data.astype(np.float32),
                    times=np.stack([edges[:-1], edges[1:]], axis=1),
                    duration_seconds=1.0,
                    modality=modality,
                    provenance=Provenance.external("hdf5"),
                )
    except (OSError, KeyError) as error:
        raise MmdistError(f"'{path}' is not a readable HDF5 file of features: {error}.") from error
    return loaded


@dataclass(frozen=True)
class Item:
    """An annotation whose duration is known, its sentence encoded, its video's row in the table."""

    annotation: Annotation
    duration_seconds: float
    sentence: Sentence
    row: int


def make_items(
    annotations: Sequence[Annotation], table: FeatureTable, vocabulary: Vocabulary
) -> list[Item]:
    """Join annotations with features and words.

    Raises MmdistError when a duration is known neither from the annotations nor the features.
    """
    rows = table.rows
    durations = [a.duration_seconds or table.durations_seconds[a.video] for a in annotations]
    unknown = sorted({a.video for a, d in zip(annotations, durations, strict=True) if not d})
    if unknown:
        raise MmdistError(
            f"{len(unknown)} videos have no duration, neither in the annotations nor in the "
            f"features ({_some(unknown)}); give --durations."
        )
    return [
        Item(a, float(d), vocabulary.encode(a.sentence), rows[a.video])
        for a, d in zip(annotations, durations, strict=True)
        if d
    ]


@dataclass(frozen=True)
class Batch:
    """frames_BLF, words_BWE float32; ids_BW int64; is_word_BW, content_BW bool (False: padding)."""

    frames_BLF: Tensor
    words_BWE: Tensor
    ids_BW: Tensor
    is_word_BW: Tensor
    content_BW: Tensor


def collate(sentences: Sequence[Sentence], frames_BLF: Tensor) -> Batch:
    """Pad sentences to the longest of them."""
    longest = max(len(s.tokens) for s in sentences)
    words = np.zeros((len(sentences), longest, sentences[0].vectors_WE.shape[1]), np.float32)
    ids = np.zeros((len(sentences), longest), np.int64)
    is_word = np.zeros((len(sentences), longest), bool)
    content = np.zeros((len(sentences), longest), bool)
    for i, sentence in enumerate(sentences):
        count = len(sentence.tokens)
        words[i, :count] = sentence.vectors_WE
        ids[i, :count] = sentence.ids_W
        content[i, :count] = sentence.content_W
        is_word[i, :count] = True
    device = frames_BLF.device
    return Batch(
        frames_BLF,
        *(torch.from_numpy(array).to(device) for array in (words, ids, is_word, content)),
    )


def batches(
    items: Sequence[Item], table: FeatureTable, size: int, order: Sequence[int]
) -> Iterator[Batch]:
    """Batches of `size` items in the given order; the last may be smaller."""
    for begin in range(0, len(order), size):
        chosen = [items[i] for i in order[begin : begin + size]]
        rows = torch.tensor([item.row for item in chosen], device=table.data_VLF.device)
        yield collate([item.sentence for item in chosen], table.data_VLF[rows])


def draw_masks(batch: Batch, generator: torch.Generator) -> Tensor:
    """[B, W] bool: max(W // 3, 1) words of each sentence, drawn without replacement.

    A draw's probabilities are a softmax over the sentence's words of 2 for content words and 1
    for others; the largest of logits with Gumbel noise are exactly such a draw.
    """
    shape = tuple(batch.is_word_BW.shape)
    uniform = torch.rand(shape, generator=generator).clamp_min(1e-12).to(batch.is_word_BW.device)
    logits = torch.where(batch.content_BW, CONTENT_WEIGHT, OTHER_WEIGHT)
    keys = (logits - (-uniform.log()).log()).masked_fill(~batch.is_word_BW, float("-inf"))
    rank_BW = keys.argsort(dim=1, descending=True).argsort(dim=1)
    return (rank_BW < masked_count(batch.is_word_BW).unsqueeze(1)) & batch.is_word_BW


def masked_count(is_word_BW: Tensor) -> Tensor:
    """[B]: how many words of each sentence are masked at once."""
    return (is_word_BW.sum(dim=1) // 3).clamp_min(1)


def mask_patterns(is_word_BW: Tensor) -> tuple[Tensor, Tensor]:
    """The P masks of deterministic inference: pattern p masks the words with i mod P = p.

    P = ceil(W / max(W // 3, 1)) differs by sentence. Returns ([P', B, W] bool, [P', B] bool), P'
    the largest P; the second tells which patterns a sentence has.
    """
    words_B = is_word_BW.sum(dim=1)
    masked_B = masked_count(is_word_BW)
    patterns_B = (words_B + masked_B - 1) // masked_B
    index_W = torch.arange(is_word_BW.shape[1], device=is_word_BW.device)
    p_P11 = torch.arange(int(patterns_B.max()), device=is_word_BW.device)[:, None, None]
    masks_PBW = (index_W % patterns_B[:, None] == p_P11) & is_word_BW
    return masks_PBW, p_P11[:, :, 0] < patterns_B
