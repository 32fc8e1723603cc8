"""Many videos by worker processes: deaths, signals, concurrent runs, shards, lists and logs."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from make_videos import make_video

from mmdist_e2e.cli import common
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors import batch, worker
from mmdist_e2e.extractors import journal as batch_journal
from mmdist_e2e.extractors.batch import Engine, device_named, resolve_devices
from mmdist_e2e.extractors.journal import Failure, Journal
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.search import (
    Outcome,
    Video,
    find_videos,
    in_shard,
    list_lines,
    read_list,
)
from mmdist_e2e.extractors.video.reader import _read_messages
from mmdist_e2e.store import FeatureStore, digest_of
from mmdist_e2e.structures import MmdistError

# What a worker process does when it sees these videos; by a sitecustomize, not in the product.
HOOK = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
if "mmdist_e2e.extractors.worker" in sys.orig_argv:
    (here / f"worker-{os.getpid()}").touch()
    import importlib.abc, importlib.machinery

    def hooked(function):
        def frames(self, path, **options):
            name = path.stem
            if name.startswith("poison"):
                os.kill(os.getpid(), signal.SIGKILL)
            if name.startswith("once"):
                try:
                    (here / name).touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGSEGV)
            if name.startswith("slow"):
                (here / f"sees-{name}").touch()
                time.sleep(float(os.environ.get("SLOW_SECONDS", "60")))
            return function(self, path, **options)
        return frames

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "mmdist_e2e.extractors.video.reader":
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path)
            load = spec.loader.exec_module
            def exec_module(module):
                load(module)
                module.Decoder.frames = hooked(module.Decoder.frames)
            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder with a sitecustomize that makes workers die or wait over videos by their names."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOOK)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), before])))
    return folder


def make(folder: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        path = folder / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_video(path, 20 + index)
    return folder


def command(tiny: Path, out: Path, *arguments: object) -> list[str]:
    given = ["extract", *map(str, arguments), "--out", str(out), "--extractor", str(tiny)]
    return [sys.executable, "-m", "mmdist_e2e.cli.main", *given, "--device", "cpu"]


def run(tiny: Path, out: Path, *arguments: object) -> tuple[int, str]:
    """Exit code and output of an extraction in this process."""
    result = CliRunner().invoke(main, command(tiny, out, *arguments)[3:])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def bytes_of(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.npz")}


def log_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


@pytest.mark.slow
def test_the_same_bytes_from_any_number_of_workers(tmp_path, tiny_extractor, tiny_flow_extractor):
    make(tmp_path / "in", "a", "b/c", "d")
    made = []
    for workers in (0, 1, 2):
        out = tmp_path / f"f{workers}"
        options = ("--extractor", tiny_flow_extractor, "--workers", workers)
        code, output = run(tiny_extractor, out, tmp_path / "in", *options)
        assert code == 0, output
        made.append(bytes_of(out))
        assert not (out / ".mmdist").exists()
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 6


def test_no_worker_starts_when_nothing_is_to_be_done(tmp_path, tiny_extractor, site):
    make(tmp_path / "in", "a")
    assert run(tiny_extractor, tmp_path / "f", tmp_path / "in", "--workers", 0)[0] == 0
    assert run(tiny_extractor, tmp_path / "f", tmp_path / "in")[0] == 0
    assert not list(site.glob("worker-*"))


@pytest.mark.slow
def test_dead_workers_are_replaced_and_poison_is_given_up(tmp_path, tiny_extractor, site):
    make(tmp_path / "in", "a", "b", "once", "poison", "c")
    out, log = tmp_path / "f", tmp_path / "log"
    code, output = run(tiny_extractor, out, tmp_path / "in", "--log", log)
    assert code == 3, output
    died = re.search(r"poison.mp4 was given up: (\d) worker processes died .*SIGKILL", output)
    assert died is not None
    assert int(died[1]) in (2, 3)  # SIGKILL does not count where the worker had other videos
    lines = {line["id"]: line for line in log_of(log)}
    assert {n: line["status"] for n, line in lines.items()} == {
        **dict.fromkeys(["a", "b", "c", "once"], "done"),
        "poison": "failed",
    }
    assert (lines["once"]["attempts"], lines["poison"]["attempts"]) == (2, int(died[1]))
    assert lines["poison"]["error"] == "WorkerDied"
    assert (out / "failed.txt").read_text() == f"# root: {tmp_path / 'in'}\npoison.mp4\n"
    assert Journal(out).failures()[0].id == "poison"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_end_the_run_and_all_its_processes(tmp_path, tiny_extractor, site, number):
    make(tmp_path / "in", "quick", "slow")
    out, log = tmp_path / "f", tmp_path / "log"
    arguments = command(tiny_extractor, out, tmp_path / "in", "--workers", 2, "--log", log)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until(lambda: (site / "sees-slow").exists() and log.exists() and log.read_text())
    begun = time.monotonic()
    for _ in range(1 if number == signal.SIGKILL else 3):
        process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - begun < 10
    assert process.returncode == {2: 130, 15: 143, 9: -9}[number]
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert "stopped" in output
    workers = [int(p.name.partition("-")[2]) for p in site.glob("worker-*")]
    assert len(workers) == 2
    until(lambda: not any(alive(pid) for pid in workers), 10)
    assert [p.name for p in out.iterdir() if p.name != ".mmdist"] == ["quick.rgb.npz"]
    assert Journal(out).running() == []
    os.environ["SLOW_SECONDS"] = "0"
    try:
        code, output = run(tiny_extractor, out, tmp_path / "in")
    finally:
        del os.environ["SLOW_SECONDS"]
    assert code == 0, output
    assert "skipped │      1" in output


def alive(pid: int) -> bool:
    """Whether any process of the group lives, zombies aside."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == pid and state != "Z":
            return True
    return False


