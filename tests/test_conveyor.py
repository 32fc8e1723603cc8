"""Several videos at once: the same bytes, little waiting, and no failure that costs another one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from make_videos import make_video

from mmdist_e2e.extractors import extract as extract_module
from mmdist_e2e.extractors.extract import Conveyor, Job, Result, extract_video
from mmdist_e2e.extractors.flow import fields as flow_frames
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import Device, SnippetNetwork
from mmdist_e2e.extractors.video.reader import Decoder, VideoError, VideoInfo
from mmdist_e2e.extractors.video.writer import write_video
from mmdist_e2e.structures import Features, MmdistError

BOTH = ("rgb", "flow")
RATE = 12  # the tiny extractors' frames a second


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("videos")
    sizes = {"a": (40, 48, 32), "b": (3, 64, 48), "c": (150, 32, 32), "d": (17, 48, 64)}
    return [
        make_video(folder / f"{name}.mp4", count, rate=RATE, width=width, height=height)
        for name, (count, width, height) in sizes.items()
    ]


def networks_of(*folders: Path, **options: str) -> dict[str, SnippetNetwork]:
    specs = [describe(str(folder), **options) for folder in folders]
    return {s.modality: SnippetNetwork(s, device="cpu", precision="fp32") for s in specs}


@pytest.fixture
def networks(tiny_extractor, tiny_flow_extractor) -> dict[str, SnippetNetwork]:
    return networks_of(tiny_extractor, tiny_flow_extractor)


def jobs_of(paths: list[Path], modalities: tuple[str, ...] = BOTH) -> list[Job]:
    return [Job(path.stem, path, modalities) for path in paths]


def results_of(conveyor: Conveyor, jobs: list[Job], **options) -> dict[str, Result]:
    results = {str(result.job.key): result for result in conveyor.run(jobs, **options)}
    assert len(results) == len(jobs)
    return results


@pytest.mark.parametrize("options", [{}, {"mode": "dense"}, {"fps_policy": "exact"}])
def test_a_videos_bytes_depend_on_no_other_one(
    videos, tiny_extractor, tiny_flow_extractor, options
):
    networks = networks_of(tiny_extractor, tiny_flow_extractor, **options)
    alone = {path.stem: extract_video(path, list(networks.values())) for path in videos}
    for decoders, order in ((1, videos), (3, videos[::-1])):
        with Conveyor(networks, decoders=decoders) as conveyor:
            for _ in range(2):  # it can be used again
                results = results_of(conveyor, jobs_of(order))
        for name, result in results.items():
            assert not result.failures
            assert list(result.features) == list(BOTH)
            assert result.video_seconds == alone[name]["rgb"].duration_seconds
            for modality, features in result.features.items():
                expected = alone[name][modality]
                np.testing.assert_array_equal(features.data, expected.data)
                np.testing.assert_array_equal(features.times, expected.times)
                assert features.provenance == expected.provenance


def test_a_batch_has_windows_of_several_videos_and_fills_up(videos, networks, monkeypatch):
    rows, sizes = SnippetNetwork.rows, []

    def counting(self, windows_BTHWC):
        sizes.append(len(windows_BTHWC))
        return rows(self, windows_BTHWC)

    monkeypatch.setattr(SnippetNetwork, "rows", counting)
    networks["rgb"].windows_per_call = 64
    with Conveyor(networks, decoders=4) as conveyor:
        results = results_of(conveyor, jobs_of(videos, ("rgb",)))
    counts = [len(result.features["rgb"].data) for result in results.values()]
    assert sum(sizes) == sum(counts) == 5 + 1 + 19 + 3
    assert len(sizes) < len(videos) or max(sizes) > max(counts)


class Simulated(Device):
    """A device with its own memory, which counts what crosses to it, and who waits."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copies = device, True
        self.uploaded, self.downloads = [], 0
        self.waiting: list[threading.Thread] = []

    def upload(self, frames_NHWC):
        self.uploaded.append(len(frames_NHWC))
        copy = torch.from_numpy(frames_NHWC.copy())
        frames_NHWC[:] = 7  # the decoder uses its memory again
        return copy

    def pin(self, memory):
        return lambda: None

    def mark(self):
        return lambda: self.waiting.append(threading.current_thread())

    def download(self, rows_SD):
        self.waiting.append(threading.current_thread())
        self.downloads += 1
        return rows_SD.numpy().copy()


@pytest.fixture
def simulated(monkeypatch) -> list[Simulated]:
    made: list[Simulated] = []
    monkeypatch.setattr(
        extract_module, "Device", lambda device: made.append(Simulated(device)) or made[-1]
    )
    return made


