"""Items and batches: annotations joined with features and words, padded, and masked.

Shape suffixes: B batch, L positions, F feature channels, W words, E word dimension, P mask
patterns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdist_e2e.grounding.data.annotations import Annotation, some
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import Sentence, Vocabulary, has_known_word
from mmdist_e2e.structures import MmdistError

CONTENT_WEIGHT = 2.0  # a word's logit when masks are drawn

OTHER_WEIGHT = 1.0


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

    Raises MmdistError when a duration is known neither from the annotations nor the features, and
    when a sentence has no word with a vector.
    """
    rows = table.rows
    durations = [a.duration_seconds or table.durations_seconds[a.video] for a in annotations]
    unknown = sorted({a.video for a, d in zip(annotations, durations, strict=True) if not d})
    if unknown:
        raise MmdistError(
            f"{len(unknown)} videos have no duration, neither in the annotations nor in the "
            f"features ({some(unknown)}); give --durations."
        )
    silent = [a for a in annotations if not has_known_word(a.sentence, vocabulary.vectors)]
    if silent:
        raise MmdistError(
            f"{len(silent)} of {len(annotations)} sentences have no word among the "
            f"{len(vocabulary.vectors.words)} words of '{vocabulary.vectors.name}', the first: "
            f"'{silent[0].sentence}' (video '{silent[0].video}'); leave them out of the "
            f"annotations, or give more word vectors with --glove."
        )
    return [
        Item(a, float(d), vocabulary.encode(a.sentence), rows[a.video])
        for a, d in zip(annotations, durations, strict=True)
        if d
    ]


@dataclass(frozen=True)
class Batch:
    """frames_BLF, words_BWE float32; ids_BW int64; is_word_BW, content_BW bool (False: padding).

    videos_B, sentences_B int64: equal numbers where two members share a video, or a sentence.
    Left out, all videos and sentences count as different. items_B: where the members stand among
    the items, by default from 0.
    """

    frames_BLF: Tensor
    words_BWE: Tensor
    ids_BW: Tensor
    is_word_BW: Tensor
    content_BW: Tensor
    videos_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    sentences_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    items_B: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        each_B = torch.arange(len(self.frames_BLF), device=self.frames_BLF.device)
        for name in ("videos_B", "sentences_B", "items_B"):
            if not len(getattr(self, name)):
                object.__setattr__(self, name, each_B)
            assert getattr(self, name).shape == each_B.shape

    def rows(self, index_B: Tensor) -> Batch:
        """Some members, with their padding."""
        return Batch(*(tensor[index_B] for tensor in vars(self).values()))


def collate(sentences: Sequence[Sentence], frames_BLF: Tensor, **more: Tensor) -> Batch:
    """Pad sentences to the longest of them; the batch lies where `frames_BLF` does.

    more: `videos_B` and `items_B` of the batch.
    """
    device = frames_BLF.device

    def pad(arrays: Iterable[NDArray[Any]]) -> Tensor:
        tensors = [torch.from_numpy(array) for array in arrays]
        return pad_sequence(tensors, batch_first=True).to(device)

    first: dict[tuple[str, ...], int] = {}
    same = [first.setdefault(s.tokens, i) for i, s in enumerate(sentences)]
    return Batch(
        frames_BLF,
        words_BWE=pad(s.vectors_WE for s in sentences),
        ids_BW=pad(s.ids_W for s in sentences),
        is_word_BW=pad(np.ones(len(s.tokens), bool) for s in sentences),
        content_BW=pad(s.content_W for s in sentences),
        sentences_B=torch.tensor(same, device=device),
        **more,
    )


def batches(
    items: Sequence[Item], table: FeatureTable, size: int, order: Sequence[int]
) -> Iterator[Batch]:
    """Batches of `size` items in this order, on the table's device; the last may be smaller."""
    for begin in range(0, len(order), size):
        indices = order[begin : begin + size]
        chosen = [items[i] for i in indices]
        device = table.data_VLF.device
        rows_B = torch.tensor([item.row for item in chosen], device=device)
        items_B = torch.tensor(indices, device=device)
        sentences = [item.sentence for item in chosen]
        yield collate(sentences, table.data_VLF[rows_B], videos_B=rows_B, items_B=items_B)


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
