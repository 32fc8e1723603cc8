"""`mmdist extract` end to end, and each of its stages alone, over the same ten clips.

    python benchmarks/bench_extract.py [--before CHECKOUT] [--workers 1 --workers 2 --threads 1]
                                       [--devices 0 --devices all] [--env "NAME=VALUE …"] [CASE …]

End to end: the command, as a process, into an empty folder. A stage alone: the same work in this
process with nothing beside it, after its libraries are loaded; decoding with as many decoders as
the command has. The start is the same command on one clip of two frames; a rerun has nothing to do.

A CASE is a profile and rgb, flow or both (in one pass):
    charades   full-width I3D with random weights and the profile of i3d-*-charades: dense
    imagenet   the same with that of i3d-*-imagenet: windows of 16 frames every 8
    world2     the small networks that ship

--before, and every --workers, --devices and --env, is one more way of running the command; the ways
alternate and the best run of each counts. --threads limits the threads of each process: with 1, one
worker leaves the other cores to a second one.

Ratios: `stage` is the slowest stage alone over end to end, `stage without start` the same after
taking the start away. Stages share a CPU's cores, so `capacity` also counts the CPU seconds that
all stages need, over the number of cores: 1 means that no schedule of these stages is faster.
"""

from __future__ import annotations

import argparse
import os
import queue
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import Cost, cost_of, make_clips, random_checkpoint, two_frames
from torch import Tensor

from mmdist_e2e.extractors.flow import tvl1
from mmdist_e2e.extractors.flow.fields import PAIRS_PER_CALL, FlowPreprocessing
from mmdist_e2e.extractors.profiles import ExtractorSpec, describe
from mmdist_e2e.extractors.runner import DenseChunks, SnippetNetwork, Windows
from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.weights.registry import ENTRIES

CASES = {
    "charades-rgb": ("i3d-rgb-charades",),
    "charades-flow": ("i3d-flow-charades",),
    "charades-both": ("i3d-rgb-charades", "i3d-flow-charades"),
    "imagenet-rgb": ("i3d-rgb-imagenet",),
    "imagenet-flow": ("i3d-flow-imagenet",),
    "imagenet-both": ("i3d-rgb-imagenet", "i3d-flow-imagenet"),
    "world2-rgb": ("world2-rgb",),
    "world2-flow": ("world2-flow",),
    "world2-both": ("world2-rgb", "world2-flow"),
}
DEFAULT_CASES = ("charades-rgb", "world2-rgb", "world2-both")
DECODERS = min(8, max(2, len(os.sched_getaffinity(0)) - 1))  # as many as `--decoders` has
ROOT = Path(__file__).parents[1]
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Way:
    """One way of running the command."""

    name: str
    checkout: Path = ROOT
    options: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()

    def run(self, clips: Sequence[Path], extractors: Sequence[str], out: Path) -> Cost:
        """Seconds of the whole process and of its children. Raises if any clip fails."""
        chosen = [part for name in extractors for part in ("--extractor", name)]
        command = [sys.executable, "-P", "-m", "mmdist_e2e.cli.main", "extract", *map(str, clips)]
        command += [*chosen, "--out", str(out), *self.options]
        given = dict(variable.split("=", 1) for variable in self.variables)
        env = {**os.environ, "PYTHONPATH": str(self.checkout), **given}
        return cost_of(command, env=env)


