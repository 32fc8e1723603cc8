"""I3D windows as we run them beside the usual way: fp32, contiguous, unfolded, one window a call.

    python benchmarks/bench_i3d.py [EXTRACTOR]     default: I3D at full width, random weights

Same weights, same uint8 windows, one process; the two ways alternate and the best of each counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mmdist_e2e.extractors.networks.fold import prepare_for_inference
from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import WINDOWS_PER_CALL, fast_bf16, load_network

WINDOWS, RUNS = 8, 4
CALL = WINDOWS_PER_CALL["cpu"]
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def random_i3d() -> nn.Module:
    """Full width, with weights and statistics that let every row differ from the next."""
    torch.manual_seed(0)
    network = InceptionI3d().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # no Linux
        return torch.backends.cpu.get_cpu_capability()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = [flag for flag in FLAGS if flag in facts.get("flags", "").split()]
    return (
        f"{facts.get('model name', 'unknown')}; {' '.join(flags) or 'none of ' + ' '.join(FLAGS)}"
    )


def main() -> None:
    window, size = 16, 224
    if len(sys.argv) > 1:
        spec = describe(sys.argv[1])
        network = load_network(spec)
        window, size = spec.window, spec.config["preprocessing"]["size"]
    else:
        network = random_i3d()
    bf16 = fast_bf16(torch.device("cpu"))
    ours = prepare_for_inference(network, "cpu", bf16)
    generator = torch.Generator().manual_seed(0)
    shape = (WINDOWS, window, size, size, network.in_channels)
    windows = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def scaled(windows_BTHWC: Tensor) -> Tensor:
        return (windows_BTHWC.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)

    def run_ours() -> Tensor:
        dtype = torch.bfloat16 if bf16 else torch.float32
        calls = windows.split(CALL)
        return torch.cat([ours.features(scaled(part).to(dtype)) for part in calls]).float()

    def run_usual() -> Tensor:
        return torch.cat([network.features(scaled(part).contiguous()) for part in windows.split(1)])

    ways: dict[str, Callable[[], Tensor]] = {"ours": run_ours, "usual": run_usual}
    with torch.inference_mode():
        rows = {name: run() for name, run in ways.items()}  # and warms up
        times = dict.fromkeys(ways, float("inf"))
        for _ in range(RUNS):
            for name, run in ways.items():
                begin = time.perf_counter()
                run()
                times[name] = min(times[name], time.perf_counter() - begin)
    cosine = torch.cosine_similarity(rows["ours"], rows["usual"], dim=-1).min().item()
    print(f"cpu: {cpu()}; {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"ours: {'bf16' if bf16 else 'fp32'}, {CALL} windows of {window} × {size}² a call")
    for name in ways:
        print(f"{name}: {1000 * times[name] / WINDOWS:.1f} ms a window")
    print(f"row cosine to fp32: at least {cosine:.6f}")
    print(f"i3d: ratio {times['usual'] / times['ours']:.2f}")


if __name__ == "__main__":
    main()
