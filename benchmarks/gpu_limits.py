"""What a device reaches at best: bf16 matrix products, copies and uploads, to read others beside.

python benchmarks/gpu_limits.py [--device cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import best_seconds

RUNS = 20


def seconds(work: Callable[[], object], runs: int = RUNS) -> float:
    """Seconds a run, by the GPU's own clock, after a warm-up; on a CPU the best of the runs."""
    for _ in range(3):
        work()
    if not torch.cuda.is_available():
        return best_seconds(work, runs)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / runs


def main() -> None:
    parser = argparse.ArgumentParser(description="Matrix products, copies and uploads.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = parser.parse_args().device
    gpu = device == "cuda"
    if gpu:
        print(torch.cuda.get_device_name(), torch.cuda.device_count(), "of them")
    print("torch", torch.__version__, "CUDA", torch.version.cuda)
    side, mebibytes = (8192, 2048) if gpu else (256, 8)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * side**3 / seconds(lambda: a @ b)
    print(f"bf16 matrix products: {rate / 1e12:.1f} TFLOP/s")
    source = torch.zeros(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    print(f"copies: {rate / 1e12:.3f} TB/s read and written")
    host = torch.zeros(mebibytes * 2**16, dtype=torch.float32, pin_memory=gpu)
    target = target[: len(host)]
    rate = host.nbytes / seconds(lambda: target.copy_(host, non_blocking=True))
    print(f"uploads from pinned memory: {rate / 1e9:.1f} GB/s")


if __name__ == "__main__":
    main()
