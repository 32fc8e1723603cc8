"""Answering: proposals scored by Eq. 9 and ranked, and long videos read in windows.

A video much longer than those of training is read in half-overlapping windows whose moments are
merged: read whole, an hour would have a position per minute, and the diversity prior would ask
for moments of a third of it.

Shape suffixes: B batch, Q queries, K proposals, P mask patterns, W words, L positions, F channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmdist_e2e.grounding.config import Recipe
from mmdist_e2e.grounding.data.batches import Batch, Item, batches, collate, mask_patterns
from mmdist_e2e.grounding.data.features import FeatureTable
from mmdist_e2e.grounding.data.text import Sentence, Vocabulary, is_content_word
from mmdist_e2e.grounding.network import (
    GlobalBranch,
    GroundingNetwork,
    Proposals,
    reconstruction_loss,
)
from mmdist_e2e.structures import Features, MmdistError, Moment, differences

SYNTHETIC_WARNING = "trained on a drawn world: on real video this is a guess."
FEW = 8  # windows that one thread reads at least as fast as several


@dataclass
class GroundingModel:
    """A trained network and everything that it needs to answer.

    config: the checkpoint's config.json (recipe, seed, training data, how the epoch was chosen).
    """

    model: GroundingNetwork
    recipe: Recipe
    vocabulary: Vocabulary
    config: Mapping[str, Any]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that `answer` needs, in the order of the network's channels."""
        return tuple(self.config.get("modalities", self.config["features"]))

    @property
    def matters(self) -> Mapping[str, Mapping[str, Any]]:
        """By modality, the provenance that features must have."""
        return dict(self.config["features"])

    @property
    def name(self) -> str:
        """Recipe, seed, modalities and size."""
        return (
            f"{self.recipe.name} (seed {self.config['seed']}, {', '.join(self.modalities)}, "
            f"{self.recipe.model.hidden} channels)"
        )

    @property
    def trained_on(self) -> str:
        return str(self.config["trained_on"])

    @property
    def warning(self) -> str | None:
        """Where its answers are guesses: as its checkpoint says, or if trained on drawn video."""
        own: str | None = self.config.get("warning")
        return SYNTHETIC_WARNING if "synthetic world" in self.trained_on else own

    def check_table(self, table: FeatureTable) -> None:
        """`check_features` of every modality."""
        for modality, matters in table.matters.items():
            self.check_features(modality, matters)

    def check_features(self, modality: str, matters: Mapping[str, Any]) -> None:
        """Raises MmdistError when features were not made like those of training, saying how.

        A public model also accepts the features that its authors published.
        """
        is_published = matters in self.config.get("accepts", ())
        if not is_published and (unlike := differences(self.matters[modality], matters)):
            raise MmdistError(
                f"These {modality} features were not made as this model needs them: "
                f"{'; '.join(unlike)}; extract them again with the model's extractor and settings."
            )

    def check_query(self, query: str) -> Sentence:
        """The query as the network reads it.

        Raises MmdistError when it is empty, has no known word, or no word this model can rank by:
        reconstruction needs words of its vocabulary, an activation map any word with a vector.
        """
        sentence = self.vocabulary.encode(query)
        if not (sentence.ids_W > 0).any() and not self.model.score_weight:
            telling = [word for word in self.vocabulary.words if is_content_word(word)]
            raise MmdistError(
                f"None of the words of the query '{query}' occurs in the sentences that this model "
                f"was trained on, so it cannot rank moments for it; use words like "
                f"{', '.join(telling[:8])}."
            )
        return sentence

    def answer(self, features: Mapping[str, Features], query: str) -> list[Moment]:
        """All K proposals as moments in seconds, best first by the score of Eq. 9.

        features: by modality, as extracted. A video longer than 1.25 × the longest of training is
        read in windows, whose moments are merged: scores compare across them. Raises MmdistError
        for features of another kind and as `check_query`. The answer depends on no seed.
        """
        sentence = self.check_query(query)
        if missing := [m for m in self.modalities if m not in features]:
            raise MmdistError(
                f"This model needs {' and '.join(missing)} features; these are "
                f"{', '.join(sorted(features)) or 'none'}."
            )
        given = [features[modality] for modality in self.modalities]
        for modality, each in zip(self.modalities, given, strict=True):
            self.check_features(modality, each.provenance.matters)
        longest = float(self.config["longest_duration_seconds"])
        starts = window_starts(given[0].duration_seconds, longest)
        if len(starts) == 1:
            return self._read([given], sentence)[0]
        windows = [[cut(each, start, longest) for each in given] for start in starts]
        read = zip(starts, self._read(windows, sentence), strict=True)
        return merge(
            [Moment(m.start + start, m.end + start, m.score) for start, ms in read for m in ms]
        )

    def _read(self, videos: Sequence[Sequence[Features]], sentence: Sentence) -> list[list[Moment]]:
        """K moments of each video, best first; of a video its modalities, in the model's order."""
        if self.model.training:  # walking through all layers takes 10 % of a query
            self.model.eval()
        device, length = self.model.mask_vec.device, self.recipe.model.length
        answers: list[list[Moment]] = []
        for begin in range(0, len(videos), INFERENCE_BATCH):
            some = videos[begin : begin + INFERENCE_BATCH]
            data_BLF = np.stack(
                [np.concatenate([m.resample(length).data for m in v], axis=1) for v in some]
            )
            batch = collate([sentence] * len(some), torch.from_numpy(data_BLF).to(device))
            with one_thread() if device.type == "cpu" and len(videos) <= FEW else nullcontext():
                ranked = rank(predict_batch(self.model, batch))
            seconds_Q1 = np.array([[video[0].duration_seconds] for video in some])
            times = (ranked.starts * seconds_Q1, ranked.ends * seconds_Q1, ranked.scores)
            answers += [
                [Moment(*row) for row in rows] for rows in np.stack(times, axis=-1).tolist()
            ]
        return answers


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operations in one thread.

    A query is thousands of small operations. With several threads on busy cores each of them waits
    for the slowest, and a query takes seconds instead of milliseconds.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


