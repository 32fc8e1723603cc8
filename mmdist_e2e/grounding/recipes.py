"""Named functions that return a complete config: the network, its loss, and its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mmdist_e2e.grounding.losses import LossConfig
from mmdist_e2e.grounding.models import GlobalConfig
from mmdist_e2e.structures import MmdistError

# CPL's diversity term was tuned at N = 50 kept frames. λ·(N - 1) is what sets moment length
# (widths of σ/(2√π·λ·(N - 1)) = 0.355 of the video on Charades-STA), so it is held as N changes.
REFERENCE_STEPS = 49
MINIMUM_KEPT_FRAMES = 40


@dataclass(frozen=True)
class TrainingConfig:
    """How a recipe is trained.

    warmup_updates: None means the smaller of 400 and a tenth of all updates.
    precision: "fp32" or "bf16" (autocast).
    select_by: "val_recall" picks the epoch by R@1 at IoU 0.5 and so uses validation timestamps;
    "val_loss" uses none; "last" uses no validation at all.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 4e-4
    warmup_updates: int | None = None
    gradient_norm: float = 10.0
    precision: str = "bf16"
    select_by: str = "val_recall"

    def __post_init__(self) -> None:
        for name, valid in (
            ("precision", ("fp32", "bf16")),
            ("select_by", ("val_recall", "val_loss", "last")),
        ):
            if getattr(self, name) not in valid:
                raise MmdistError(
                    f"{name} {getattr(self, name)!r} is unknown; valid: {', '.join(valid)}."
                )
        if self.epochs < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise MmdistError("epochs and batch_size must be at least 1, learning_rate above 0.")


@dataclass(frozen=True)
class Recipe:
    """A complete config under a name."""

    name: str
    model: GlobalConfig
    loss: LossConfig
    training: TrainingConfig

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Recipe:
        return cls(
            raw["name"],
            GlobalConfig(**raw["model"]),
            LossConfig(**raw["loss"]),
            TrainingConfig(**raw["training"]),
        )

    def overridden(self, values: Mapping[str, Any]) -> Recipe:
        """With some fields changed, by their names.

        Raises MmdistError for an unknown name and for a value of another kind.
        """
        parts: dict[str, dict[str, Any]] = {"model": {}, "loss": {}, "training": {}}
        homes = {f.name: part for part in parts for f in fields(getattr(self, part))}
        for name, value in values.items():
            if name not in homes:
                raise MmdistError(
                    f"The recipe '{self.name}' has no setting {name!r}; valid: "
                    f"{', '.join(sorted(homes))}."
                )
            now = getattr(getattr(self, homes[name]), name)
            parts[homes[name]][name] = _like(name, now, value)
        return replace(
            self,
            model=replace(self.model, **parts["model"]),
            loss=replace(self.loss, **parts["loss"]),
            training=replace(self.training, **parts["training"]),
        )


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


def cpl(*, feature_dim: int, word_dim: int, vocabulary_size: int, length: int = 64) -> Recipe:
    """CPL (Zheng et al., CVPR 2022) with the values it uses on Charades-STA."""
    # CPL's divisor 4 keeps 50 of 200 frames; shorter videos keep more of them, in quarters.
    divisor = min(4.0, max(1.0, int(4 * length / MINIMUM_KEPT_FRAMES) / 4))
    model = GlobalConfig(
        feature_dim=feature_dim,
        word_dim=word_dim,
        vocabulary_size=vocabulary_size,
        length=length,
        frame_divisor=divisor,
    )
    steps = model.kept_frames - 1
    loss = LossConfig(
        diversity_prior=0.146 * REFERENCE_STEPS / steps,
        diversity_weight=5.0 * (steps / REFERENCE_STEPS) ** 2,
    )
    return Recipe("cpl", model, loss, TrainingConfig())


RECIPES: dict[str, Callable[..., Recipe]] = {"cpl": cpl}


def get_recipe(name: str) -> Callable[..., Recipe]:
    """The recipe function of a name. Raises MmdistError for an unknown one."""
    if name not in RECIPES:
        raise MmdistError(f"There is no recipe {name!r}; valid: {', '.join(sorted(RECIPES))}.")
    return RECIPES[name]