@pytest.mark.slow
def test_two_runs_on_one_folder_share_the_work(tmp_path, tiny_extractor, site, monkeypatch):
    make(tmp_path / "in", *(f"v{i}" for i in range(6)), "slow1", "poison")
    (tmp_path / "in" / "bad.mp4").write_text("no video " * 30)
    monkeypatch.setenv("SLOW_SECONDS", "2")
    logs = [tmp_path / "log0", tmp_path / "log1"]
    runs = [
        subprocess.Popen(
            command(tiny_extractor, tmp_path / "f", tmp_path / "in", "--log", log),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for log in logs
    ]
    assert [process.wait(120) for process in runs] == [3, 3]
    lines = [log_of(log) for log in logs]
    assert [len(of_one) for of_one in lines] == [9, 9]
    ours = Counter(line["id"] for of_one in lines for line in of_one if line["attempts"])
    assert ours == dict.fromkeys([*(f"v{i}" for i in range(6)), "slow1", "poison", "bad"], 1)
    for of_one in lines:
        assert {x["id"] for x in of_one if x["status"] == "failed"} == {"bad", "poison"}
        assert all(x["cause"] == "by another run" for x in of_one if x["status"] == "skipped")
    assert len(bytes_of(tmp_path / "f")) == 7


def test_a_video_of_a_run_that_died_is_done_by_the_other(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a", "b")
    store = FeatureStore(tmp_path / "f")
    held = Journal(store.root).claim("a")
    assert held is not None
    assert Journal(store.root).claim("a") is None
    assert Journal(store.root).running() == ["a"]
    threading.Timer(1.5, held.close).start()
    begun = time.monotonic()
    engine = Engine([describe(str(tiny_extractor))], store, devices=["cpu"])
    with engine:
        report = engine.run(find_videos([tmp_path / "in"]).videos)
    assert time.monotonic() - begun > 1.4
    assert [outcome.status for outcome in report.outcomes] == ["done", "done"]
    assert not (store.root / ".mmdist").exists()


def test_without_locks_a_warning_says_so_once(tmp_path, tiny_extractor, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", none)
    make(tmp_path / "in", "a", "b")
    code, output = run(tiny_extractor, tmp_path / "f", tmp_path / "in", "--workers", 0)
    assert code == 0
    assert output.count("No locks can be had") == 1


def test_shards_partition_whatever_the_listing(tmp_path, tiny_extractor):
    names = [f"v{i}" for i in range(40)]
    shards = [{name for name in names if in_shard(name, (i, 3))} for i in range(3)]
    assert sum(map(len, shards)) == 40
    assert set.union(*shards) == set(names)
    assert all(len(shard) > 5 for shard in shards)
    make(tmp_path / "in", *names[:5])
    made = []
    for index in range(3):
        out = tmp_path / f"f{index}"
        arguments = (tmp_path / "in", "--workers", 0, "--shard", f"{index}/3")
        assert run(tiny_extractor, out, *arguments)[0] == 0
        made += [name.removesuffix(".rgb.npz") for name in bytes_of(out)]
    assert sorted(made) == names[:5]


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3", "0/0"])
def test_a_wrong_shard_is_one_sentence(tmp_path, tiny_extractor, shard):
    code, output = run(tiny_extractor, tmp_path / "f", tmp_path, f"--shard={shard}")
    assert code == 1
    assert output.count("\n") == 1
    assert "0/3, 1/3 and 2/3" in output


ODD = ["plain", "line\nfeed", "caf\udce9", "#hash", '"quoted"', " spaces ", "日本", "sub/deep/x"]
ODD += ["back\\slash", "cr\r", "cafe\u0301", "# root: x"]


def test_lists_give_back_names_of_any_bytes(tmp_path):
    for name in ODD:
        path = tmp_path / "in" / f"{name}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode(errors="replace"))
    found = find_videos([tmp_path / "in", tmp_path / "in" / "plain.mp4"])
    data = os.fsencode(list_lines(found.videos))
    again = find_videos([], lists=read_list(data))
    assert {(v.id, v.path) for v in again.videos} == {(v.id, v.path) for v in found.videos}
    assert len(again.videos) == len(ODD)
    assert again.problems == []


def test_ids_of_a_list_are_relative_to_the_root_in_force(tmp_path, monkeypatch):
    make(tmp_path / "data", "a", "s/b", "t/c")
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"

    def ids(text: str, given: Path | None = None) -> list[str]:
        found = find_videos([], lists=read_list(text.encode(), given))
        return [video.id for video in found.videos] + [p.cause for p in found.problems]

    assert ids("data/a.mp4\r\n\r\n# a comment\n./data/s/b.mp4\n") == ["data/a", "data/s/b"]
    assert ids("\ufeffdata/a.mp4\r\ndata/s/b.mp4") == ["data/a", "data/s/b"]
    assert ids(f"\ufeff# root: {root}\r\ns/b.mp4\r\n") == ["s/b"]
    assert ids(f"{root}/s/b.mp4\n") == ["b"]
    assert ids(f"{root}/s/b.mp4\ns/../t/c.mp4\n", root) == ["s/b", "t/c"]
    assert ids(f"# root: {root}/s\nb.mp4\n# root: data/t\nc.mp4") == ["b", "c"]
    for line in ("../out.mp4", "/etc/out.mp4", "s/../../../out.mp4"):
        (cause,) = ids(f"{line}\n", root)
        assert "is not in the folder" in cause
    assert "is not in the folder" in ids("../out.mp4")[0]
    assert "is a folder" in ids("data/s\n")[0]
    with pytest.raises(MmdistError, match=r"Line 2 .* no JSON string"):
        read_list(b'a.mp4\n"b.mp4\n')
    for bad in ("../x", "/x", "a//b", "./b", "a/../../b", "a\0b"):
        with pytest.raises(MmdistError, match="no path inside"):
            FeatureStore(tmp_path).path(bad, "rgb")


def test_failed_videos_are_listed_and_tried_again(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a", "sub/b")
    (tmp_path / "in" / "sub" / "b.mp4").write_text("no video " * 30)
    (tmp_path / "names").write_text(f"# root: {tmp_path}/in\na.mp4\nsub/b.mp4\nmissing.mp4\n")
    out = tmp_path / "f"
    code, output = run(tiny_extractor, out, "--list", tmp_path / "names", "--workers", 0)
    assert code == 3
    assert "missing.mp4 does not exist" in output
    assert f"mmdist extract --list {out}/failed.txt" in output
    assert (out / "failed.txt").read_text() == f"# root: {tmp_path}/in\nmissing.mp4\nsub/b.mp4\n"
    code, output = run(tiny_extractor, out, "--list", out / "failed.txt", "--workers", 0)
    assert code == 1, "none of these was extracted"
    make(tmp_path / "in", "sub/b", "missing")
    code, output = run(tiny_extractor, out, "--list", out / "failed.txt", "--workers", 0)
    assert code == 0, output
    assert sorted(bytes_of(out)) == ["a.rgb.npz", "missing.rgb.npz", "sub/b.rgb.npz"]
    assert not (out / "failed.txt").exists()
    assert not (out / ".mmdist").exists()


def test_a_list_comes_from_stdin(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a")
    arguments = [*command(tiny_extractor, tmp_path / "f")[3:], "--list", "-", "--workers", "0"]
    result = CliRunner().invoke(main, [*arguments, "--root", str(tmp_path)], input="in/a.mp4\n")
    assert result.exit_code == 0, result.output
    assert list(bytes_of(tmp_path / "f")) == ["in/a.rgb.npz"]


def test_a_run_that_cannot_write_stops_soon(tmp_path, tiny_extractor, monkeypatch):
    make(tmp_path / "in", *(f"v{i}" for i in range(9)))
    save, tried = FeatureStore.save, []

    def full(self, video_id, features):
        tried.append(video_id)
        if len(tried) > 1:
            raise MmdistError("f could not be written (No space left on device).")
        return save(self, video_id, features)

    monkeypatch.setattr(FeatureStore, "save", full)
    code, output = run(tiny_extractor, tmp_path / "f", tmp_path / "in", "--workers", 0)
    assert code == 1
    assert "5 videos in a row could not be written" in output.splitlines()[-1]
    assert len(tried) < 9
    monkeypatch.undo()
    assert run(tiny_extractor, tmp_path / "f", tmp_path / "in", "--workers", 0)[0] == 0
    assert len(bytes_of(tmp_path / "f")) == 9


def test_elsewhere_than_in_a_terminal_progress_is_lines(monkeypatch, capsys):
    lines: list[str] = []
    monkeypatch.setattr(common, "say", lines.append)
    monkeypatch.setattr(common, "LINE_SECONDS", 0.05)
    videos = [Video(name, Path(name)) for name in "abc"]
    with common.ExtractionProgress(3) as progress:
        progress.planned(dict.fromkeys(videos, 100))
        progress.advanced(videos[0], 0.0)
        progress.finished(Outcome(videos[0], "done", video_seconds=3600.0, attempts=1))
        progress.advanced(videos[1], 0.5)
        until(lambda: len(lines) > 1, 5)
    pattern = (
        r"1 of 3 videos, 0 failed, [\d.]+ videos/s, [\d.]+ hours of video per hour, "
        r"\d+:\d\d:\d\d left; running: b"
    )
    assert re.fullmatch(pattern, lines[0]), lines[0]


def test_devices(monkeypatch):
    assert [device_named(x) for x in ("0", "cuda:1", "cuda", " cpu", "all")] == [
        *("cuda:0", "cuda:1", "cuda:0", "cpu", "all")
    ]
    for bad in ("", "cpu:x", "gpu", "-1", "cuda:"):
        with pytest.raises(MmdistError, match="valid: auto, all, cpu"):
            device_named(bad)
    monkeypatch.setattr(batch, "gpu_count", lambda: 2)
    assert resolve_devices(["auto"]) == resolve_devices(["all", "cuda:1"]) == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(batch, "gpu_count", lambda: 0)
    assert resolve_devices(["auto"]) == ["cpu"]
    with pytest.raises(MmdistError, match="no GPU"):
        resolve_devices(["all"])


def test_a_network_that_cannot_be_loaded_stops_the_run_with_one_message(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a", "b")
    spec = describe(str(tiny_extractor))
    broken = Engine([spec], FeatureStore(tmp_path / "g"), devices=["cpu"], workers=1, precision="x")
    with pytest.raises(MmdistError, match="The precision 'x' is unknown"):
        broken.run(find_videos([tmp_path / "in"]).videos)


def test_a_stuck_worker_is_noticed():
    process = batch._Worker.__new__(batch._Worker)
    process.tasks, process._ready, process._silent = {"a": None}, True, 0.0
    assert process.stuck(599.0, 600.0) is None
    assert "no progress for 601 seconds" in str(process.stuck(2.0, 600.0))
    process.heard()
    assert process.stuck(599.0, 600.0) is None
    process.tasks = {}
    assert process.stuck(599.0, 600.0) is None, "it waits for a video"


def test_a_message_that_death_cut_short_ends_the_conversation():
    heard: list[Any] = []
    _read_messages(io.BytesIO(b'{"say": 1}\n{"say": '), heard.append)
    assert heard == [{"say": 1}, None]


@pytest.mark.slow
def test_a_run_whose_workers_all_die_stops(tmp_path, tiny_extractor, site, monkeypatch):
    monkeypatch.setattr(batch, "DEATHS_IN_A_ROW", 2)
    make(tmp_path / "in", "poison1", "poison2")
    code, output = run(tiny_extractor, tmp_path / "f", tmp_path / "in", "--decoders", 1)
    assert code == 1
    assert "2 worker processes in a row ended" in output.splitlines()[-1]
    monkeypatch.setattr(batch, "DEATHS_IN_A_ROW", 3)  # second tries do not count
    run(tiny_extractor, tmp_path / "f", tmp_path / "in", "--decoders", 1)
    listed = (tmp_path / "f" / "failed.txt").read_text().splitlines()
    assert sorted(listed[1:]) == ["poison1.mp4", "poison2.mp4"]


@pytest.mark.slow
def test_more_workers_than_videos(tmp_path, tiny_extractor, site):
    make(tmp_path / "in", "a", "b")
    code, output = run(tiny_extractor, tmp_path / "f", tmp_path / "in", "--workers", 5)
    assert code == 0, output
    assert len(list(site.glob("worker-*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_before_the_first_video_give_the_same_exit_codes(tmp_path, tiny_extractor, number):
    arguments = command(tiny_extractor, tmp_path / "f", "--list", "-")
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(arguments, **pipes)
    process.stdin.write(b"# more than a pipe holds\n" * 10000)  # returns when it is being read
    time.sleep(0.5)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert process.stderr.read() == b""
    process.stdin.close()


def test_a_list_without_videos_is_done(tmp_path, tiny_extractor):
    for text in (b"", b"\xef\xbb\xbf# only a comment\r\n"):
        (tmp_path / "list").write_bytes(text)
        code, output = run(tiny_extractor, tmp_path / "f", "--list", tmp_path / "list")
        assert code == 0, output
    make(tmp_path / "in", "a")
    shards = (
        run(tiny_extractor, tmp_path / "f", tmp_path / "in", f"--shard={i}/2", "--workers=0")
        for i in range(2)
    )
    assert [code for code, _ in shards] == [0, 0]


def test_the_folder_of_a_log_is_made(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a")
    arguments = (tmp_path / "in", "--workers", 0, "--log")
    assert run(tiny_extractor, tmp_path / "f", *arguments, tmp_path / "f" / "x" / "log")[0] == 0
    assert len(log_of(tmp_path / "f" / "x" / "log")) == 1
    bad = tmp_path / "in" / "a.mp4" / "log"
    code, output = run(tiny_extractor, tmp_path / "f", *arguments, bad)
    assert code == 1
    assert output.count("\n") == 1
    assert f"{bad} cannot be written ({bad.parent}: File exists)" in output


def test_settings_of_a_worker_yield_to_the_users(tmp_path, tiny_extractor, monkeypatch):
    monkeypatch.setattr(batch, "_Worker", lambda number, what, environment, events: environment)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    store = FeatureStore(tmp_path / "f")
    engine = Engine([describe(str(tiny_extractor))], store, devices=["cpu"], workers=2)
    engine._slots = ["cpu"]
    alone = engine._start(0, "cpu")
    assert (alone["OMP_WAIT_POLICY"], alone["MALLOC_TOP_PAD_"]) == ("ACTIVE", str(2**26))
    assert "OMP_NUM_THREADS" not in alone
    for given, expected in (("", "4"), ("3,2", "3"), ("16", "4")):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        engine._slots = ["cpu"] * 2
        assert engine._start(0, "cpu")["OMP_NUM_THREADS"] == expected


def test_workers_that_cannot_start_are_one_sentence(tmp_path, tiny_extractor, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    make(tmp_path / "in", "a")
    monkeypatch.setattr(batch, "Child", fails)
    code, output = run(tiny_extractor, tmp_path / "f", tmp_path / "in")
    assert code == 1
    assert "worker process cannot be started (Cannot allocate memory)" in output.splitlines()[-1]
    assert not (tmp_path / "f" / ".mmdist").exists()


def test_what_a_dead_worker_saved_is_not_made_again(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a", "b")
    store, spec = FeatureStore(tmp_path / "f"), describe(str(tiny_extractor))
    videos = find_videos([tmp_path / "in"]).videos
    with Engine([spec], store, devices=["cpu"]) as engine:
        engine.run(videos[:1])
        begun = batch._Run(engine, videos, None)
        task = begun.take()
        assert (task.video.id, task.modalities) == ("b", ["rgb"])
        begun._matters["flow"] = {}
        task.modalities = ["rgb", "flow"]
        task.claim.close()
        engine.run(videos)  # as if our worker had saved these rows
        for _ in range(2):
            begun.lost(task, "signal SIGSEGV", 0, accused=True)
    (failure,) = Journal(store.root).failures()
    assert failure.modalities == ["flow"]
    assert failure.attempts == 2


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(tmp_path, tiny_extractor, closed):
    make(tmp_path / "in", "a")
    line = shlex.join(command(tiny_extractor, tmp_path / "f", tmp_path / "in"))
    assert subprocess.run(["/bin/sh", "-c", f"{line} {closed}"], check=False).returncode == 0
    assert list(bytes_of(tmp_path / "f")) == ["a.rgb.npz"]


def test_the_record_of_one_modality_survives_the_success_of_another(tmp_path):
    journal = Journal(tmp_path)
    journal.note(Failure("a", "/a.mp4", ["flow"], "w", "E", "why", 1, "r"))
    journal.forget("a", ["rgb"])
    assert [failure.id for failure in journal.failures()] == ["a"]
    journal.forget("a", ["rgb", "flow"])
    assert journal.failures() == []


def test_a_stale_claim_is_removed_and_a_new_one_is_not(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    path = tmp_path / ".mmdist" / "claims" / f"{digest_of('a')[:16]}.lock"
    path.parent.mkdir(parents=True)
    path.touch()
    lock, claims = batch_journal._lock, []

    def late(descriptor, **options):  # another run claims the video after the file was opened
        if not claims:
            claims.append(None)
            path.unlink()
            claims.append(journal.claim("a"))
        return lock(descriptor, **options)

    monkeypatch.setattr(batch_journal, "_lock", late)
    journal.close()
    assert path.exists()
    claims[1].close()
    path.touch()
    journal.close()
    assert not path.exists()


def test_status_counts_causes_and_running(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a", "b")
    (tmp_path / "in" / "bad.mp4").write_text("no video " * 30)
    out = tmp_path / "f"
    assert run(tiny_extractor, out, tmp_path / "in", "--workers", 0)[0] == 3
    FeatureStore(out).path("a", "rgb").rename(out / "a.flow.npz")
    claim = Journal(out).claim("now\n")
    result = CliRunner().invoke(main, ["status", str(out), "--json"])
    assert result.exit_code == 0
    facts = json.loads(result.output)
    assert facts["modalities"] == {"rgb": 1, "flow": 1}
    assert (facts["videos"], facts["complete"]) == (2, 0)
    assert facts["lacking"] == {"rgb": ["a"], "flow": ["b"]}
    assert facts["running"] == ["now\n"]
    (failed,) = facts["failed"]
    assert (failed["id"], failed["modalities"]) == ("bad", ["rgb"])
    assert "is not a video" in failed["cause"]
    text = CliRunner().invoke(main, ["status", str(out)]).output
    assert "now\ufffd" in text
    assert "bad (rgb): " in text
    assert claim is not None
    claim.close()
    assert Journal(out).running() == []
    gone = CliRunner().invoke(main, ["status", str(tmp_path / "none")])
    assert (gone.exit_code, gone.output.count("\n")) == (1, 1)


def test_a_log_holds_one_line_for_each_video(tmp_path, tiny_extractor):
    make(tmp_path / "in", "a", "caf\udce9")
    (tmp_path / "in" / "bad.mp4").write_text("no video " * 30)
    arguments = (tmp_path / "in", tmp_path / "none.mp4", "--workers", 0, "--log", tmp_path / "log")
    assert run(tiny_extractor, tmp_path / "f", *arguments)[0] == 3
    lines = {line["id"]: line for line in log_of(tmp_path / "log")}
    assert set(lines) == {"a", "caf\udce9", "bad", str(tmp_path / "none.mp4")}
    done = lines["caf\udce9"]
    assert (done["status"], done["rows"], done["attempts"]) == ("done", {"rgb": 2}, 1)
    assert done["video_seconds"] > 0
    assert sum(done["seconds"].values()) > 0
    assert (lines["bad"]["status"], lines["bad"]["error"]) == ("failed", "VideoError")
    assert run(tiny_extractor, tmp_path / "f", *arguments)[0] == 3
    again = log_of(tmp_path / "log")[4:]
    assert Counter(line["status"] for line in again) == {"skipped": 2, "failed": 2}


def test_facts_name_the_root_of_a_failure():
    class Result:
        def __init__(self, error: Exception) -> None:
            self.failures, self.features, self.seconds = [error], {}, {}
            self.job, self.video_seconds = Video("a", Path("a.mp4")), 0.0

    inner = RuntimeError("CUDA out of memory")
    outer = MmdistError("a.mp4: no rgb features.")
    outer.__cause__ = inner
    told = worker.facts(Result(outer))  # type: ignore[arg-type]
    assert (told["error"], told["unwritable"]) == ("RuntimeError", False)
    assert worker.facts(Result(worker.WriteError("x")))["unwritable"]  # type: ignore[arg-type]