def test_frames_go_up_once_rows_come_down_once_and_networks_never_wait(
    videos, networks, monkeypatch, simulated
):
    alone = {path.stem: extract_video(path, list(networks.values())) for path in videos}
    simulated.clear()
    batches, rows = [], SnippetNetwork.rows

    def counting(self, windows_BTHWC):
        batches.append(len(windows_BTHWC))
        return rows(self, windows_BTHWC)

    monkeypatch.setattr(SnippetNetwork, "rows", counting)
    for network in networks.values():
        network.windows_per_call = 4
    with Conveyor(networks, decoders=2) as conveyor:
        results = results_of(conveyor, jobs_of(videos))
    (device,) = simulated
    assert sum(device.uploaded) == 40 + 3 + 150 + 17  # for both networks
    assert device.downloads == len(videos) * len(BOTH)
    assert device.waiting
    assert threading.current_thread() not in device.waiting
    assert set(batches) == {4}  # one shape, padded
    for name, result in results.items():
        for modality, features in result.features.items():
            np.testing.assert_array_equal(features.data, alone[name][modality].data)


class SlowNetwork(SnippetNetwork):
    """Rows of zeros, after a while."""

    info = {"device": "simulated"}  # noqa: RUF012

    def __init__(self, spec, seconds: float) -> None:
        self.spec, self.seconds, self.flow_backend = spec, seconds, "auto"
        self.preprocessing, self.device = spec.preprocessing, torch.device("cpu")
        self.windows_per_call = 4

    def rows(self, windows_BTHWC):
        time.sleep(self.seconds)
        return torch.zeros(len(windows_BTHWC), 8)


class SlowDecoder:
    """Videos of CHUNKS chunks of 16 frames; a child works on each for a while, in two slots."""

    CHUNKS = 4

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def frames(self, path: Path, **_: object) -> SlowDecoder:
        self.info = VideoInfo(64, 48, RATE, 16 * self.CHUNKS / RATE, 16 * self.CHUNKS, "", "none")
        self.fps, self.sample_count = RATE, 16 * self.CHUNKS
        return self

    def __iter__(self) -> Iterator[SimpleNamespace]:
        done = time.monotonic()
        free = [done, done]
        for index in range(self.CHUNKS):
            done = max(done, free[-2]) + self.seconds
            time.sleep(max(0.0, done - time.monotonic()))
            frames_NHWC = np.full((16, 48, 64, 3), index, np.uint8)
            times_N = (16 * index + np.arange(16)) / RATE
            yield SimpleNamespace(frames_NHWC=frames_NHWC, times_N=times_N)
            free.append(time.monotonic())

    def close(self) -> None:
        pass


@pytest.mark.parametrize("copies", [False, True])
def test_the_stages_run_at_the_same_time(
    tmp_path, tiny_extractor, tiny_flow_extractor, monkeypatch, simulated, copies
):
    """Decoding, flow with the networks, and writing: each 1.2 s if nothing else went on."""
    if not copies:
        monkeypatch.undo()

    def slow_flow(first_NHW, second_NHW, **_):
        time.sleep(0.001 * len(first_NHW))
        return torch.stack([first_NHW.float()] * 2, dim=1)

    monkeypatch.setattr(flow_frames, "tvl1", slow_flow)
    specs = [describe(str(folder)) for folder in (tiny_extractor, tiny_flow_extractor)]
    networks = {spec.modality: SlowNetwork(spec, 0.009) for spec in specs}
    decoders = [SlowDecoder(0.05) for _ in range(1)]
    jobs = [Job(i, tmp_path / f"{i}.mp4", BOTH) for i in range(6)]

    def save(job: Job, features: Features) -> None:
        time.sleep(0.1)

    begin = time.perf_counter()
    with Conveyor(networks, decoders=decoders) as conveyor:  # type: ignore[arg-type]
        results = results_of(conveyor, jobs, save=save)
    wall = time.perf_counter() - begin
    stages = {
        name: sum(result.seconds[name] for result in results.values())
        for name in ("prepare", "flow", "network", "write")
    }
    assert stages["write"] >= 1.2
    device = stages["prepare"] + stages["flow"] + stages["network"]
    decode = 0.05 * SlowDecoder.CHUNKS * len(jobs)
    slowest, total = max(decode, device, stages["write"]), decode + device + stages["write"]
    # One after another they would take the total; 1.5 times the slowest where all are equal.
    assert wall < slowest + (total - slowest) / 4


def failing_rows(monkeypatch, error: Exception) -> None:
    """The network fails where a window's first frame is of 150."""
    rows = SnippetNetwork.rows

    def failing(self, windows_BTHWC):
        if (windows_BTHWC[:, 0].flatten(1) == 150).all(1).any():
            raise error
        return rows(self, windows_BTHWC)

    monkeypatch.setattr(SnippetNetwork, "rows", failing)


