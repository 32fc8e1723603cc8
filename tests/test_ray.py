"""The engine on Ray gives what the local one gives, whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from make_videos import make_video

from mmdist_e2e.extractors.engines import ray as ray_engine
from mmdist_e2e.extractors.engines.ray import RayEngine
from mmdist_e2e.extractors.search import Outcome, Video
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.structures import MmdistError


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos and two that are none."""
    pytest.importorskip("ray.data", reason="needs the extra ray")
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    for index in range(10):
        make_video(folder / "sub" / f"v{index}.mp4", 400 - 30 * index)
    (folder / "bad.mp4").write_bytes(b"no video" * 999)
    (folder / "empty.mp4").touch()
    return folder


def extract(videos: Path, out: Path, extractor: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmdist_e2e.cli.main", "extract", str(videos)]
    command += ["--out", str(out), "--extractor", str(extractor), "--devices", "cpu"]
    command += ["--workers", "2", "--log", f"{out}.jsonl", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def found_in(out: Path) -> dict[str, bytes]:
    """Features and failed.txt by path."""
    files = [*out.rglob("*.npz"), *out.glob("failed.txt")]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def lines_of(out: Path) -> dict[str, dict[str, Any]]:
    """The log without what differs from run to run."""
    lines = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    how = ("seconds", "worker", "attempts")
    return {line["id"]: {k: v for k, v in line.items() if k not in how} for line in lines}


@pytest.fixture(scope="module")
def local(videos, tiny_extractor, tmp_path_factory) -> tuple[Path, str]:
    """The output folder and the table of the local engine."""
    out = tmp_path_factory.mktemp("local") / "features"
    run = extract(videos, out, tiny_extractor)
    table, notes = run.communicate(timeout=300)
    assert run.returncode == 3, notes
    return out, table


def descendants(pid: int) -> dict[int, str]:
    """Commands of the processes below one."""
    table = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            table[int(path.name)] = (parent, command)
    known = {pid}
    for _ in range(9):
        known |= {number for number, (parent, _) in table.items() if parent in known}
    return {number: table[number][1] for number in known - {pid} if number in table}


def living(processes: dict[int, str]) -> dict[int, str]:
    """Those of the processes that still run: zombies have no command."""
    time.sleep(3)
    now = descendants(1)
    return {pid: args for pid, args in processes.items() if args and now.get(pid) == args}


def when_features(run: subprocess.Popen[str], out: Path, count: int) -> list[int]:
    """Wait for so many feature files; the actors of the run then."""
    while len([*out.rglob("*.npz")]) < count:
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    return [
        pid for pid, args in descendants(run.pid).items() if "ray::" in args and "_Actor" in args
    ]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["nobody", "an actor", "all actors"])
def test_the_same_files_log_and_table_as_the_local_engine(
    victim, videos, local, tiny_extractor, tmp_path
):
    out = tmp_path / "features"
    run = extract(videos, out, tiny_extractor, "--engine", "ray")
    actors = when_features(run, out, 3)
    for pid in actors[: {"nobody": 0, "an actor": 1, "all actors": 9}[victim]]:
        os.kill(pid, signal.SIGKILL)
    below = descendants(run.pid)
    table, notes = run.communicate(timeout=300)
    assert run.returncode == 3
    assert actors
    assert lines_of(out) == lines_of(local[0])
    assert found_in(out).keys() == found_in(local[0]).keys()
    assert found_in(out) == found_in(local[0])
    # Failures are in the order in which they happened.
    assert sorted(table.splitlines()) == sorted(local[1].splitlines())
    assert "ray" not in notes.replace(str(out), "").lower()
    assert not living(below)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_and_it_resumes(number, videos, local, tiny_extractor, tmp_path):
    out = tmp_path / "features"
    run = extract(videos, out, tiny_extractor, "--engine", "ray")
    when_features(run, out, 2)
    below, begun = descendants(run.pid), time.monotonic()
    run.send_signal(number)
    table, notes = run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert time.monotonic() - begun < 30
    assert "stopped" in table
    assert "Traceback" not in notes
    assert not living(below)
    assert not [*out.rglob(".tmp-*")]
    again = extract(videos, out, tiny_extractor, "--engine", "ray")
    _, notes = again.communicate(timeout=300)
    assert again.returncode == 3, notes
    assert found_in(out) == found_in(local[0])


@pytest.mark.slow
def test_ray_listens_on_loopback_alone(videos, tiny_extractor, tmp_path):
    out = tmp_path / "features"
    run = extract(videos, out, tiny_extractor, "--engine", "ray")
    when_features(run, out, 1)
    ours = {*descendants(run.pid), run.pid}
    inodes = set()
    for pid in ours:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                inodes.add(str(link.readlink()).removeprefix("socket:[").removesuffix("]"))
    addresses = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # listening
                addresses[fields[1]] = table
    run.kill()
    run.communicate()
    assert addresses
    local = ("0100007F:", "0000000000000000FFFF00000100007F:", "00000000000000000000000001000000:")
    assert not [address for address in addresses if not address.startswith(local)]


class Stub(RayEngine):
    """What the rounds tell is given: rows by round."""

    def __init__(self, root: Path, rounds: list[list[dict[str, Any]]]) -> None:
        pytest.importorskip("ray.data", reason="needs the extra ray")
        super().__init__([], FeatureStore(root))
        self.rounds, self.asked = rounds, list[tuple[list[int], bool]]()

    def _round(self, names, *, alone):
        self.asked.append(([index for index, *_ in names], alone))
        self._why = " (it was cold)"
        yield from self.rounds.pop(0)


def row(*finished: tuple[int, str], refused: str = "") -> dict[str, Any]:
    told = [(index, {"status": status, "cause": ""}) for index, status in finished]
    return {"finished": told, "warnings": [], "refused": [refused] if refused else []}


def some(tmp_path: Path, count: int) -> list[Video]:
    paths = [tmp_path / f"{index}.mp4" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(b"x" * (index + 1))
    return [Video(path.stem, path) for path in paths]


def test_what_a_round_loses_is_done_alone_and_then_given_up(tmp_path):
    rounds = [
        [row((3, "done")), row((1, "skipped"))],
        [row((2, "skipped"), (3, "done"))],  # lost after it was saved; told twice
        [row()],
    ]
    engine, videos, told = Stub(tmp_path, rounds), some(tmp_path, 4), list[Outcome]()
    nothing = lambda *_: None  # noqa: E731
    progress = SimpleNamespace(planned=nothing, finished=told.append)
    report = engine.run(videos, progress)
    assert engine.asked == [([3, 2, 1, 0], False), ([2, 0], True), ([0], True)]
    assert [o.status for o in report.outcomes] == ["failed", "skipped", "done", "done"]
    assert [o.video for o in report.outcomes] == videos
    assert "the Ray actors that had it died (it was cold)" in report.outcomes[0].cause
    assert sorted(o.video.id for o in told) == ["0", "1", "2", "3"]


def test_a_run_ends_when_an_actor_says_that_every_video_would_fail(tmp_path):
    engine = Stub(tmp_path, [[row((0, "done")), row(refused="The extractor is gone.")]])
    with pytest.raises(MmdistError, match="The extractor is gone"):
        engine.run(some(tmp_path, 2))


@pytest.mark.parametrize(
    ("nodes", "devices", "workers", "actors", "each"),
    [
        ([(3, 0)], "auto", 2, 2, {"num_cpus": 1}),
        ([(17, 0)], "auto", 1, 1, {"num_cpus": 16}),
        ([(3, 0)], "auto", 5, 5, {"num_cpus": 1}),
        ([(17, 0), (9, 0)], "cpu", 4, 4, {"num_cpus": 4}),
        ([(65, 8)], "auto", 1, 8, {"num_cpus": 8, "num_gpus": 1}),
        ([(65, 8)], "cpu", 2, 2, {"num_cpus": 32}),
        ([(65, 8), (4, 0), (33, 8)], "all", 2, 32, {"num_cpus": 2, "num_gpus": 0.5}),
        ([(2, 4)], "all", 1, 4, {"num_cpus": 1, "num_gpus": 1}),
    ],
)
def test_every_gpu_has_its_actors_and_a_cpu_stays_free(
    nodes, devices, workers, actors, each, tmp_path
):
    engine = Stub(tmp_path, [])
    engine._devices, engine._workers = {devices}, workers
    have = [{"Alive": True, "Resources": {"CPU": c, "GPU": g}} for c, g in nodes]
    dead = {"Alive": False, "Resources": {"CPU": 1, "GPU": 1}}
    engine._ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: [*have, dead])
    assert engine._connect() == (actors, each)


def test_messages_for_wrong_settings(tmp_path, monkeypatch):
    engine = Stub(tmp_path, [])
    engine._devices = {"all"}
    node = {"Alive": True, "Resources": {"CPU": 3.0}}
    engine._ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: [node])
    with pytest.raises(MmdistError, match="Ray has no GPU"):
        engine._connect()
    with pytest.raises(MmdistError, match=r"'cuda:1' is unknown; valid: auto, all, cpu"):
        RayEngine([], FeatureStore(tmp_path), devices=["cuda:1"])
    engine = RayEngine([], FeatureStore(tmp_path), address="127.0.0.1:1")
    engine._ray = SimpleNamespace(is_initialized=lambda: False)
    with pytest.raises(MmdistError, match=r"could not be started or reached .*refused.*--address"):
        engine._connect()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MmdistError, match=r"--engine ray needs ray.*mmdist-e2e\[ray\]"):
        RayEngine([], FeatureStore(tmp_path))


