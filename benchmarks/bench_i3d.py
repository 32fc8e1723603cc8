"""I3D windows as we run them beside the usual way: fp32, contiguous, unfolded, one window a call.

    python benchmarks/bench_i3d.py [EXTRACTOR] [--device cuda] [--windows N]

By default: I3D at full width with random weights, on the CPU. Same weights and uint8 windows, one
process; the two ways alternate and the best of each counts. Rows must agree (cosine at least
0.999), or no speed is reported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import best_seconds, random_i3d
from torch import Tensor

from mmdist_e2e.extractors.networks.fold import prepare_for_inference
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import (
    MINIMUM_COSINE,
    WINDOWS_PER_CALL,
    fast_bf16,
    load_network,
    to_network,
)

RUNS = 3
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return torch.backends.cpu.get_cpu_capability()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = " ".join(flag for flag in FLAGS if flag in facts.get("flags", "").split())
    name = facts.get("model name", "unknown")
    return f"{name}; {flags or 'no ' + ' '.join(FLAGS)}; {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description="I3D windows, ours and the usual way.")
    parser.add_argument("extractor", nargs="?", help="Name or folder of an I3D.")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--windows", type=int, help="Default: 4 on a CPU, 64 on a GPU.")
    args = parser.parse_args()
    device: torch.device = args.device
    call = WINDOWS_PER_CALL[device.type]
    count = args.windows or {"cpu": 4, "cuda": 64}[device.type]
    window, size, network = 16, 224, random_i3d()
    if args.extractor is not None:
        spec = describe(args.extractor)
        network, window, size = load_network(spec), spec.window, spec.preprocessing.size
    bf16 = fast_bf16(device)
    ours = prepare_for_inference(network, device, bf16)
    network = network.to(device)
    # Smooth noise, as images are: white noise is too far from what a network is made for.
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand((count, network.in_channels, 4, 14, 14), generator=generator) * 255
    clips = torch.nn.functional.interpolate(coarse, (window, size, size), mode="trilinear")
    windows = clips.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous().to(device)

    def run_ours() -> Tensor:
        dtype = torch.bfloat16 if bf16 else torch.float32
        parts = [ours.features(to_network(part).to(dtype)) for part in windows.split(call)]
        return torch.cat(parts).float()

    def run_usual() -> Tensor:
        parts = windows.split(1)
        return torch.cat([network.features(to_network(part).contiguous()) for part in parts])

    ways: dict[str, Callable[[], Tensor]] = {"ours": run_ours, "usual": run_usual}
    times = dict.fromkeys(ways, float("inf"))
    with torch.inference_mode():
        with torch.backends.cudnn.flags(allow_tf32=False):
            exact = run_usual()
        cosine = torch.cosine_similarity(run_ours(), exact, dim=-1).min().item()
        print(f"{machine(device)}; torch {torch.__version__}")
        print(f"ours: {'bf16' if bf16 else 'fp32'}, {call} windows of {window} × {size}² a call")
        print(f"row cosine to fp32: at least {cosine:.6f}")
        if not cosine >= MINIMUM_COSINE:
            sys.exit("The rows differ; no speed is reported.")
        for _ in range(RUNS):
            for name, run in ways.items():
                times[name] = min(times[name], best_seconds(run, 1, str(device)))
    for name, seconds in times.items():
        print(f"{name}: {1000 * seconds / count:.1f} ms a window, {count / seconds:.1f} a second")
    print(f"i3d: ratio {times['usual'] / times['ours']:.2f}")


if __name__ == "__main__":
    main()
