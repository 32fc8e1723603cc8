"""Every setting of a grounding network and its training, and the recipes and presets of them.

The defaults are the paper's or, where it gives none, CPL's, both on Charades-STA. A comment beside
a setting gives its symbol in the paper (or CPL). Its type gives its valid values, which are checked
when it is set. This file imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from mmdist_e2e.structures import MmdistError, check_choice


class Range(NamedTuple):
    """The valid range of a number. NaN and infinity are never valid."""

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.at_least <= value and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {n}" for word, n in bounds.items() if math.isfinite(n))


Count = Annotated[int, Range(at_least=1)]
Positive = Annotated[float, Range(above=0)]
Weight = Annotated[float, Range(at_least=0)]


class Settings:
    """The base of all parts of a recipe; raises MmdistError for a value that is not valid."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            check_setting(name, getattr(self, name), hint)


def check_setting(name: str, value: Any, hint: Any) -> None:
    """Raises MmdistError for a value that is not of the type and range that `hint` gives."""
    origin, options = get_origin(hint), get_args(hint)
    if hint is bool and not isinstance(value, bool):
        raise MmdistError(f"{name} must be true or false; got {value!r}.")
    if origin is Literal:
        check_choice(name, value, options)
    elif origin is tuple:
        for each in value:
            check_setting(name, each, options[0])
    elif origin is Annotated:
        kind, valid = options
        number = isinstance(value, int if kind is int else int | float)
        if not number or isinstance(value, bool) or not valid.holds(value):
            what = "a whole number" if kind is int else "a finite number"
            raise MmdistError(f"{name} must be {what} {valid}; got {value!r}.")
    elif options and value is not None:  # a setting that may be None
        check_setting(name, value, options[0])


@dataclass(frozen=True)
class GlobalConfig(Settings):
    """The shape of the global branch, which is CPL's network."""

    feature_dim: Count  # F, channels of the features
    word_dim: Count  # E, channels of the word vectors
    vocabulary_size: Count  # V - 1, words that can be predicted
    length: Count = 200  # L, positions of a video
    hidden: Annotated[int, Range(at_least=4)] = 256  # D
    heads: Count = 4
    layers: Count = 3  # of each of the two stacks
    feed_forward: Count = 512
    proposals: Count = 8  # K
    sharpness: Positive = 9.0  # σ: a proposal's mask has the deviation max(w, 0.01)/σ
    frame_divisor: Annotated[float, Range(at_least=1)] = 4.0  # N = L // frame_divisor
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept_frames < 2:
            raise MmdistError(
                f"frame_divisor {self.frame_divisor} keeps {self.kept_frames} of {self.length} "
                f"positions, and at least 2 are needed; lower the frame divisor."
            )
        if self.hidden % (2 * self.heads):
            raise MmdistError(
                f"hidden must be a multiple of twice the heads ({self.heads}); got {self.hidden}."
            )

    @property
    def kept_frames(self) -> int:
        """N, the frames that reconstruction reads."""
        return int(self.length // self.frame_divisor)


@dataclass(frozen=True)
class LocalConfig(Settings):
    """The shape of a local branch, and its weight when proposals are ranked.

    query: q is the mean of the "content" words (of all where there is none), or of all words.
    ranking: γ multiplies the mean of m "inside" a proposal (Eq. 9), or its "contrast" to the rest
    of the video (`answer.mean_activation`).
    """

    depth: Count = 2  # convolutions over positions, a ReLU between two
    kernel: Count = 3  # positions that a convolution reads, an odd number
    query: Literal["content", "mean"] = "content"
    score_weight: Weight = 3.0  # γ of Eq. 9; 0 ranks by reconstruction alone
    ranking: Literal["contrast", "inside"] = "inside"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise MmdistError(f"kernel must be an odd number; got {self.kernel}.")


@dataclass(frozen=True)
class LossConfig(Settings):
    """Weights and margins of the global loss; the defaults are CPL's on Charades-STA.

    A weight of 0 switches its term off. Eq. 3 has reconstruction_weight = whole_weight =
    contrast_weight = 1.
    """

    reconstruction_weight: Weight = 0.5  # of L_rec[k*]
    whole_weight: Weight = 0.5  # of L_rec of the whole video
    contrast_weight: Weight = 1.0  # α₁ of CPL, of all hinges
    contrast_whole: bool = True  # the hinge to the whole video
    diversity_weight: Weight = 5.0  # α₂ of CPL
    diversity_prior: Weight = 0.146  # λ, at N = 50
    margin_whole: Weight = 0.1  # ξ of Eq. 3
    margin_negatives: Weight = 0.15
    negatives: bool = True  # the two hinges to CPL's negatives
    negative_growth: Weight = 0.5  # γ_neg: ratio = (epoch / epochs) ** γ_neg


@dataclass(frozen=True)
class MatchingConfig(Settings):
    """The local loss, Eqs. 5-8."""

    local_weight: Weight = 4.5  # α of Eq. 8; 0 switches the local loss off
    top_divisor: Annotated[float, Range(at_least=1)] = 4.0  # L_T = L // top_divisor
    temperature: Positive = 0.15  # τ


@dataclass(frozen=True)
class MutualConfig(Settings):
    """The teacher's local branches, Eqs. 13 and 14."""

    channels: tuple[Count, ...]  # of each modality, in the order of the features
    mutual_weight: Weight = 1.0  # μ; 0 switches L_mutual off

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))  # JSON has lists only
        super().__post_init__()
        if len(self.channels) != 2:
            raise MmdistError(
                f"A teacher reads two modalities; these features have {len(self.channels)}."
            )


