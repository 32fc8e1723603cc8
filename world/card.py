"""The checkpoint folder of a network trained on the world, and the card that ships in it."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.store import write_atomically, write_json
from world.clips import ACTION_NAMES, OBJECT_NAMES
from world.clipset import WINDOW
from world.flowset import FLOW_PREPROCESSING
from world.world import FPS, WORLD_VERSION

if TYPE_CHECKING:
    from world.pretrain import PretrainSettings

STRIDE = 8
INPUT_SIZE = FLOW_PREPROCESSING.size
CHANNELS = {"rgb": 3, "flow": 2}
_PREPROCESSING: dict[str, dict[str, Any]] = {
    "rgb": {"size": INPUT_SIZE},
    "flow": asdict(FLOW_PREPROCESSING),
}


def write_extractor(
    out: Path, network: InceptionI3d, settings: PretrainSettings, figures: Mapping[str, Any]
) -> None:
    """Write the folder: model.safetensors, README.md, and config.json last."""
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    config = {
        "name": name_of(settings.modality),
        "network": "i3d",
        "in_channels": network.in_channels,
        "width": network.width,
        "num_classes": network.num_classes,
        "classes": [*ACTION_NAMES, *(f"object: {name}" for name in OBJECT_NAMES)],
        "modality": settings.modality,
        "fps": float(FPS),
        "window": WINDOW,
        "stride": STRIDE,
        "preprocessing": _PREPROCESSING[settings.modality],
        "world_version": WORLD_VERSION,
        "trained_on": f"short clips of our own synthetic world, version {WORLD_VERSION}",
        "pretraining": {**asdict(settings), **figures},
    }
    card = model_card(settings, figures, sum(p.numel() for p in network.parameters()))
    content = save(state)
    write_atomically(out / "model.safetensors", content)
    write_atomically(out / "README.md", card.encode())
    files = {"model.safetensors": hashlib.sha256(content).hexdigest()}
    write_json(out / "config.json", {**config, "files": files})


def name_of(modality: str) -> str:
    """The name that a network of a modality ships under."""
    return f"world{WORLD_VERSION}-{modality}"


def _input(modality: str) -> str:
    """What the network reads, in words."""
    if modality == "rgb":
        return f"{WINDOW} frames at {FPS:g} fps, resized to {INPUT_SIZE}²,"
    flow = FLOW_PREPROCESSING
    return (
        f"the optical flow of {WINDOW} frames at {FPS:g} fps (our own TV-L1 on grey frames of "
        f"shorter side {flow.shorter_side}; the field resized to {flow.size}², clipped to "
        f"±{flow.bound:g} pixels and divided by {flow.bound:g})"
    )


def model_card(settings: PretrainSettings, figures: Mapping[str, Any], parameters: int) -> str:
    """The model card of the weights; every figure comes from the run itself."""
    modality = settings.modality
    summary = (
        f"A narrow I3D (width {settings.width}, {parameters:,} parameters) that turns "
        f"{_input(modality)} into {int(1024 * settings.width)} features."
    )
    return f"""# {name_of(modality)}

{textwrap.fill(summary, 100)}

- **Data**: {settings.clips:,} clips of {WINDOW} frames from the synthetic world, version
  {WORLD_VERSION}, rendered for this alone: other seeds and rooms than any grounding video. They
  show every combination of action and object, those too that grounding sees in test alone.
- **Labels**: {len(ACTION_NAMES)} actions (idle is one) and {len(OBJECT_NAMES)} objects ("none" is
  one); one logits layer read as two groups. In training only, two helpers learn where the
  person's joints are and how they move, which the renderer knows.
- **Seed**: {settings.seed}. **Command**: `python -m world pretrain
  --modality {modality} --out OUT --clips {settings.clips} --cycles {settings.cycles}
  --seed {settings.seed}`
- **Validation** ({settings.validation_clips:,} further clips, seed {settings.seed + 1}): actions
  {figures["validation_action_accuracy"]} % (chance {100 / len(ACTION_NAMES):.1f} %), objects
  {figures["validation_object_accuracy"]} % (chance {100 / len(OBJECT_NAMES):.1f} %).
- **Limits**: it has seen drawn rooms and a drawn person only. On real video its features are
  finite and repeatable but say little; use public weights there (`i3d-{modality}-imagenet`,
  `i3d-{modality}-charades`).
- **Licence**: Apache-2.0, like the project; no third-party data.

Settings: `{json.dumps(asdict(settings))}`
"""
