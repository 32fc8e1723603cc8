"""Train the small video network on short clips of the synthetic world (our Kinetics stand-in).

    python -m mmdist_e2e.synthetic.pretrain --out runs/world1-rgb --clips 8000 --seed 0

Clips come from rooms and seeds of their own, never from a grounding video. The one logits layer
is read as two groups: the action, and the object that it is done with.
Shapes: B clips, T frames, H height, W width, C channels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from mmdist_e2e.extractors.i3d import InceptionI3d
from mmdist_e2e.extractors.preprocess import Preprocessing, to_network
from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.synthetic.clips import ACTION_NAMES, OBJECT_NAMES, sample_clip
from mmdist_e2e.synthetic.world import FPS, WORLD_VERSION

NAME = f"world{WORLD_VERSION}-rgb"
WINDOW, STRIDE = 16, 8
INPUT_SIZE = 112
RENDER_BLOCK = 64
# Pretraining changes weights fast, so running statistics must follow faster than the release's.
BATCH_NORM_MOMENTUM = 0.1

Progress = Callable[[str], None]


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that decides the weights. `small_epochs` run at `small_size`² to save time."""

    clips: int = 8000
    validation_clips: int = 1000
    seed: int = 0
    width: float = 0.25
    epochs: int = 6
    small_epochs: int = 3
    small_size: int = 80
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    dropout: float = 0.2