class FakeEngine:
    """Finishes what it is given, slowly, and dies over a video of the name `crash`."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def run(self, videos: list[Video], progress: Any) -> None:
        progress.planned(dict.fromkeys(videos, 1))
        for video in videos:
            progress.advanced(video, 0.0)
            time.sleep(0.05)
            if video.id in ("crash", "refuse"):
                raise (RuntimeError if video.id == "crash" else MmdistError)("out of luck")
            progress.finished(Outcome(video, "done", {"rgb": 3}, seconds={"decode": 0.5}))


@pytest.mark.parametrize("last", ["z", "crash", "refuse"])
def test_an_actor_tells_what_has_finished_and_catches_everything(last, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "Engine", FakeEngine)
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    odd = "a\udcff\n"  # a byte that is not UTF-8
    block = [(7, odd, f"/v/{odd}.mp4"), (5, "b", "/v/b.mp4"), (2, last, "/v/z.mp4")]
    store = FeatureStore(tmp_path)
    actor = ray_engine._Actor(tmp_path, 1, 0.02, {"store": store})
    rows = [json.loads(r["told"][0]) for r in actor({"block": [json.dumps(block)]})]
    finished = [each for row in rows for each in row["finished"]]
    assert [index for index, _ in finished] == [7, 5, 2][: 3 if last == "z" else 2]
    assert Outcome(Video("b", Path("b")), **finished[1][1]).seconds == {"decode": 0.5}
    assert any(not row["finished"] for row in rows)  # signs of life
    assert [t for row in rows for t in row["refused"]] == ["out of luck"] * (last == "refuse")
    told = [t for row in rows for t in row["warnings"]]
    assert told == ["A Ray actor failed: RuntimeError: out of luck"] * (last == "crash")
    store.root = tmp_path / "gone"
    (row,) = [json.loads(r["told"][0]) for r in actor({"block": [json.dumps(block)]})]
    assert "all machines share" in row["refused"][0]
    assert threading.active_count() < 20


EXAMPLES = Path(__file__).parents[1] / "examples"

AWS = """
import shutil, sys
from pathlib import Path
source, target = (Path(p.replace("s3://", "{root}/")) for p in sys.argv[-2:])
for path in source.rglob("*") if source.is_dir() else ():
    if path.is_file() and ".mmdist" not in path.parts and path.name != "failed.txt":
        (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.relative_to(source))
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mmdist`, and an `aws` whose buckets are folders in tmp_path, on the PATH."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (tmp_path / "aws.py").write_text(AWS.format(root=tmp_path))
    for name, what in (("mmdist", "-m mmdist_e2e.cli.main"), ("aws", tmp_path / "aws.py")):
        (bin_ / name).write_text(f'#!/bin/bash\nexec "{sys.executable}" {what} "$@"\n')
        (bin_ / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")


def make_few(folder: Path) -> set[str]:
    folder.mkdir()
    for index in range(6):
        make_video(folder / f"v{index}.mp4", 30)
    return {f"v{index}.rgb.npz" for index in range(6)}


@pytest.mark.slow
def test_actors_that_cannot_start_end_the_run(videos, tiny_extractor, tmp_path):
    """As where the package is missing or another one."""
    from mmdist_e2e.extractors.profiles import describe

    engine = RayEngine([describe(tiny_extractor)], FeatureStore(tmp_path / "out"))
    engine._options["stall_seconds"] = None
    with (
        engine,
        pytest.raises(MmdistError, match=r"actors do not start \(TypeError"),
    ):
        engine.run([Video("v0", videos / "sub" / "v0.mp4")])


def bash(*given: object, **variables: object) -> int:
    env = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(["/bin/bash", *map(str, given)], env=env, timeout=300).returncode


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_do_every_video_once(commands, tiny_extractor, tmp_path):
    every, out, done = make_few(tmp_path / "videos"), tmp_path / "out", list[set[str]]()
    more = ["--extractor", tiny_extractor, "--workers", "0"]
    for task in (10, 12, 14):
        array = {"ID": task, "MIN": 10, "STEP": 2, "COUNT": 3}
        variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
        before = {*found_in(out)}
        assert bash(EXAMPLES / "slurm.sh", tmp_path / "videos", out, *more, **variables) == 0
        done.append({*found_in(out)} - before)
    assert sum(map(len, done)) == len(every)
    assert set().union(*done) == every
    assert max(map(len, done)) < len(every)
    assert bash(EXAMPLES / "slurm.sh", tmp_path / "videos") != 0


@pytest.mark.slow
def test_the_nodes_of_the_skypilot_file_do_every_video(commands, tiny_extractor, tmp_path):
    yaml = pytest.importorskip("yaml", reason="reads the file as SkyPilot does")
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert {"num_nodes", "resources", "envs", "setup", "run"} <= task.keys()
    every = make_few(tmp_path / "videos")
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"no video")
    options = f"--workers 0 --extractor {tiny_extractor}"
    for rank in range(3):
        home = tmp_path / f"node{rank}"
        home.mkdir()
        given = {"VIDEOS": tmp_path / "videos", "FEATURES": "s3://bucket", "OPTIONS": options}
        assert given.keys() == task["envs"].keys()
        nodes = {"SKYPILOT_NODE_RANK": rank, "SKYPILOT_NUM_NODES": 3}
        assert bash("-c", task["run"], HOME=home, **given, **nodes) == 0
    assert {*found_in(tmp_path / "bucket")} == every
