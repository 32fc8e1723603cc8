"""Every setting of a grounding network and its training, and the recipes that fill them in.

Nothing but data: this file imports no torch.
Symbols of the paper and of CPL are given beside each setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mmdist_e2e.structures import MmdistError, check_choice


@dataclass(frozen=True)
class GlobalConfig:
    """The shape of a global branch. `feature_dim` F, `word_dim` E, `vocabulary_size` V - 1.

    length: L. frame_divisor: N = int(L // frame_divisor) frames are kept for reconstruction.
    sharpness: σ, a proposal's mask has the deviation max(w, 0.01)/σ.
    scored_words: the words of Eq. 1, "all" of a sentence as in CPL or the "masked" ones alone.
    """

    feature_dim: int
    word_dim: int
    vocabulary_size: int
    length: int
    hidden: int = 256
    heads: int = 4
    layers: int = 3
    feed_forward: int = 512
    proposals: int = 8
    sharpness: float = 9.0
    frame_divisor: float = 4.0
    dropout: float = 0.1
    scored_words: str = "all"

    def __post_init__(self) -> None:
        check_choice("scored_words", self.scored_words, ("all", "masked"))
        if self.kept_frames < 2:
            raise MmdistError(
                f"{self.length} positions divided by {self.frame_divisor} keep "
                f"{self.kept_frames} frames, and at least 2 are needed; lower the frame divisor."
            )
        if self.hidden % (2 * self.heads) or self.hidden < 4:
            raise MmdistError(
                f"{self.hidden} channels cannot be divided evenly among {self.heads} heads."
            )

    @property
    def kept_frames(self) -> int:
        """N."""
        return int(self.length // self.frame_divisor)


QUERIES = ("content", "mean", "last")

RANKINGS = ("contrast", "inside")


@dataclass(frozen=True)
class LocalConfig:
    """The shape of a local branch, and its weight when proposals are ranked.

    depth, kernel: convolutions over positions, a ReLU between two. relu_last: one after the last.
    own_frames: frames through a Linear of their own, not the global branch's.
    query: the mean of the "content" words (of all where there is none), the "mean" of all words,
    or the "last" position of the word stack (which has read them all).
    score_weight: γ of Eq. 9; 0 ranks by reconstruction alone.
    ranking: what γ multiplies, the mean "inside" a proposal as Eq. 9 has it, or its "contrast" to
    the rest of the video (`inference.mean_activation`).
    """

    depth: int = 2
    kernel: int = 3
    relu_last: bool = False
    own_frames: bool = False
    query: str = "content"
    score_weight: float = 3.0
    ranking: str = "contrast"

    def __post_init__(self) -> None:
        if self.depth < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise MmdistError(
                f"depth must be at least 1 and kernel an odd number; got {self.depth} and "
                f"{self.kernel}."
            )
        check_choice("query", self.query, QUERIES)
        check_choice("ranking", self.ranking, RANKINGS)
        if self.score_weight < 0:
            raise MmdistError(f"score_weight must not be negative; got {self.score_weight}.")


DISTANCES = ("l1", "l2", "norm")


@dataclass(frozen=True)
class LossConfig:
    """Weights and margins of the global loss; the defaults are CPL's on Charades-STA.

    A weight of 0 switches its term off; `contrast_whole` and `negatives` switch the hinges to the
    whole video and to CPL's two negatives, all of which `contrast_weight` multiplies. Eq. 3 has
    reconstruction_weight = whole_weight = contrast_weight = 1.
    """

    reconstruction_weight: float = 0.5  # of L_rec[k*]
    whole_weight: float = 0.5  # of L_rec of the whole video
    contrast_weight: float = 1.0  # α₁ of CPL
    contrast_whole: bool = True
    diversity_weight: float = 5.0  # α₂ of CPL
    diversity_prior: float = 0.146  # λ, at N = 50
    margin_whole: float = 0.1  # ξ of Eq. 3
    margin_negatives: float = 0.15
    negatives: bool = True
    negative_growth: float = 0.5  # γ_neg: ratio = (epoch / epochs) ** γ_neg


@dataclass(frozen=True)
class MatchingConfig:
    """The local loss, Eqs. 5-8.

    local_weight: α of Eq. 8; 0 switches the local loss off. top_divisor: L_T = L // top_divisor.
    temperature: τ. same_video_negatives, same_sentence_negatives: whether other sentences of a
    video, and equal sentences of other videos, stand against its own.
    """

    local_weight: float = 4.5
    top_divisor: float = 4.0
    temperature: float = 0.15
    same_video_negatives: bool = False
    same_sentence_negatives: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.top_divisor < 1 or self.local_weight < 0:
            raise MmdistError(
                f"temperature must be above 0, top_divisor at least 1 and local_weight not "
                f"negative; got {self.temperature}, {self.top_divisor} and {self.local_weight}."
            )


@dataclass(frozen=True)
class MutualConfig:
    """The teacher's local branches, Eqs. 13 and 14.

    channels: of each modality, in the order of the features. mutual_weight: μ; 0 switches L_mutual
    off. mutual_distance: φ, a kind of `map_distance`. taught_map: what L_local is of, the "mean"
    map m_T or the mean over "each" modality's own.
    """

    channels: tuple[int, ...]
    mutual_weight: float = 1.0
    mutual_distance: str = "l1"
    taught_map: str = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON knows lists alone
        check_choice("mutual_distance", self.mutual_distance, DISTANCES)
        check_choice("taught_map", self.taught_map, ("mean", "each"))
        if len(self.channels) != 2:
            raise MmdistError(
                f"A teacher reads two modalities; these features have {len(self.channels)}."
            )


@dataclass(frozen=True)
class DistillConfig:
    """What a student takes from its teacher, Eqs. 10-12.

    distill_weight: β. distill_global, distill_local: switches of Eqs. 10 and 11.
    student_proposal: which one learns that it is right: that of highest "iou" with the teacher's
    moment, the one of the same "index", or the "teacher"'s own span. distill_distance: φ, a kind
    of `map_distance`.
    """

    distill_weight: float = 0.9
    distill_global: bool = True
    distill_local: bool = True
    student_proposal: str = "iou"
    distill_distance: str = "l1"

    def __post_init__(self) -> None:
        check_choice("student_proposal", self.student_proposal, ("iou", "index", "teacher"))
        check_choice("distill_distance", self.distill_distance, DISTANCES)
        if self.distill_weight < 0:
            raise MmdistError(f"distill_weight must not be negative; got {self.distill_weight}.")


# CPL's diversity term was tuned at N = 50 kept frames. λ·(N - 1) is what sets moment length
# (widths of σ/(2√π·λ·(N - 1)) = 0.355 of the video on Charades-STA), so it is held as N changes.
REFERENCE_STEPS = 49

MINIMUM_KEPT_FRAMES = 40

# Charades-STA has 10,602 queries. With a sixth of them the papers' network overfits within a few
# epochs; below this number a smaller one, with more dropout, is the standard (docs/method.md).
FEW_QUERIES = 5000


@dataclass(frozen=True)
class TrainingConfig:
    """How a recipe is trained.

    warmup_updates: None means the smaller of 400 and a tenth of all updates.
    precision: "fp32" or "bf16" (autocast).
    select_by: "val_loss" picks the epoch that rebuilds validation sentences best, which takes no
    timestamps; "val_recall" the one of highest R@1 at IoU 0.5, which takes them and jumps about on
    few queries; "last" uses no validation at all.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 4e-4
    warmup_updates: int | None = None
    gradient_norm: float = 10.0
    precision: str = "bf16"
    select_by: str = "val_loss"

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("fp32", "bf16"))
        check_choice("select_by", self.select_by, ("val_loss", "val_recall", "last"))
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise MmdistError("epochs and batch_size must be at least 1, learning_rate above 0.")