@dataclass
class Stages:
    """Each stage alone, over all clips; what a stage needs from others is made outside its time."""

    networks: list[SnippetNetwork]
    costs: dict[str, Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = self.networks[0].device

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        self._wait()
        begin, cpu = time.perf_counter(), time.process_time()
        yield
        self._wait()
        cost = self.costs.setdefault(stage, Cost())
        cost.wall += time.perf_counter() - begin
        cost.cpu += time.process_time() - cpu

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def run(self, clips: Sequence[Path]) -> None:
        for network in self.networks:
            _Work(self, network).warm_up()
        self.costs.clear()
        specs = [network.spec for network in self.networks]
        self.costs["decode"] = decoding(clips, specs)
        for network in self.networks:
            work = _Work(self, network)
            with Decoder() as decoder:
                for clip in clips:
                    chunks = [c.frames_NHWC for c in decoder.frames(clip, **sampling(network.spec))]
                    work.add([torch.from_numpy(frames_NHWC) for frames_NHWC in chunks])
            work.finish()


class _Work:
    """One network's stages; windows of several clips share a batch, as in the product."""

    def __init__(self, stages: Stages, network: SnippetNetwork) -> None:
        self.timed, self.network, self.device = stages._timed, network, stages.device
        self.pending: list[Tensor] = []

    def warm_up(self) -> None:
        self.add([torch.randint(0, 256, (40, 240, 320, 3), dtype=torch.uint8)])
        self.finish()

    def add(self, chunks: list[Tensor]) -> None:
        if self.device.type == "cuda":
            chunks = [frames_NHWC.pin_memory() for frames_NHWC in chunks]
            with self.timed("upload"):
                chunks = [frames_NHWC.to(self.device, non_blocking=True) for frames_NHWC in chunks]
        preprocessing = self.network.preprocessing
        if isinstance(preprocessing, FlowPreprocessing):
            inputs_NHWC = self._flow(preprocessing, chunks)
        else:
            with self.timed("prepare"):
                inputs_NHWC = torch.cat([preprocessing(frames_NHWC) for frames_NHWC in chunks])
        spec = self.network.spec
        if spec.mode == "dense":
            cutter = DenseChunks(frames=len(inputs_NHWC) if spec.tail == "none" else 0)
            with self.timed("network"):
                for chunk in (*cutter.push(inputs_NHWC), *cutter.finish()):
                    self.network.dense_rows(chunk)
            return
        windows = Windows(window=spec.window, stride=spec.stride)
        with self.timed("network"):
            for window in (*windows.push(inputs_NHWC), *windows.finish()):
                self.pending.append(window)
                if len(self.pending) == self.network.windows_per_call:
                    self._flush()

    def finish(self) -> None:
        if self.pending:
            with self.timed("network"):
                self._flush()

    def _flush(self) -> None:
        self.network.rows(torch.stack(self.pending))
        self.pending.clear()

    def _flow(self, preprocessing: FlowPreprocessing, chunks: list[Tensor]) -> Tensor:
        with self.timed("prepare"):
            greys_NHW = torch.cat([preprocessing.greys(frames_NHWC) for frames_NHWC in chunks])
        fields = []
        for begin in range(0, len(greys_NHW) - 1, PAIRS_PER_CALL):
            part_NHW = greys_NHW[begin : begin + PAIRS_PER_CALL + 1]
            with self.timed("flow"):
                flow_N2HW = tvl1(part_NHW[:-1], part_NHW[1:], backend=self.network.flow_backend)
            with self.timed("prepare"):
                fields.append(preprocessing.fields(flow_N2HW))
        fields_NHWC = torch.cat(fields)
        return torch.cat([fields_NHWC, fields_NHWC[-1:]])


def sampling(spec: ExtractorSpec) -> dict[str, object]:
    return {"fps": spec.fps, "fps_policy": spec.fps_policy, "longer_side": spec.longer_side}


def decoding(clips: Sequence[Path], specs: Sequence[ExtractorSpec]) -> Cost:
    """One pass for networks of the same sampling; the decoders' start is taken away."""
    passes = list({tuple(sampling(spec).items()): sampling(spec) for spec in specs}.values())
    start, whole = (_decoded(part, passes) for part in (clips[:0], clips))
    return Cost(whole.wall, whole.cpu - start.cpu)


def _decoded(clips: Sequence[Path], passes: Sequence[dict[str, object]]) -> Cost:
    waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for clip in clips:
        waiting.put(clip)
    cpu = _cpu_seconds()
    with ExitStack() as stack:
        decoders = [stack.enter_context(Decoder()) for _ in range(DECODERS)]
        for decoder in decoders:
            decoder.probe(two_frames())

        def drain(decoder: Decoder) -> None:
            while not waiting.empty():
                clip = waiting.get()
                for how in passes:
                    for _ in decoder.frames(clip, **how):
                        pass

        begin = time.perf_counter()
        threads = [threading.Thread(target=drain, args=(decoder,)) for decoder in decoders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - begin
    return Cost(seconds, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(
    case: str, ways: Sequence[Way], clips: Sequence[Path], seconds: float, runs: int
) -> None:
    names = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        extractors = [
            name
            if ENTRIES[name].kind == "shipped"
            else str(random_checkpoint(Path(folder) / name, name))
            for name in names
        ]
        print(f"{case}: {', '.join(names)}; {len(clips)} clips of {seconds:g} seconds")
        best: dict[str, Cost] = {}
        for index in range(runs):
            for number, way in enumerate(ways):
                cost = way.run(clips, extractors, Path(folder) / f"out-{index}-{number}")
                if way.name not in best or cost.wall < best[way.name].wall:
                    best[way.name] = cost
        first = ways[0]
        start = first.run([two_frames()], extractors, Path(folder) / "start")
        rerun = first.run(clips, extractors, Path(folder) / "out-0-0")
        for name, cost in best.items():
            hours = len(clips) * seconds / cost.wall
            print(
                f"  {name:<16}{cost}, {cost.cpu / cost.wall / CORES:4.0%} of {CORES} cores; "
                f"{len(clips) / cost.wall:.2f} videos/s, {hours:.1f} hours of video an hour"
            )
        print(f"  {'start':<16}{start}\n  {'rerun':<16}{rerun}", flush=True)
        device = stage_device(first)
        networks = [SnippetNetwork(describe(name), device=device) for name in extractors]
    stages = Stages(networks)
    stages.run(clips)
    for name, cost in stages.costs.items():
        print(f"  {name + ' alone':<16}{cost}")
    whole, slowest = best[first.name].wall, max(cost.wall for cost in stages.costs.values())
    needed = max(slowest, sum(cost.cpu for cost in stages.costs.values()) / CORES)
    ratios = {"stage": slowest / whole}
    if whole > start.wall:
        ratios["stage without start"] = slowest / (whole - start.wall)
        ratios["capacity without start"] = needed / (whole - start.wall)
    ratios |= {f"{way.name} over {first.name}": best[way.name].wall / whole for way in ways[1:]}
    for name, ratio in ratios.items():
        print(f"extract {case} {name}: ratio {ratio:.2f}", flush=True)


def stage_device(way: Way) -> str:
    """The first device of the first way, as torch names it."""
    given = dict(zip(way.options[::2], way.options[1::2], strict=True)).get("--devices", "auto")
    first = given.split(",")[0]
    return {"all": "auto"}.get(first, f"cuda:{first}" if first.isdigit() else first)


def chosen_ways(args: argparse.Namespace) -> list[Way]:
    """The first is what the others are compared with."""
    names = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS") if args.threads else ()
    limits = tuple(f"{name}={args.threads}" for name in names)
    several = [("--devices", value) for value in args.devices]
    several += [("--workers", value) for value in args.workers]
    ways = [Way(" ".join(pair)[2:], ROOT, pair, limits) for pair in several]
    ways = ways or [Way("now", variables=limits)]
    ways += [Way(text, variables=(*limits, *text.split())) for text in args.env]
    if args.before is not None:
        ways.append(Way("before", args.before.resolve(), variables=limits))
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], metavar="CASE")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--workers", action="append", default=[], metavar="N")
    parser.add_argument("--devices", action="append", default=[], metavar="LIST")
    parser.add_argument("--env", action="append", default=[], metavar="'NAME=VALUE …'")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--clips", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip")
    parser.add_argument("--runs", type=int, default=1)
    args = parser.parse_args()
    clips = make_clips(args.clips, args.seconds)
    for case in args.cases or DEFAULT_CASES:
        measure(case, chosen_ways(args), clips, args.seconds, args.runs)


if __name__ == "__main__":
    main()
