"""Full-width I3D RGB on a GPU: right first, then windows (16×224²) a second over several ways.

    python benchmarks/gpu_i3d.py

The usual way is fp32, contiguous, unfolded, one window a call. Every other way must agree with it
(row cosine at least 0.999) or its speed is not reported. The ratio is the fastest over the usual.
"""

from __future__ import annotations

import torch
from gpu_limits import seconds
from torch import Tensor

from mmdist_e2e.extractors.networks.fold import prepare_for_inference
from mmdist_e2e.extractors.networks.i3d import InceptionI3d

MINIMUM_COSINE, TARGET = 0.999, 3000
BATCHES = (16, 64)


def network() -> InceptionI3d:
    """Random weights whose activations neither die nor grow."""
    torch.manual_seed(0)
    model = InceptionI3d(400, 3).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def windows(count: int) -> Tensor:
    """Smooth clips in [−1, 1]: [B, 3, 16, 224, 224]."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((count, 3, 4, 14, 14), generator=generator)
    return torch.nn.functional.interpolate(coarse, (16, 224, 224), mode="trilinear").cuda() * 2 - 1


def main() -> None:
    plain = network().cuda()
    full_precision = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    clips = windows(max(BATCHES))
    with torch.inference_mode():
        expected = torch.cat([plain.features(clip[None])[:, 0] for clip in clips[: BATCHES[0]]])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = full_precision
        usual = 1 / seconds(lambda: plain.features(clips[:1]), runs=10)
        print(f"usual way: {usual:.0f} windows/s")
        found = {}
        torch.backends.cudnn.benchmark = True
        for layout in (torch.channels_last_3d, torch.contiguous_format):
            ready = prepare_for_inference(plain, "cuda", True).to(memory_format=layout)
            for compiled in (False, True):
                run = torch.compile(ready.features, mode="max-autotune") if compiled else None
                for batch in BATCHES:
                    frames = clips[:batch].bfloat16().contiguous(memory_format=layout)
                    name = f"bf16, {layout}, compiled {compiled}, {batch} a call"

                    def work(run=run or ready.features, frames=frames) -> Tensor:
                        return run(frames).float().mean(dim=1)

                    rows = work()[: BATCHES[0]]
                    cosine = torch.nn.functional.cosine_similarity(rows, expected).min().item()
                    if not cosine >= MINIMUM_COSINE:
                        print(f"{name}: WRONG, cosine {cosine:.4f}")
                        continue
                    found[name] = batch / seconds(work, runs=10)
                    print(f"{name}: {found[name]:.0f} windows/s, cosine {cosine:.5f}")
    best = max(found, key=found.__getitem__)
    print(f"fastest: {best}: {found[best]:.0f} windows/s, target {TARGET}")
    print(f"gpu_i3d: ratio {found[best] / usual:.2f}")


if __name__ == "__main__":
    main()