@dataclass(frozen=True)
class Recipe:
    """A complete config under a name.

    local, matching: None without a local branch. mutual: a teacher's. distill: a student's.
    """

    name: str
    model: GlobalConfig
    loss: LossConfig
    training: TrainingConfig
    local: LocalConfig | None = None
    matching: MatchingConfig | None = None
    mutual: MutualConfig | None = None
    distill: DistillConfig | None = None

    def __post_init__(self) -> None:
        assert (self.local is None) == (self.matching is None)
        untrained = self.matching is not None and self.matching.local_weight == 0
        if untrained and self.local is not None and self.local.score_weight > 0:
            raise MmdistError(
                "local_weight 0 leaves the activation map untrained, so it must not rank either; "
                "set score_weight to 0 too."
            )

    @property
    def parts(self) -> dict[str, Any]:
        """The configs that hold this recipe's settings."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {name: part for name, part in named.items() if part is not None}

    @property
    def homes(self) -> dict[str, str]:
        """Every setting's name, and the part that holds it."""
        return {f.name: name for name, part in self.parts.items() for f in fields(part)}

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **{name: asdict(part) for name, part in self.parts.items()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Recipe:
        return cls(
            raw["name"],
            GlobalConfig(**raw["model"]),
            LossConfig(**raw["loss"]),
            TrainingConfig(**raw["training"]),
            LocalConfig(**raw["local"]) if "local" in raw else None,
            MatchingConfig(**raw["matching"]) if "matching" in raw else None,
            MutualConfig(**raw["mutual"]) if "mutual" in raw else None,
            DistillConfig(**raw["distill"]) if "distill" in raw else None,
        )

    def overridden(self, values: Mapping[str, Any]) -> Recipe:
        """With some fields changed, by their names.

        Raises MmdistError for an unknown name and for a value of another kind.
        """
        changes: dict[str, dict[str, Any]] = {}
        homes = self.homes
        for name, value in values.items():
            if name not in homes:
                raise MmdistError(
                    f"The recipe '{self.name}' has no setting {name!r}; valid: "
                    f"{', '.join(sorted(homes))}."
                )
            now = getattr(self.parts[homes[name]], name)
            changes.setdefault(homes[name], {})[name] = _like(name, now, value)
        changed = {name: replace(self.parts[name], **changes[name]) for name in changes}
        return replace(self, **changed)


def _like(name: str, now: Any, value: Any) -> Any:
    """`value` as what `now` is: a switch, a whole number, a number or a word."""
    if isinstance(now, bool):
        switch = {"true": True, "false": False, "1": True, "0": False}.get(str(value).lower())
        if switch is None:
            raise MmdistError(f"{name} is a switch: true or false; got {value!r}.")
        return switch
    if isinstance(now, float) and isinstance(value, int):
        return float(value)
    kind = int if now is None else type(now)
    if not isinstance(value, kind):
        raise MmdistError(f"{name} must be like {now!r}; got {value!r}.")
    return value


def cpl(
    *,
    feature_dim: int,
    word_dim: int,
    vocabulary_size: int,
    length: int = 64,
    queries: int | None = None,
    channels: Sequence[int] = (),
) -> Recipe:
    """CPL (Zheng et al., CVPR 2022) with the values it uses on Charades-STA.

    queries: how many are trained on; below `FEW_QUERIES` the network is smaller than CPL's.
    channels: of each modality; only a teacher tells them apart, any other recipe reads them all
    as one.
    """
    # CPL's divisor 4 keeps 50 of 200 frames; shorter videos keep more of them, in quarters.
    divisor = min(4.0, max(1.0, int(4 * length / MINIMUM_KEPT_FRAMES) / 4))
    model = GlobalConfig(
        feature_dim=feature_dim,
        word_dim=word_dim,
        vocabulary_size=vocabulary_size,
        length=length,
        frame_divisor=divisor,
    )
    if queries is not None and queries < FEW_QUERIES:
        model = replace(model, hidden=128, feed_forward=256, dropout=0.3)
    steps = model.kept_frames - 1
    loss = LossConfig(
        diversity_prior=0.146 * REFERENCE_STEPS / steps,
        diversity_weight=5.0 * (steps / REFERENCE_STEPS) ** 2,
    )
    return Recipe("cpl", model, loss, TrainingConfig())


def baseline(**shape: Any) -> Recipe:
    """The paper's single-modal baseline (Bao et al., AAAI 2024): both branches, Eqs. 1-9.

    shape: as of `cpl`, whose network, negatives and diversity it keeps. L_rec[k*], L_rec of the
    whole video and the hinge count 1 each (Eq. 3); α 4.5, γ 3, 15 epochs, learning rate 4e-4.
    """
    standard = cpl(**shape)
    return replace(
        standard,
        name="baseline",
        loss=replace(standard.loss, reconstruction_weight=1.0, whole_weight=1.0),
        training=TrainingConfig(epochs=15),
        local=LocalConfig(),
        matching=MatchingConfig(),
    )


def teacher(*, channels: Sequence[int], **shape: Any) -> Recipe:
    """The paper's teacher of two modalities: the baseline's terms, Eqs. 13 and 14.

    15 epochs, learning rate 3.5e-4.
    """
    plain = baseline(**shape)
    return replace(
        plain,
        name="teacher",
        training=replace(plain.training, learning_rate=3.5e-4),
        mutual=MutualConfig(tuple(channels)),
    )


def student(**shape: Any) -> Recipe:
    """The paper's student: the baseline's network, taught by a teacher (Eqs. 10-12).

    15 epochs, learning rate 5e-4, β 0.9.
    """
    plain = baseline(**shape)
    return replace(
        plain,
        name="student",
        training=replace(plain.training, learning_rate=5e-4),
        distill=DistillConfig(),
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    "baseline": baseline,
    "cpl": cpl,
    "student": student,
    "teacher": teacher,
}


def get_recipe(name: str) -> Callable[..., Recipe]:
    """The recipe function of a name. Raises MmdistError for an unknown one."""
    if name not in RECIPES:
        raise MmdistError(f"There is no recipe {name!r}; valid: {', '.join(sorted(RECIPES))}.")
    return RECIPES[name]
