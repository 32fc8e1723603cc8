"""Several modalities of a video in one pass, and the ways of running an extractor."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from conftest import edit_config, make_extractor
from make_videos import make_video

import mmdist_e2e as mm
from mmdist_e2e.cli.main import main
from mmdist_e2e.extractors import runner as networks
from mmdist_e2e.extractors.extract import ExtractionError, extract_video
from mmdist_e2e.extractors.flow import fields as flow_frames
from mmdist_e2e.extractors.profiles import describe
from mmdist_e2e.extractors.runner import SnippetNetwork
from mmdist_e2e.extractors.video import reader as video
from mmdist_e2e.extractors.video.reader import Decoder
from mmdist_e2e.store import FeatureStore
from mmdist_e2e.weights.registry import DEFAULT_EXTRACTORS

RATE = 12  # the tiny extractors' frames a second


@pytest.fixture
def counted(monkeypatch):
    """Passes of decoding, pairs solved by a quick stand-in for TV-L1, and networks loaded."""
    counts = {"passes": 0, "pairs": 0, "loaded": []}
    frames, load_network = Decoder.frames, networks.load_network

    def counting_frames(self, *arguments, **options):
        counts["passes"] += 1
        return frames(self, *arguments, **options)

    def solver(first_NHW, second_NHW, **_):
        counts["pairs"] += len(first_NHW)
        first, second = first_NHW.float(), second_NHW.float()
        return torch.stack([second - first, first / 20], dim=1)

    def counting_load(spec):
        counts["loaded"].append(spec.modality)
        return load_network(spec)

    monkeypatch.setattr(video.Decoder, "frames", counting_frames)
    monkeypatch.setattr(flow_frames, "tvl1", solver)
    monkeypatch.setattr(networks, "load_network", counting_load)
    return counts


@pytest.fixture
def both(tiny_extractor, tiny_flow_extractor) -> list[str]:
    return ["--extractor", str(tiny_extractor), "--extractor", str(tiny_flow_extractor)]


def extract(*arguments: object) -> Result:
    return CliRunner().invoke(
        main, ["extract", "--precision", "fp32", "--workers", "0", *map(str, arguments)]
    )


def network_of(folder: Path, **options: str) -> SnippetNetwork:
    return SnippetNetwork(describe(str(folder), **options), device="cpu", precision="fp32")


def test_both_modalities_come_from_one_pass_and_agree(tmp_path, both, counted):
    clip = make_video(tmp_path / "a.mp4", 45, rate=RATE)
    run = extract(clip, "--out", tmp_path / "f", *both)
    assert run.exit_code == 0, run.output
    assert counted == {"passes": 1, "pairs": 44, "loaded": ["rgb", "flow"]}
    rgb, flow = (FeatureStore(tmp_path / "f").load("a", m) for m in ("rgb", "flow"))
    assert len(rgb.data) == len(flow.data) == 6
    np.testing.assert_array_equal(rgb.times, flow.times)
    assert flow.provenance.info["flow_backend"] == "auto"
    assert "flow_backend" not in rgb.provenance.info
    header, done = (
        line.split() for line in run.output.splitlines() if "rows" in line or "done" in line
    )
    assert " ".join(header) == "result ┃ videos ┃ rgb rows ┃ flow rows ┃ cause"
    assert [word for word in done if word.isdigit()] == ["1", "6", "6"]


def test_only_what_is_missing_is_made(tmp_path, both, counted):
    clip = make_video(tmp_path / "a.mp4", 30, rate=RATE)
    out = tmp_path / "f"
    extract(clip, "--out", out, *both)
    stamp = (out / "a.rgb.npz").stat().st_mtime_ns
    first = FeatureStore(out).load("a", "flow")
    counted.update(passes=0, pairs=0, loaded=[])
    assert extract(clip, "--out", out, *both).exit_code == 0
    assert counted == {"passes": 0, "pairs": 0, "loaded": []}
    (out / "a.flow.npz").unlink()
    assert extract(clip, "--out", out, *both).exit_code == 0
    assert counted == {"passes": 1, "pairs": 29, "loaded": ["flow"]}
    assert (out / "a.rgb.npz").stat().st_mtime_ns == stamp
    np.testing.assert_array_equal(FeatureStore(out).load("a", "flow").data, first.data)


@pytest.mark.parametrize("mode", ["windows", "dense"])
def test_chunks_of_frames_change_nothing(tmp_path, tiny_extractor, tiny_flow_extractor, mode):
    """With TV-L1 itself: ours solves each pair alone."""
    clip = make_video(tmp_path / "a.mp4", 40, rate=RATE, width=48, height=32)
    pair = [network_of(f, mode=mode) for f in (tiny_extractor, tiny_flow_extractor)]
    rows = []
    for frames_a_chunk in (1000, 7, 1):
        with Decoder(chunk_bytes=frames_a_chunk * 48 * 32 * 3) as decoder:
            rows.append(extract_video(clip, pair, decoder))
    for other in rows[1:]:
        for modality, features in other.items():
            assert len(features.data) == (5 if mode == "windows" else 4)
            np.testing.assert_array_equal(features.data, rows[0][modality].data)


def test_flow_rows_are_those_of_the_frames(tmp_path, tiny_flow_extractor, counted):
    """Against the rule by hand: grey, pairs, last field again, windows, network."""
    clip = make_video(tmp_path / "a.mp4", 21, rate=RATE, width=48, height=32)
    features = mm.extract(clip, extractor=str(tiny_flow_extractor), precision="fp32")
    with Decoder() as decoder:
        frames = np.concatenate([c.frames_NHWC for c in decoder.frames(clip, fps=RATE)])
    network = network_of(tiny_flow_extractor)
    greys = network.preprocessing.greys(torch.from_numpy(frames))
    assert greys.shape == (21, 16, 24)
    fields = network.preprocessing.fields(flow_frames.tvl1(greys[:-1], greys[1:]))
    fields = torch.cat([fields, fields[-1:]])
    for j in range(3):
        window = fields[np.minimum(np.arange(8 * j, 8 * j + 16), 20)]
        np.testing.assert_allclose(
            features.data[j], network.rows(window[None])[0], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(("policy", "rows"), [("ceiling", 3), ("exact", 6)])
def test_repeated_frames_have_the_flow_between_distinct_ones(tmp_path, both, counted, policy, rows):
    clip = make_video(tmp_path / "a.mp4", 22, rate=RATE // 2)
    run = extract(clip, "--out", tmp_path / "f", "--fps-policy", policy, *both)
    assert run.exit_code == 0, run.output
    assert counted["pairs"] == 21  # never between a frame and itself
    for modality in ("rgb", "flow"):
        features = FeatureStore(tmp_path / "f").load("a", modality)
        assert len(features.data) == rows
        assert features.provenance.matters["fps_policy"] == policy


@pytest.mark.parametrize(("count", "windows", "dense"), [(1, 1, 1), (9, 2, 1), (60, 8, 7)])
def test_row_counts_of_both_modes(tmp_path, both, counted, count, windows, dense):
    clip = make_video(tmp_path / "a.mp4", count, rate=RATE)
    for mode, rows in (("windows", windows), ("dense", dense)):
        run = extract(clip, "--out", tmp_path / mode, "--mode", mode, *both)
        assert run.exit_code == 0, run.output
        for modality in ("rgb", "flow"):
            features = FeatureStore(tmp_path / mode).load("a", modality)
            assert len(features.data) == rows
            assert (features.times[0, 0], features.times[-1, 1]) == (0, features.duration_seconds)


def test_each_frame_rate_has_its_own_pass(tmp_path, tiny_flow_extractor, counted):
    slow = make_extractor(tmp_path / "slow", fps=6.0)
    clip = make_video(tmp_path / "a.mp4", 48, rate=RATE)
    seen: list[float] = []
    with Decoder(chunk_bytes=5 * 96 * 64 * 3) as decoder:
        pair = [network_of(slow), network_of(tiny_flow_extractor)]
        made = extract_video(clip, pair, decoder, progress=seen.append)
    assert {m: len(f.data) for m, f in made.items()} == {"rgb": 3, "flow": 6}
    assert counted["passes"] == 2
    assert seen == sorted(seen)
    assert max(f for f in seen if f <= 0.5) > 0.4
    assert 0.9 < seen[-1] <= 1


@pytest.mark.parametrize("error", [mm.MmdistError("No solver."), MemoryError("No solver.")])
def test_what_another_modality_finished_is_kept(tmp_path, both, counted, monkeypatch, error):
    def broken(*_: object, **__: object) -> None:
        raise error

    clip = make_video(tmp_path / "a.mp4", 60, rate=RATE)
    solver = flow_frames.tvl1
    monkeypatch.setattr(flow_frames, "tvl1", broken)
    run = extract(clip, "--out", tmp_path / "f", *both)
    assert run.exit_code == 1
    (cause,) = [line for line in run.output.splitlines() if line.startswith("failed: ")]
    assert cause.startswith(f"failed: {clip}: no flow features. ")
    assert "No solver." in cause
    assert [p.name for p in (tmp_path / "f").glob("*.npz")] == ["a.rgb.npz"]
    monkeypatch.setattr(flow_frames, "tvl1", solver)
    counted.update(loaded=[])
    assert extract(clip, "--out", tmp_path / "f", *both).exit_code == 0
    assert counted["loaded"] == ["flow"]


def test_an_error_tells_the_features_that_are_whole(tmp_path, tiny_extractor, monkeypatch):
    broken = make_extractor(
        tmp_path / "broken",
        in_channels=2,
        modality="flow",
        preprocessing={"shorter_side": 16, "size": 32},
    )
    clip = make_video(tmp_path / "a.mp4", 20, rate=RATE)
    flow = SnippetNetwork(describe(str(broken)), device="cpu", flow_backend="magic")
    with Decoder() as decoder:
        with pytest.raises(ExtractionError, match="'magic' is unknown") as caught:
            extract_video(clip, [network_of(tiny_extractor), flow], decoder)
        assert [len(f.data) for f in caught.value.finished.values()] == [3]
        with pytest.raises(mm.MmdistError, match="'magic' is unknown") as alone:
            extract_video(clip, [flow], decoder)
    assert not isinstance(alone.value, ExtractionError)


def test_a_network_that_cannot_be_loaded_stops_the_run(tmp_path, tiny_extractor):
    folder = shutil.copytree(tiny_extractor, tmp_path / "odd")
    edit_config(folder, num_classes=9)
    make_video(tmp_path / "a.mp4", 20)
    make_video(tmp_path / "b.mp4", 20)
    run = extract(tmp_path, "--out", tmp_path / "f", "--extractor", folder)
    assert run.exit_code == 1
    assert run.output.count("do not fit the network") == 1


def test_pca_reduces_the_rows(tmp_path, tiny_extractor):
    clip = make_video(tmp_path / "a.mp4", 30, rate=RATE)
    basis = np.random.default_rng(0).normal(size=(128, 500))
    np.savez(tmp_path / "pca.npz", x_mean=np.ones(128), U=basis)
    for out, options in (("plain", []), ("reduced", ["--pca", tmp_path / "pca.npz"])):
        run = extract(clip, "--out", tmp_path / out, "--extractor", tiny_extractor, *options)
        assert run.exit_code == 0, run.output
    plain, reduced = (FeatureStore(tmp_path / o).load("a", "rgb") for o in ("plain", "reduced"))
    np.testing.assert_allclose(reduced.data, (plain.data - 1) @ basis, rtol=1e-3, atol=1e-3)
    assert "pca" in reduced.provenance.matters


def test_each_modality_has_its_default(
    tmp_path, tiny_extractor, tiny_flow_extractor, counted, monkeypatch
):
    clip = make_video(tmp_path / "a.mp4", 20, rate=RATE)
    monkeypatch.setitem(DEFAULT_EXTRACTORS, "rgb", str(tiny_extractor))
    monkeypatch.setitem(DEFAULT_EXTRACTORS, "flow", str(tiny_flow_extractor))
    for modalities in ("rgb", "flow,rgb"):
        run = extract(clip, "--out", tmp_path / modalities, "--modality", modalities)
        assert run.exit_code == 0, run.output
    assert sorted(counted["loaded"]) == ["flow", "rgb", "rgb"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--extractor", "RGB", "--layer", "fc6"], "an I3D network and has no layer"),
        (["--extractor", "RGB", "--flow", "opencv"], "add --modality flow"),
        (["--extractor", "RGB", "--extractor", "RGB"], "all give rgb"),
        (["--extractor", "FLOW", "--modality", "rgb"], "gives flow, not rgb"),
        (["--extractor", "RGB", "--extractor", "FLOW", "--pca", "PCA"], "one by one"),
        (["--extractor", "RGB", "--pca", "CLIP"], "cannot be read as a PCA file"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(
    tmp_path, tiny_extractor, tiny_flow_extractor, options, words
):
    clip = make_video(tmp_path / "a.mp4", 20)
    np.savez(tmp_path / "pca.npz", x_mean=np.ones(128), U=np.ones((128, 500)))
    stand_for = {
        "RGB": tiny_extractor,
        "FLOW": tiny_flow_extractor,
        "PCA": tmp_path / "pca.npz",
        "CLIP": clip,
    }
    run = extract(clip, "--out", tmp_path / "f", *(stand_for.get(o, o) for o in options))
    assert run.exit_code == 1
    assert words in run.output
    assert run.output.startswith("Error: ")
    assert len(run.output.strip().splitlines()) == 1
    assert not (tmp_path / "f").exists()