@dataclass(frozen=True)
class DistillConfig(Settings):
    """What a student takes from its teacher, Eqs. 10-12."""

    distill_weight: Weight = 0.9  # β
    distill_global: bool = True  # Eq. 10
    distill_local: bool = True  # Eq. 11


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """How a recipe is trained.

    select_by: "val_loss" picks the epoch that rebuilds validation sentences best; "val_recall" the
    one of highest R@1 at IoU 0.5, which reads timestamps and varies much with few queries; "last"
    uses no validation.
    """

    epochs: Count = 30
    batch_size: Count = 32
    learning_rate: Positive = 4e-4
    # None: a tenth of all updates, at most 400.
    warmup_updates: Annotated[int, Range(at_least=0)] | None = 400
    # The most frequent training words, which alone can be predicted; None: all.
    vocabulary_limit: Count | None = 1111
    gradient_norm: Positive = 10.0  # gradients are clipped to this norm
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast
    select_by: Literal["val_loss", "val_recall", "last"] = "val_loss"

    def warmup(self, queries: int) -> int:
        """The updates of warmup, of so many training queries."""
        if self.warmup_updates is not None:
            return self.warmup_updates
        return min(400, max(1, math.ceil(queries / self.batch_size) * self.epochs // 10))


# Settings that older checkpoints hold, and the only value that is still supported.
SETTLED: dict[str, Any] = {
    "scored_words": "all",
    "relu_last": False,
    "own_frames": False,
    "same_video_negatives": False,
    "same_sentence_negatives": False,
    "mutual_distance": "l1",
    "taught_map": "mean",
    "student_proposal": "iou",
    "distill_distance": "l1",
}

# Part of the configuration, but set by the data.
GIVEN = ("feature_dim", "word_dim", "vocabulary_size", "channels")


@dataclass(frozen=True)
class Recipe:
    """A complete configuration under a name."""

    name: str
    model: GlobalConfig
    loss: LossConfig
    training: TrainingConfig
    local: LocalConfig | None = None  # None, like `matching`, without a local branch
    matching: MatchingConfig | None = None
    mutual: MutualConfig | None = None  # a teacher's
    distill: DistillConfig | None = None  # a student's

    def __post_init__(self) -> None:
        assert (self.local is None) == (self.matching is None)
        untrained = self.matching and not self.matching.local_weight
        if untrained and self.local and self.local.score_weight:
            raise MmdistError(
                "local_weight 0 leaves the activation map untrained, so it must not rank either; "
                "set score_weight to 0 too."
            )

    @property
    def parts(self) -> dict[str, Any]:
        """The parts that hold this recipe's settings, by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, Settings)}

    @property
    def homes(self) -> dict[str, str]:
        """The name of every setting, and of the part that holds it."""
        names = {f.name: part for part, held in self.parts.items() for f in fields(held)}
        return {name: part for name, part in names.items() if name not in GIVEN}

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its name, without what follows from the training data."""
        parts = self.parts
        return {"recipe": self.name, **{n: getattr(parts[p], n) for n, p in self.homes.items()}}

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **{name: asdict(part) for name, part in self.parts.items()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Recipe:
        """The recipe of a checkpoint. An older one may hold the settings in `SETTLED`.

        Raises MmdistError when one of these has another value than the supported one.
        """
        parts: dict[str, Any] = {}
        for part in (part for part in PARTS if part in raw):
            settings = dict(raw[part])
            for name, supported in SETTLED.items():
                if (value := settings.pop(name, supported)) != supported:
                    raise MmdistError(
                        f"This model was trained with {name}={value!r}, and this version supports "
                        f"{supported!r} only; train it again."
                    )
            parts[part] = PARTS[part](**settings)
        return cls(raw["name"], **parts)

    def fitted(self, *, channels: Sequence[int], **sizes: int) -> Recipe:
        """With the sizes of the data, as of `cpl`."""
        mutual = self.mutual and replace(self.mutual, channels=tuple(channels))
        return replace(self, model=replace(self.model, **sizes), mutual=mutual)

    def overridden(self, values: Mapping[str, Any]) -> Recipe:
        """With some settings changed, by their names.

        Raises MmdistError for an unknown name and for a value that is not valid.
        """
        homes, parts, settings = self.homes, self.parts, self.settings
        changes: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if name not in homes:
                raise MmdistError(
                    f"The recipe '{self.name}' has no setting {name!r}; valid: "
                    f"{', '.join(sorted(homes))}."
                )
            now = settings[name]
            if isinstance(now, bool):
                words = {"true": True, "false": False, "1": True, "0": False}
                value = words.get(str(value).lower(), value)
            elif isinstance(now, float) and type(value) is int:
                value = float(value)
            elif value == "none":
                value = None
            changes.setdefault(homes[name], {})[name] = value
        return replace(self, **{p: replace(parts[p], **new) for p, new in changes.items()})


PARTS: dict[str, type[Any]] = {
    "model": GlobalConfig,
    "loss": LossConfig,
    "training": TrainingConfig,
    "local": LocalConfig,
    "matching": MatchingConfig,
    "mutual": MutualConfig,
    "distill": DistillConfig,
}

# CPL's diversity term was tuned at N = 50 kept frames. λ·(N - 1) sets the length of moments
# (widths of σ/(2√π·λ·(N - 1)) = 0.355 of the video on Charades-STA), so it is kept as N changes.
REFERENCE_STEPS = 49
MINIMUM_KEPT_FRAMES = 40


# The settings of each part that differ from the defaults; λ and α₂ are those at N = 50.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {},
    "paper-activitynet": {  # the paper's or CPL's values on ActivityNet Captions
        "loss": {
            "contrast_weight": 2.0,
            "diversity_weight": 0.1,
            "diversity_prior": 0.13,
            "negative_growth": 0.0,
        },
        "training": {"vocabulary_limit": 8000},
    },
    "small": {  # chosen on few queries (docs/method.md)
        "model": {"length": 64, "hidden": 128, "feed_forward": 256, "dropout": 0.3},
        "local": {"ranking": "contrast"},
        "training": {"warmup_updates": None, "vocabulary_limit": None},
    },
}

# The settings of which neither the paper nor CPL's code gives a value: the defaults are ours.
OURS = (
    "query", "depth", "kernel", "top_divisor", "temperature", "mutual_weight", "precision",
    "select_by",
)  # fmt: skip

FEW_QUERIES = 5000  # Charades-STA has 12,408 to train on
ON_FEW_QUERIES = (  # measured as docs/method.md says, under "Presets"
    "On 1,910 queries of real Charades-STA videos with CLIP features, `--preset small` had a "
    "R@1 of 39.9 at IoU 0.5 (3 seeds) and `--preset paper` 41.1 (2 seeds): no clear difference, "
    "but `small` is a smaller network on 64 positions, which trains faster."
)


def advice(preset: str, queries: int) -> str | None:
    """What a person should know who trains on so few queries with a preset of the paper."""
    if preset == "small" or queries >= FEW_QUERIES:
        return None
    return f"There are only {queries} training queries. {ON_FEW_QUERIES}"


def cpl(
    *, preset: str = "paper", length: int | None = None, channels: Sequence[int] = (), **sizes: int
) -> Recipe:
    """CPL (Zheng et al., CVPR 2022).

    length: L, by default the preset's.
    channels: of each modality; only a teacher tells the modalities apart.
    sizes: feature_dim, word_dim and vocabulary_size of `GlobalConfig`.
    Raises MmdistError for an unknown preset, and for a length that is not valid.
    """
    check_choice("The preset", preset, list(PRESETS))
    model, loss, training = (PRESETS[preset].get(p, {}) for p in ("model", "loss", "training"))
    model = sizes | model | ({} if length is None else {"length": length})
    # CPL's divisor 4 keeps 50 of 200 frames; shorter videos keep more of them, in quarters.
    L = GlobalConfig(**model, frame_divisor=1).length
    divisor = min(4.0, max(1.0, int(4 * L / MINIMUM_KEPT_FRAMES) / 4))
    shape, terms = GlobalConfig(**model, frame_divisor=divisor), LossConfig(**loss)
    steps = shape.kept_frames - 1
    terms = replace(
        terms,
        diversity_prior=terms.diversity_prior * REFERENCE_STEPS / steps,
        diversity_weight=terms.diversity_weight * (steps / REFERENCE_STEPS) ** 2,
    )
    return Recipe("cpl", shape, terms, TrainingConfig(**training))


def baseline(*, preset: str = "paper", **shape: Any) -> Recipe:
    """The paper's single-modal baseline (Bao et al., AAAI 2024): both branches, Eqs. 1-9.

    shape: as of `cpl`, whose network, negatives and diversity it keeps.
    """
    standard = cpl(preset=preset, **shape)
    eq_3: Any = {"reconstruction_weight": 1.0, "whole_weight": 1.0, "contrast_weight": 1.0}
    return replace(
        standard,
        name="baseline",
        loss=replace(standard.loss, **eq_3),
        training=replace(standard.training, epochs=15),
        local=LocalConfig(**PRESETS[preset].get("local", {})),
        matching=MatchingConfig(),
    )


def teacher(*, channels: Sequence[int], **shape: Any) -> Recipe:
    """The paper's teacher of two modalities: the baseline's terms, Eqs. 13 and 14."""
    standard, mutual = baseline(**shape), MutualConfig(tuple(channels))
    training = replace(standard.training, learning_rate=3.5e-4)
    return replace(standard, name="teacher", training=training, mutual=mutual)


def student(**shape: Any) -> Recipe:
    """The paper's student: the baseline's network, taught by a teacher (Eqs. 10-12)."""
    standard = baseline(**shape)
    training = replace(standard.training, learning_rate=5e-4)
    return replace(standard, name="student", training=training, distill=DistillConfig())


RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe for recipe in (baseline, cpl, student, teacher)
}


def configure(
    name: str,
    *,
    preset: str = "paper",
    length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    modalities: int = 1,
) -> Recipe:
    """The recipe of a name and a preset with some settings changed; the data's sizes are all 1.

    Raises MmdistError for an unknown recipe, preset or setting, and for a value that is not valid.
    """
    check_choice("The recipe", name, list(RECIPES))
    settings = dict(settings or {})
    length, sizes = settings.pop("length", length), dict.fromkeys(GIVEN[:3], 1)
    made = RECIPES[name](preset=preset, length=length, channels=(1,) * modalities, **sizes)
    return made.overridden(settings)
