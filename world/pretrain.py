"""Train a small video network on short clips of the synthetic world (our Kinetics stand-in).

    python -m world pretrain --modality flow --out runs/world2/flow

Clips come from rooms and seeds of their own, never from a grounding video. The one logits layer
is read as two groups: the action, and the object that it is done with. Labels alone teach a
network this small very little in minutes, so training adds two auxiliary heads: in which cell of
a middle map each joint is, and how the joints move. The flow network learns from the same clips
and labels, but sees only their TV-L1 flow.

The same call gives the same bits on one machine; called again, a killed run resumes.
Shapes: B clips, T frames, C channels, K classes, P pose values.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import Preprocessing
from mmdist_e2e.extractors.runner import to_network
from mmdist_e2e.structures import MmdistError
from world.card import CHANNELS, INPUT_SIZE, write_extractor
from world.clips import ACTION_NAMES, OBJECT_NAMES
from world.clipset import (
    JOINTS,
    POSE_TARGETS,
    ClipSet,
    Progress,
    augment,
    batches,
    motion_targets,
    place_targets,
    render_clips,
)
from world.flowset import FLOW_PREPROCESSING, augment_flow, flow_clips, flow_windows
from world.resume import STATE, Run
from world.world import WORLD_VERSION

# Pretraining changes weights fast, so running statistics must follow faster than the release's.
BATCH_NORM_MOMENTUM = 0.1
PLACE_LAYER = "Mixed_3c"
# This share of the RGB stem's filters starts without a mean over time: they see only what moves.
MOVING_SHARE = 0.6
GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the weights.

    stages: (input size, epochs, smallest crop), in order; small inputs first because they cost
    a third, with crops that show things as large as the full size will. cycles: how often all
    stages are repeated, each time with a full cycle of the learning rate.
    """

    modality: str = "rgb"
    clips: int = 10_000
    validation_clips: int = 760
    seed: int = 0
    width: float = 0.25
    stages: tuple[tuple[int, int, float], ...] = ((64, 5, 0.6), (80, 1, 0.7), (112, 1, 0.85))
    cycles: int = 1
    batch: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    dropout: float = 0.2
    place_weight: float = 1.0
    motion_weight: float = 5.0