LONG_RATIO = 1.25  # a video is long when it lasts this many times the longest training video
MERGE_IOU = 0.5  # moments of neighbouring windows that overlap more are one


def window_starts(duration_seconds: float, window_seconds: float) -> list[float]:
    """Starts of half-overlapping windows; the last one ends with the video.

    One window, at 0, for a video that is not long.
    """
    if duration_seconds <= LONG_RATIO * window_seconds:
        return [0.0]
    last = duration_seconds - window_seconds
    return [*np.arange(0.0, last, window_seconds / 2).tolist(), last]


def cut(features: Features, start: float, window_seconds: float) -> Features:
    """The snippets whose middle lies in the window (the nearest one where none does).

    Their times count from the window's start, and its length is their duration.
    """
    middles = features.times.mean(axis=1)
    inside = (middles >= start) & (middles < start + window_seconds)
    if not inside.any():
        inside[np.abs(middles - start - window_seconds / 2).argmin()] = True
    return replace(
        features,
        data=features.data[inside],
        times=features.times[inside] - start,
        duration_seconds=window_seconds,
    )


def merge(moments: Sequence[Moment]) -> list[Moment]:
    """Non-maximum suppression: best first, none that overlaps a better one by IoU > 0.5."""
    kept: list[Moment] = []
    for moment in sorted(moments, key=lambda m: -m.score):
        if all(_iou(moment, other) <= MERGE_IOU for other in kept):
            kept.append(moment)
    return kept


def _iou(a: Moment, b: Moment) -> float:
    shared = max(0.0, min(a.end, b.end) - max(a.start, b.start))
    union = (a.end - a.start) + (b.end - b.start) - shared
    return shared / union if union > 0 else 0.0


INFERENCE_BATCH = 32
Progress = Callable[[str, int, int], None]  # what, done, of how many


class Scored(NamedTuple):
    """K proposals of B queries, unranked, [B, K] each: losses_BK is r_p, scores_BK s_p of Eq. 9."""

    centers_BK: Tensor
    widths_BK: Tensor
    losses_BK: Tensor
    scores_BK: Tensor


@dataclass(frozen=True)
class Predictions:
    """K spans per query, best first, [Q, K] each.

    starts, ends in [0, 1] of the video; scores of Eq. 9; losses: the reconstruction losses r_p.
    """

    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    scores: NDArray[np.float64]
    losses: NDArray[np.float64]