@pytest.mark.parametrize("error", [MemoryError("No memory."), RuntimeError("CUDA out of memory.")])
def test_a_failing_batch_costs_only_the_video_that_fails(
    tmp_path, networks, monkeypatch, error, simulated
):
    """In one batch with those of two others, and the other modality goes on."""
    failing_rows(monkeypatch, error)
    paths = []
    for name, shade in (("a", 30), ("bad", 150), ("c", 90)):
        paths.append(tmp_path / f"{name}.mp4")
        write_video(paths[-1], np.full((20, 32, 32, 3), shade, np.uint8), fps=RATE)
    networks["rgb"].windows_per_call = 64
    with Conveyor(networks, decoders=3) as conveyor:
        results = results_of(conveyor, jobs_of(paths))
    assert [sorted(results[name].features) for name in ("a", "bad", "c")] == [
        ["flow", "rgb"], ["flow"], ["flow", "rgb"],
    ]  # fmt: skip
    (failure,) = results["bad"].failures
    assert str(failure).startswith(f"{paths[1]}: no rgb features. {type(error).__name__}: ")
    assert failure.__cause__ is error


def test_what_cannot_be_read_or_saved_costs_one_video(tmp_path, videos, networks):
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    small = make_video(tmp_path / "small.mp4", 5, width=16, height=8)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(videos[2].read_bytes()[:-2000])
    bad = [tmp_path / "missing.mp4", tmp_path / "text.mp4", small, cut]
    saved: list[tuple[object, str]] = []

    def save(job: Job, features: Features) -> None:
        if job.key == "b" and features.modality == "flow":
            raise OSError(28, "No space left on device")
        saved.append((job.key, features.modality))

    order = [bad[0], videos[0], bad[1], videos[1], bad[2], bad[3], videos[2], videos[3]]
    with Conveyor(networks, decoders=2) as conveyor:
        results = results_of(conveyor, jobs_of(order), save=save)
    for path in bad:
        (failure,) = results[path.stem].failures
        assert isinstance(failure, VideoError)
        assert not results[path.stem].features
    assert [type(f) for f in results["b"].failures] == [OSError]
    assert list(results["b"].features) == ["rgb"]
    whole = [(name, modality) for name in "abcd" for modality in BOTH]
    assert sorted(saved) == sorted(set(whole) - {("b", "flow")})  # type: ignore[type-var]
    assert results["c"].seconds["decode"] > 0
    assert results["a"].video_seconds == pytest.approx(40 / RATE)


def test_a_decoder_that_dies_or_stalls_costs_one_video(tmp_path, videos, networks):
    long = make_video(tmp_path / "long.mp4", 400, rate=RATE, width=160, height=120)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        with Conveyor(networks, decoders=1, stall_seconds=2.0) as conveyor:
            struck: list[int] = []

            def strike(job: Job, fraction: float, number=number, struck=struck, c=conveyor) -> None:
                if job.key == "long" and not struck:
                    struck.append(c._decoders[0]._child.pid)
                    os.kill(struck[0], number)

            results = results_of(conveyor, jobs_of([long, *videos], ("rgb",)), progress=strike)
        assert struck
        (failure,) = results.pop("long").failures
        assert "crash" in str(failure) or "delivered nothing" in str(failure)
        assert all(result.features for result in results.values())


@pytest.mark.parametrize("way", ["generator", "conveyor", "interrupt"])
def test_an_end_in_the_middle_is_prompt_and_leaves_nothing(tmp_path, networks, way):
    long = make_video(tmp_path / "long.mp4", 400, rate=RATE, width=160, height=120)
    blocked = threading.Event()

    def jobs() -> Iterator[Job]:
        yield Job("first", long, ("rgb",))
        yield Job("second", long, BOTH)
        blocked.wait()

    def interrupt(job: Job, fraction: float) -> None:
        pids.extend(d._child.pid for d in conveyor._decoders if d._child is not None)
        begin.append(time.monotonic())
        if way == "interrupt":
            raise KeyboardInterrupt
        if way == "conveyor":
            conveyor.close()

    pids: list[int] = []
    begin: list[float] = []
    conveyor = Conveyor(networks, decoders=3)
    results = conveyor.run(jobs(), progress=interrupt)
    if way == "generator":
        assert next(results).features
        begin.append(time.monotonic())
        results.close()
    elif way == "conveyor":
        assert list(results) == []
    else:
        with pytest.raises(KeyboardInterrupt):
            list(results)
    assert time.monotonic() - begin[-1] < 4
    conveyor.close()
    blocked.set()
    assert pids
    for pid in set(pids):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_errors_of_the_callers_own_reach_him(videos, networks):
    def jobs() -> Iterator[Job]:
        yield from jobs_of(videos[:1])
        raise MmdistError("No more of these.")

    with Conveyor(networks, decoders=1) as conveyor:
        with pytest.raises(MmdistError, match="No more of these"):
            list(conveyor.run(jobs()))
        assert len(list(conveyor.run(jobs_of(videos)))) == len(videos)
        assert list(conveyor.run([])) == []


def test_a_caller_may_bring_a_decoder(videos, networks):
    with Decoder() as decoder:
        for _ in range(2):
            assert extract_video(videos[1], [networks["rgb"]], decoder)
        assert decoder._child is not None  # left open
