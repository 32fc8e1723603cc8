"""The Charades profile beside the public recipe: how well do the rows agree?

    python benchmarks/charades_recipe.py PYTORCH_I3D VIDEO [CACHE]

PYTORCH_I3D is a checkout of github.com/piergiaj/pytorch-i3d: its network, readers and crop run on
JPEG frames that the `ffmpeg` command writes as the data set's README says. Flow is OpenCV's TV-L1
on the CPU with the settings of its CUDA class, on the first 200 frames; CACHE keeps it (.npz).
Both sides load the same random weights: Kaiming's, and BatchNorm's initial statistics (0 and 1),
which keeps the scale of activations; statistics measured on random weights would make a network
that amplifies the noise of JPEG more than any trained one. "before" is how
`i3d-*-charades` was run at first: dense, 25 fps at most, shorter side 256; its rows are
interpolated at the times of the recipe's.

Printed: rows, and the mean and the worst cosine of a row after subtracting the mean over time.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdist_e2e.extractors.flow.fields import Repeats
from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import DenseChunks, SnippetNetwork
from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.store import write_json
from mmdist_e2e.weights.registry import ENTRIES

Rows = NDArray[np.float32]
FPS, LONGER_SIDE, FLOW_FRAMES, BOUND = 24.0, 320, 200, 20.0
SCALE = f"scale='if(gt(a,1),{LONGER_SIDE},-1)':'if(gt(a,1),-1,{LONGER_SIDE})',fps=fps={FPS:g}"


def write_frames(video: Path, root: Path) -> int:
    """JPEG frames under root/video, with the names that the recipe's reader expects."""
    (root / "video").mkdir()
    target = root / "video" / "video-%06d.jpg"
    command = ["ffmpeg", "-v", "error", "-i", video, "-qscale:v", "3", "-filter:v", SCALE, target]
    subprocess.run([str(part) for part in command], check=True)
    return len(list((root / "video").iterdir()))


def write_flow(root: Path, cache: Path | None) -> int:
    """Flow between the first JPEG frames, as 8-bit JPEGs beside them."""
    if cache is not None and cache.is_file():
        flows = np.load(cache)["flows"]
    else:
        paths = sorted((root / "video").glob("video-??????.jpg"))[:FLOW_FRAMES]
        greys = [cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) for path in paths]
        solver = cv2.optflow.createOptFlow_DualTVL1()
        solver.setMedianFiltering(1)
        solver.setInnerIterations(1)
        solver.setOuterIterations(300)
        still = np.zeros((*greys[0].shape, 2), np.float32)
        pairs = itertools.pairwise(greys)
        flows = np.stack(
            [still if np.array_equal(a, b) else solver.calc(a, b, None) for a, b in pairs]
        )
        if cache is not None:
            np.savez_compressed(cache, flows=flows.astype(np.float16))
    for number, flow in enumerate(flows.astype(np.float32), 1):
        grey = np.rint(255 * (flow.clip(-BOUND, BOUND) + BOUND) / (2 * BOUND)).astype(np.uint8)
        for axis, name in enumerate("xy"):
            cv2.imwrite(str(root / "video" / f"video-{number:06d}{name}.jpg"), grey[..., axis])
    return len(flows)


def random_weights(channels: int) -> dict[str, Tensor]:
    """Of an I3D with 157 classes."""
    torch.manual_seed(0)
    network = InceptionI3d(157, channels)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
    return network.state_dict()


def our_rows(name: str, state: dict[str, Tensor], video: Path, seconds: float, **old: Any) -> Rows:
    """Rows of the first seconds of a video by a public entry, with `old` values of its config."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "model.safetensors")
        config = {**(ENTRIES[name].config or {}), "trained_on": "nothing", **old}
        write_json(Path(folder) / "config.json", config)
        spec = describe(folder)
        network = SnippetNetwork(spec, device="cpu", precision="fp32")
    inputs, repeats, rows = network.input_stream(), Repeats(), []
    with Decoder() as decoder:
        how: dict[str, Any] = {"fps_policy": spec.fps_policy, "longer_side": spec.longer_side}
        stream = decoder.frames(video, fps=spec.fps, **how)
        count = min(stream.sample_count, round(seconds * FPS)) - (spec.modality == "flow")
        cutter = DenseChunks(frames=count if spec.tail == "none" else 0)
        for chunk in stream:
            frames_NHWC = chunk.frames_NHWC[chunk.times_N < seconds - 1e-6]
            found = repeats.find(frames_NHWC) if network.needs_repeats else ()
            for piece in inputs.push(torch.from_numpy(frames_NHWC), found):
                rows += [network.dense_rows(part) for part in cutter.push(piece)]
        for piece in inputs.finish():
            rows += [network.dense_rows(part) for part in cutter.push(piece)]
    out: Rows = torch.cat([*rows, *map(network.dense_rows, cutter.finish())]).numpy()
    return out


def cosines(ours: Rows, theirs: Rows) -> str:
    ours_at, at = (np.linspace(0, 1, len(rows)) for rows in (ours, theirs))
    same = np.stack([np.interp(at, ours_at, column) for column in ours.T], axis=1)
    a, b = (rows - rows.mean(axis=0) for rows in (same, theirs))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return f"{len(ours)} rows, cosine {cosine.mean():.4f} on average, {cosine.min():.4f} at worst"


def main() -> None:
    recipe, video = Path(sys.argv[1]), Path(sys.argv[2])
    cache = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    sys.path.insert(0, str(recipe))
    from charades_dataset_full import load_flow_frames, load_rgb_frames
    from pytorch_i3d import InceptionI3d as Theirs
    from videotransforms import CenterCrop

    before = {"fps": 25.0, "fps_policy": "ceiling", "longer_side": None, "tail": "repeat_last"}
    old_size = {"size": 224, "shorter_side": 256, "crop": 224}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        counts = {"rgb": write_frames(video, root)}
        counts["flow"] = write_flow(root, cache)
        readers: dict[str, Callable[..., Any]] = {"rgb": load_rgb_frames, "flow": load_flow_frames}
        for modality, count in counts.items():
            frames_THWC = CenterCrop(224)(readers[modality](root, "video", 1, count))
            inputs_1CTHW = torch.from_numpy(frames_THWC.transpose(3, 0, 1, 2)[None].copy())
            state = random_weights(inputs_1CTHW.shape[1])
            theirs = Theirs(157, in_channels=inputs_1CTHW.shape[1])
            theirs.load_state_dict(state)
            with torch.inference_mode():
                rows = theirs.eval().extract_features(inputs_1CTHW)[0, :, :, 0, 0].T.numpy()
            print(f"{modality}: the recipe has {count} frames and {len(rows)} rows")
            seconds = (count if modality == "rgb" else FLOW_FRAMES) / FPS
            old = {**old_size, "bound": BOUND} if modality == "flow" else old_size
            for label, changes in (("before", {**before, "preprocessing": old}), ("now", {})):
                own = our_rows(f"i3d-{modality}-charades", state, video, seconds, **changes)
                print(f"  {label}: {cosines(own, rows)}", flush=True)


if __name__ == "__main__":
    main()