def spans(centers: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ends of proposals in [0, 1]: max(c - w/2, 0) and min(c + w/2, 1)."""
    return (centers - widths / 2).clamp_min(0), (centers + widths / 2).clamp_max(1)


def mean_activation(
    maps_BL: Tensor, starts_BK: Tensor, ends_BK: Tensor, *, contrast: bool = False
) -> Tensor:
    """The mean of Eq. 9, [B, K]: of m over the snippets floor(s·L) … ceil(e·L) - 1.

    At least one snippet, the last one for a span at the video's end. contrast: plus by how much
    the mean over the rest falls short of the mean over the whole video. Within a video that ranks
    by inside minus outside; between videos, or windows of one, it still tells which fits at all.
    """
    length = maps_BL.shape[1]
    first_BK1 = (starts_BK * length).floor().clamp_max(length - 1).unsqueeze(-1)
    stop_BK1 = (ends_BK * length).ceil().unsqueeze(-1).maximum(first_BK1 + 1)
    index_L = torch.arange(length, device=maps_BL.device)
    inside_BKL = (index_L >= first_BK1) & (index_L < stop_BK1)
    total_BK = torch.where(inside_BKL, maps_BL.unsqueeze(1), 0).sum(-1)
    count_BK = inside_BKL.sum(-1)
    mean_BK = total_BK / count_BK
    if not contrast:
        return mean_BK
    video_B1 = maps_BL.sum(-1, keepdim=True)
    rest_BK = (video_B1 - total_BK) / (length - count_BK)
    short_BK = video_B1 / length - rest_BK
    return mean_BK + torch.where(count_BK < length, short_BK, 0)


def proposal_scores(activation_BK: Tensor, losses_BK: Tensor, weight: float) -> Tensor:
    """Eq. 9, [B, K]: s_p = γ · `mean_activation` - r_p."""
    return weight * activation_BK - losses_BK


@torch.inference_mode()
def predict_batch(model: GlobalBranch, batch: Batch) -> Scored:
    """Proposals and their scores; the model must be in eval mode. No seed enters."""
    proposals = model.propose(batch.frames_BLF, batch.words_BWE, batch.is_word_BW)
    return score_proposals(model, batch, proposals)


@torch.inference_mode()
def score_proposals(model: GlobalBranch, batch: Batch, proposals: Proposals) -> Scored:
    """`predict_batch` of proposals that were already made."""
    assert not model.training
    centers_BK, widths_BK = proposals.centers_BK, proposals.widths_BK
    losses_BK = mean_reconstruction(model, batch, proposals)
    scores_BK = -losses_BK
    if isinstance(model, GroundingNetwork) and model.score_weight:
        maps_BL = model.activate(batch, proposals)
        activation_BK = mean_activation(
            maps_BL, *spans(centers_BK, widths_BK), contrast=model.ranks_by_contrast
        )
        scores_BK = proposal_scores(activation_BK, losses_BK, model.score_weight)
    return Scored(centers_BK, widths_BK, losses_BK, scores_BK)


def mean_reconstruction(model: GlobalBranch, batch: Batch, proposals: Proposals) -> Tensor:
    """r_p, [B, K]: Eq. 1 averaged over the sentence's P mask patterns.

    The frames are encoded once for all patterns.
    """
    masks = model.proposal_masks(proposals.centers_BK, proposals.widths_BK)
    memory = model.remember(proposals.kept_BND, masks)
    total_BK = torch.zeros_like(proposals.centers_BK)
    count_B1 = torch.zeros_like(total_BK[:, :1])
    for masked_BW, has_B in zip(*mask_patterns(batch.is_word_BW), strict=True):
        logits_BKWV = model.reconstruct(proposals, masked_BW, memory)
        total_BK += has_B.unsqueeze(1) * reconstruction_loss(logits_BKWV, batch.ids_BW)
        count_B1 += has_B.unsqueeze(1)
    return total_BK / count_B1


def rank(scored: Scored) -> Predictions:
    """Proposals as spans, the highest score first; of equal ones the one proposed first."""
    centers, widths, losses, scores = (t.double().cpu() for t in scored)
    starts, ends = spans(centers, widths)
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    ranked = (np.take_along_axis(t.numpy(), order, axis=1) for t in (starts, ends, scores, losses))
    return Predictions(*ranked)


def predict(
    model: GlobalBranch,
    items: Sequence[Item],
    table: FeatureTable,
    *,
    progress: Progress | None = None,
) -> Predictions:
    """Answer every item in fp32. Sentences of similar length share a batch, which saves padding."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(items)), key=lambda i: len(items[i].sentence.tokens))
    outputs: list[Scored] = []
    done = 0
    for batch in batches(items, table, INFERENCE_BATCH, order):
        outputs.append(predict_batch(model, batch))
        done += len(batch.frames_BLF)
        if progress:
            progress("answering", done, len(items))
    model.train(was_training)
    ranked = rank(Scored(*(torch.cat(parts) for parts in zip(*outputs, strict=True))))
    back = np.argsort(order)
    return Predictions(*(values[back] for values in vars(ranked).values()))