def _render_block(job: tuple[int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    seed, first, count = job
    clips, labels = [], []
    for index in range(first, first + count):
        frames_THWC, action, item = sample_clip(seed, index, frames=WINDOW)
        clips.append(frames_THWC)
        labels.append((action, item))
    return np.stack(clips), np.array(labels, dtype=np.int64)


def render_clips(
    folder: Path, *, seed: int, count: int, workers: int, progress: Progress
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Clips [N, T, H, W, C] as a memory map in `folder`, and labels [N, 2]; reused when whole."""
    clips_path, labels_path = folder / f"clips-{seed}-{count}.npy", folder / f"{seed}-{count}.npy"
    if not labels_path.is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        shape = (count, *sample_clip(seed, 0, frames=WINDOW)[0].shape)
        clips = np.lib.format.open_memmap(clips_path, "w+", dtype=np.uint8, shape=shape)
        labels = np.zeros((count, 2), dtype=np.int64)
        jobs = [
            (seed, first, min(RENDER_BLOCK, count - first))
            for first in range(0, count, RENDER_BLOCK)
        ]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for (_, first, size), (block, block_labels) in zip(
                jobs, pool.map(_render_block, jobs), strict=True
            ):
                clips[first : first + size] = block
                labels[first : first + size] = block_labels
                progress(f"rendered {first + size} of {count} clips")
        clips.flush()
        write_atomically(labels_path, lambda stream: np.save(stream, labels))
    return np.load(clips_path, mmap_mode="r"), np.load(labels_path)


def augment(clips_BTHWC: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random crop, mirror, light and colour, one draw a clip: [B, C, T, size, size] in [−1, 1].

    Mirroring keeps every label: no action of the world is told from another by its side.
    """
    out = []
    for clip_THWC in clips_BTHWC:
        draw = torch.rand(9, generator=generator)
        height, width = clip_THWC.shape[1:3]
        zoom = 0.8 + 0.2 * draw[0].item()
        h, w = round(height * zoom), round(width * (0.8 + 0.2 * draw[1].item()))
        top, left = int(draw[2] * (height - h + 1)), int(draw[3] * (width - w + 1))
        clip_TCHW = clip_THWC[:, top : top + h, left : left + w].permute(0, 3, 1, 2).float()
        clip_TCHW = F.interpolate(clip_TCHW, (size, size), mode="bilinear", antialias=True)
        if draw[4] < 0.5:
            clip_TCHW = clip_TCHW.flip(3)
        contrast, light = 0.8 + 0.4 * draw[5], (draw[6] - 0.5) * 50
        tint = 1 + (torch.rand(3, 1, 1, generator=generator) - 0.5) * 0.2
        out.append((((clip_TCHW - 128) * contrast + 128 + light) * tint).clamp_(0, 255))
    volume = torch.stack(out).permute(0, 2, 1, 3, 4).mul_(2 / 255).sub_(1)
    return volume.contiguous(memory_format=torch.channels_last_3d)


def group_losses(logits_BK: Tensor, labels_B2: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the action group plus that of the object group."""
    actions, items = logits_BK[:, : len(ACTION_NAMES)], logits_BK[:, len(ACTION_NAMES) :]
    return F.cross_entropy(actions, labels_B2[:, 0], label_smoothing=smoothing) + F.cross_entropy(
        items, labels_B2[:, 1], label_smoothing=smoothing
    )


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    order = torch.randperm(count, generator=generator).numpy()
    for first in range(0, count - size + 1, size):
        yield np.sort(order[first : first + size])  # sorted: kinder to the memory map


def accuracy(
    network: InceptionI3d, clips: NDArray[np.uint8], labels: NDArray[np.int64]
) -> tuple[float, float, NDArray[np.int64]]:
    """Percent of actions and of objects told right, and the confusion matrix of actions."""
    preprocessing = Preprocessing(size=INPUT_SIZE)
    network.eval()
    predicted = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for first in range(0, len(clips), 16):
            block = np.array(clips[first : first + 16])  # a copy: the memory map is read-only
            small = preprocessing(block.reshape(-1, *block.shape[2:]))
            windows = torch.from_numpy(small.reshape(*block.shape[:2], *small.shape[1:]))
            logits = network(to_network(windows)).float()
            actions, items = logits[:, : len(ACTION_NAMES)], logits[:, len(ACTION_NAMES) :]
            predicted.append(torch.stack([actions.argmax(1), items.argmax(1)], dim=1).numpy())
    network.train()
    hits = np.concatenate(predicted)
    confusion = np.zeros((len(ACTION_NAMES),) * 2, dtype=np.int64)
    np.add.at(confusion, (labels[:, 0], hits[:, 0]), 1)
    right = (hits == labels).mean(axis=0) * 100
    return float(right[0]), float(right[1]), confusion


def pretrain(
    out: Path, settings: PretrainSettings, *, cache: Path, workers: int, progress: Progress
) -> dict[str, Any]:
    """Render, train, validate, and write the checkpoint folder `out`; returns its figures."""
    torch.manual_seed(settings.seed)
    clips, labels = render_clips(
        cache, seed=settings.seed, count=settings.clips, workers=workers, progress=progress
    )
    val_clips, val_labels = render_clips(
        cache,
        seed=settings.seed + 1,
        count=settings.validation_clips,
        workers=workers,
        progress=progress,
    )
    generator = torch.Generator().manual_seed(settings.seed)
    network = InceptionI3d(
        len(ACTION_NAMES) + len(OBJECT_NAMES), 3, settings.width, dropout=settings.dropout
    ).to(memory_format=torch.channels_last_3d)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.momentum = BATCH_NORM_MOMENTUM
    optimizer = torch.optim.AdamW(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * (settings.clips // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.2
    )
    figures: dict[str, Any] = {}
    started = time.monotonic()
    for epoch in range(settings.epochs):
        size = settings.small_size if epoch < settings.small_epochs else INPUT_SIZE
        losses = []
        for chosen in batches(settings.clips, settings.batch, generator):
            volume = augment(torch.from_numpy(clips[chosen]), size, generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = network(volume).float()
            loss = group_losses(logits, torch.from_numpy(labels[chosen]), settings.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise MmdistError("Pretraining diverged; lower --learning-rate and run again.")
        action, item, confusion = accuracy(network, val_clips, val_labels)
        figures = {
            "validation_action_accuracy": round(action, 2),
            "validation_object_accuracy": round(item, 2),
            "training_loss": round(float(np.mean(losses)), 4),
            "action_confusion": confusion.tolist(),
        }
        progress(
            f"epoch {epoch + 1} of {settings.epochs}: loss {np.mean(losses):.3f}, "
            f"actions {action:.1f} %, objects {item:.1f} %, {time.monotonic() - started:.0f} s"
        )
    write_checkpoint(out, network, settings, figures)
    return figures


def write_checkpoint(
    out: Path, network: InceptionI3d, settings: PretrainSettings, figures: dict[str, Any]
) -> None:
    """Write the folder: model.safetensors, README.md, and config.json last."""
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    encoded = save(state)
    write_atomically(out / "model.safetensors", lambda stream: _write(stream, encoded))
    config = {
        "name": NAME,
        "network": "i3d",
        "in_channels": network.in_channels,
        "width": network.width,
        "num_classes": network.num_classes,
        "classes": [*ACTION_NAMES, *(f"object: {name}" for name in OBJECT_NAMES)],
        "modality": "rgb",
        "fps": float(FPS),
        "window": WINDOW,
        "stride": STRIDE,
        "preprocessing": {"size": INPUT_SIZE},
        "world_version": WORLD_VERSION,
        "trained_on": f"short clips of our own synthetic world, version {WORLD_VERSION}",
        "pretraining": {**asdict(settings), **figures},
    }
    card = model_card(settings, figures, sum(p.numel() for p in network.parameters()))
    write_atomically(out / "README.md", lambda stream: _write(stream, card.encode()))
    write_json(out / "config.json", config)


def _write(stream: Any, data: bytes) -> None:
    stream.write(data)


def model_card(settings: PretrainSettings, figures: dict[str, Any], parameters: int) -> str:
    """The card that ships beside the weights; every figure comes from the run itself."""
    return f"""# {NAME}

A narrow I3D (width {settings.width}, {parameters:,} parameters) that turns {WINDOW} frames at
{FPS} fps, resized to {INPUT_SIZE}², into {int(1024 * settings.width)} features.

- **Data**: {settings.clips:,} clips of {WINDOW} frames from the synthetic world, version
  {WORLD_VERSION}, rendered for this alone: other seeds and rooms than any grounding video.
- **Labels**: {len(ACTION_NAMES)} actions (idle is one) and {len(OBJECT_NAMES)} objects ("none" is
  one); one logits layer read as two groups.
- **Seed**: {settings.seed}. **Command**: `python -m mmdist_e2e.synthetic.pretrain --out OUT
  --clips {settings.clips} --seed {settings.seed} --epochs {settings.epochs}`
- **Validation** ({settings.validation_clips:,} further clips, seed {settings.seed + 1}): actions
  {figures["validation_action_accuracy"]} % (chance {100 / len(ACTION_NAMES):.1f} %), objects
  {figures["validation_object_accuracy"]} % (chance {100 / len(OBJECT_NAMES):.1f} %).
- **Limits**: it has seen drawn rooms and a drawn person only. On real video its features are
  finite and repeatable but say little; use public weights there (`i3d-rgb-imagenet`,
  `i3d-rgb-charades`).
- **Licence**: Apache-2.0, like the project; no third-party data.

Settings: `{json.dumps(asdict(settings))}`
"""


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


def main() -> None:
    """Command line of this module; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    defaults = PretrainSettings()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="folder for rendered clips; default OUT-clips")
    parser.add_argument("--clips", type=int, default=defaults.clips)
    parser.add_argument("--validation-clips", type=int, default=defaults.validation_clips)
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    settings = PretrainSettings(
        clips=args.clips,
        validation_clips=args.validation_clips,
        epochs=args.epochs,
        small_epochs=args.epochs // 2,
        seed=args.seed,
        learning_rate=args.learning_rate,
    )
    cache = args.cache or args.out.with_name(args.out.name + "-clips")
    pretrain(
        args.out,
        settings,
        cache=cache,
        workers=args.workers,
        progress=_say,
    )


if __name__ == "__main__":
    main()
