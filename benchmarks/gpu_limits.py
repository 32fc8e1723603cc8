"""What this GPU reaches at best: bf16 matrix products and copies, to read the others beside."""

from __future__ import annotations

import torch

SIDE, MEBIBYTES, RUNS = 8192, 2048, 20


def seconds(work, runs: int = RUNS) -> float:
    """Seconds a run, by the GPU's own clock, after a warm-up."""
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / runs


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "CUDA", torch.version.cuda)
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * SIDE**3 / seconds(lambda: a @ b)
    print(f"bf16 matrix products: {rate / 1e12:.0f} TFLOP/s")
    source = torch.empty(MEBIBYTES * 2**18, device="cuda", dtype=torch.float32)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    print(f"copies: {rate / 1e12:.2f} TB/s read and written")


if __name__ == "__main__":
    main()