class Pretrainer(nn.Module):
    """The network and the two auxiliary heads of training."""

    def __init__(self, settings: PretrainSettings) -> None:
        super().__init__()
        classes = len(ACTION_NAMES) + len(OBJECT_NAMES)
        channels = CHANNELS[settings.modality]
        self.network = InceptionI3d(classes, channels, settings.width, dropout=settings.dropout)
        for module in self.network.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm3d):
                module.momentum = BATCH_NORM_MOMENTUM
        with torch.no_grad():
            stem = self.network.Conv3d_1a_7x7.conv3d.weight
            if settings.modality == "rgb":
                moving = round(MOVING_SHARE * len(stem))
                stem[:moving] -= stem[:moving].mean(dim=2, keepdim=True)
            else:
                # Most flow is far below its bound; BatchNorm's epsilon would swamp what comes out.
                stem *= FLOW_PREPROCESSING.bound
        for parameter in self.network.logits.parameters():
            nn.init.zeros_(parameter)
        middle = self.network.get_submodule(PLACE_LAYER).out_channels
        assert isinstance(middle, int)
        self.place = nn.Conv3d(middle, JOINTS, 1)
        self.motion = nn.Linear(self.network.feature_channels, POSE_TARGETS)

    def forward(self, frames_BCTHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, K], place maps [B, JOINTS, T', H', W'], motion [B, POSE_TARGETS]."""
        middle = None
        volume = frames_BCTHW
        for name in self.network.body:
            volume = self.network.get_submodule(name)(volume)
            if name == PLACE_LAYER:
                middle = self.place(volume)
        assert middle is not None
        pooled_BD = volume.mean(dim=(2, 3, 4))
        dropped = self.network.dropout(pooled_BD)[..., None, None, None]
        logits: Tensor = self.network.logits.conv3d(dropped)  # type: ignore[operator]
        return logits.flatten(1), middle, self.motion(pooled_BD)


def losses(
    model: Pretrainer, frames: Tensor, poses_BTP: Tensor, labels_B2: Tensor, s: PretrainSettings
) -> dict[str, Tensor]:
    """Cross-entropy of action and object, and the losses of the two auxiliary heads."""
    logits_BK, maps, motion = model(frames)
    smoothing, count = s.label_smoothing, len(ACTION_NAMES)
    cells = place_targets(poses_BTP, *maps.shape[2:])
    return {
        "action": F.cross_entropy(logits_BK[:, :count], labels_B2[:, 0], label_smoothing=smoothing),
        "object": F.cross_entropy(logits_BK[:, count:], labels_B2[:, 1], label_smoothing=smoothing),
        "place": s.place_weight
        * F.cross_entropy(maps.permute(0, 2, 1, 3, 4).flatten(3).flatten(0, 2), cells.flatten()),
        "motion": s.motion_weight * F.smooth_l1_loss(motion, motion_targets(poses_BTP), beta=0.3),
    }


def rgb_windows(clips_NTHWC: NDArray[Any]) -> Tensor:
    """Whole clips as the network reads them after training: [N, 3, T, size, size]."""
    clips = torch.from_numpy(np.array(clips_NTHWC))
    small_NHWC = Preprocessing(size=INPUT_SIZE)(clips.flatten(0, 1))
    return to_network(small_NHWC.view(*clips.shape[:2], *small_NHWC.shape[1:]))


def accuracy(network: InceptionI3d, clips: ClipSet) -> tuple[float, float, NDArray[np.int64]]:
    """Percent of actions and of objects classified correctly; confusion matrix of actions."""
    windows = rgb_windows if network.in_channels == CHANNELS["rgb"] else flow_windows
    network.eval()
    predicted = []
    with torch.inference_mode():
        for first in range(0, len(clips), 16):
            logits = network(windows(clips.clips_NTHWC[first : first + 16]))
            count = len(ACTION_NAMES)
            pair = [logits[:, :count].argmax(1), logits[:, count:].argmax(1)]
            predicted.append(torch.stack(pair, dim=1).numpy())
    network.train()
    hits = np.concatenate(predicted)
    confusion = np.zeros((len(ACTION_NAMES),) * 2, dtype=np.int64)
    np.add.at(confusion, (clips.labels_N2[:, 0], hits[:, 0]), 1)
    right = (hits == clips.labels_N2).mean(axis=0) * 100
    return float(right[0]), float(right[1]), confusion


def pretrain(
    out: Path, settings: PretrainSettings, *, cache: Path, workers: int, progress: Progress
) -> dict[str, Any]:
    """Render, train, validate, and write the checkpoint folder `out`; returns its figures.

    Every epoch saves a state in `out`, from which the same call resumes.
    Raises MmdistError when training diverges, or `out` holds a run with other settings.
    """
    make, augmented = (
        (render_clips, augment) if settings.modality == "rgb" else (flow_clips, augment_flow)
    )
    torch.manual_seed(settings.seed)
    # Values too small for the normal range slow a CPU down many times.
    torch.set_flush_denormal(True)
    clips = make(
        cache, seed=settings.seed, count=settings.clips, workers=workers, progress=progress
    )
    validation = make(
        cache,
        seed=settings.seed + 1,
        count=settings.validation_clips,
        workers=workers,
        progress=progress,
    )
    labels, poses = torch.from_numpy(clips.labels_N2), torch.from_numpy(clips.poses_NTP)
    generator = torch.Generator().manual_seed(settings.seed)
    model = Pretrainer(settings).to(memory_format=torch.channels_last_3d)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    cycle = [(size, crop) for size, count, crop in settings.stages for _ in range(count)]
    epochs = cycle * settings.cycles

    def one_cycle() -> Run:
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            settings.learning_rate,
            total_steps=len(cycle) * (settings.clips // settings.batch),
            pct_start=0.15,
            anneal_strategy="linear",
        )
        return Run(model, optimizer, schedule, generator)

    run = one_cycle()
    identity = {"world_version": WORLD_VERSION, **asdict(settings)}
    done = run.load(out / STATE, identity)
    if done:
        progress(f"resuming after epoch {done} of {len(epochs)}")
    started = time.monotonic()
    for epoch, (size, crop) in enumerate(epochs[done:], start=done + 1):
        sums: dict[str, float] = {}
        steps = 0
        if epoch > 1 and (epoch - 1) % len(cycle) == 0:
            run = one_cycle()
        for chosen in batches(settings.clips, settings.batch, generator):
            # fp32 throughout: torch's bf16 backward of these convolutions gave infinities.
            frames, poses_BTP = augmented(
                torch.from_numpy(clips.clips_NTHWC[chosen]),
                poses[chosen],
                size,
                generator,
                smallest_crop=crop,
            )
            terms = losses(model, frames, poses_BTP, labels[chosen], settings)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimizer.step()
            run.schedule.step()
            steps += 1
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item()
        means = ", ".join(f"{name} {value / steps:.3f}" for name, value in sums.items())
        if not all(math.isfinite(value) for value in sums.values()):
            raise MmdistError("Pretraining diverged; run it with another --seed and another --out.")
        run.save(out / STATE, identity, epoch)
        seconds = time.monotonic() - started
        progress(f"epoch {epoch} of {len(epochs)} at {size}²: {means}; {seconds:.0f} s")
    action, item, confusion = accuracy(model.network, validation)
    figures = {
        "validation_action_accuracy": round(action, 2),
        "validation_object_accuracy": round(item, 2),
        "action_confusion": confusion.tolist(),
    }
    progress(f"validation: actions {action:.1f} %, objects {item:.1f} %")
    write_extractor(out, model.network, settings, figures)
    return figures


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> None:
    """Command line of this module; see `--help`."""
    parser = argparse.ArgumentParser(description="Pretrain a small video network.")
    defaults = PretrainSettings()
    parser.add_argument("--modality", choices=tuple(CHANNELS), default=defaults.modality)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cache",
        type=Path,
        help="folder of clips and their flow, which both modalities can share; default OUT-clips",
    )
    for name, text in (
        ("clips", "clips to train on"),
        ("validation_clips", "further clips to validate on"),
        ("cycles", "how often all stages are repeated"),
        ("seed", "seed of clips and weights"),
    ):
        default = getattr(defaults, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"{text}; default {default}")
    parser.add_argument("--workers", type=int, default=2, help="processes that render; default 2")
    args = parser.parse_args()
    cache = args.cache or args.out.with_name(args.out.name + "-clips")
    settings = PretrainSettings(
        modality=args.modality,
        clips=args.clips,
        validation_clips=args.validation_clips,
        cycles=args.cycles,
        seed=args.seed,
    )
    pretrain(args.out, settings, cache=cache, workers=args.workers, progress=_say)
