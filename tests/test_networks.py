"""Extractors by name and their networks: what is recorded, what is computed, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit_config, make_extractor
from safetensors.torch import load_file, save_file

from mmdist_e2e.extractors import profiles
from mmdist_e2e.extractors import runner as networks
from mmdist_e2e.extractors.flow.settings import NATIVE_SOLVER
from mmdist_e2e.extractors.networks.c3d import C3D
from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import describe, profile_of
from mmdist_e2e.extractors.runner import Chunk, SnippetNetwork, load_network
from mmdist_e2e.structures import MmdistError, differences
from mmdist_e2e.weights.registry import ENTRIES, cached_folder


def save_pca(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mean, basis = rng.normal(size=channels), rng.normal(size=(channels, 500))
    np.savez(path, x_mean=mean, U=basis)
    return mean, basis


@pytest.fixture(scope="module")
def tiny_c3d(tmp_path_factory) -> Path:
    """A random C3D of 64 features."""
    folder = tmp_path_factory.mktemp("c3d") / "tiny-c3d"
    edit_config(
        make_extractor(folder),
        network="c3d",
        num_classes=0,
        width=1 / 64,
        layer="fc6",
        preprocessing={"resize": [128, 171], "crop": 112, "size": 112},
    )
    torch.manual_seed(0)
    save_file(C3D(0, 1 / 64).state_dict(), folder / "model.safetensors")
    return folder


# The table "Profiles" of the design: frames, size and network input, rows.
KINETICS = {"fps": 25.0, "fps_policy": "ceiling", "mode": "windows", "window": 16, "stride": 8}
CHARADES = {"fps": 24.0, "fps_policy": "exact", "mode": "dense", "longer_side": 320, "tail": "none"}
TABLE = {
    "i3d-rgb-charades": (CHARADES, {"minimum_side": 226, "crop": 224, "mean": (127.5,) * 3}),
    "i3d-flow-charades": (
        CHARADES,
        {"shorter_side": None, "minimum_side": 224, "crop": 224, "bound": 20.0, "quantise": True,
         "repeats": "still"},
    ),
    "i3d-rgb-imagenet": (KINETICS, {"shorter_side": 256, "crop": 224, "std": (127.5,) * 3}),
    "i3d-flow-imagenet": (
        KINETICS, {"shorter_side": 256, "crop": 224, "bound": 20.0, "quantise": True}
    ),
    "c3d-sports1m-mm": (
        {"fps_policy": "own", "fps": None, "mode": "windows", "window": 16, "stride": 8,
         "layer": "fc7"},
        {"resize": (128, 171), "crop": 112, "mean": (104, 117, 128), "std": (1, 1, 1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_public_names_have_the_profile_of_the_table(name, tiny_extractor, monkeypatch, tmp_path):
    """Even where an older version has left another profile in the cache."""
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path))
    monkeypatch.setattr(profiles, "weights_digest", lambda _: "0" * 16)
    folder = cached_folder(ENTRIES[name])
    folder.mkdir(parents=True)
    stale = {**ENTRIES[name].config, **KINETICS, "trained_on": "x", "preprocessing": {"size": 9}}
    (folder / "config.json").write_text(json.dumps(stale))
    sampling, reading = TABLE[name]
    spec = describe(name)
    for key, value in sampling.items():
        assert getattr(spec, key) == value, key
    for key, value in reading.items():
        assert getattr(spec.preprocessing, key) == value, key
    assert json.loads(json.dumps(spec.matters)) == spec.matters  # as a feature file gives it back
    other = describe(name, fps_policy="ceiling" if "fps_policy" in sampling else None)
    unlike = differences(spec.matters, replace(other, fps=9.0).matters)
    assert any(phrase.startswith("fps is 9.0") for phrase in unlike)
    for changed in ({"crop": None, "minimum_side": None, "shorter_side": None, "resize": None},):
        fields = {k: v for k, v in changed.items() if hasattr(spec.preprocessing, k)}
        if "flow" not in name:
            plain = replace(spec, preprocessing=replace(spec.preprocessing, **fields))
            assert "preprocessing is" in "; ".join(differences(spec.matters, plain.matters))


def test_explicit_options_win_over_the_profile(tiny_extractor, tmp_path):
    folder = tmp_path / "dense"
    shutil.copytree(tiny_extractor, folder)
    edit_config(folder, mode="dense", fps_policy="exact", longer_side=320, tail="none", window=99)
    spec = describe(str(folder))
    assert (spec.mode, spec.fps_policy, spec.longer_side, spec.tail) == (
        "dense", "exact", 320, "none",
    )  # fmt: skip
    assert (spec.window, spec.stride) == (16, 8)
    assert spec.matters["scaling"] == "longer side 320, bicubic"
    other = describe(str(folder), mode="windows", fps_policy="own")
    assert (other.mode, other.fps_policy, other.fps, other.window) == ("windows", "own", None, 99)
    assert other.tail == "repeat_last"
    edit_config(folder, longer_side=0)
    with pytest.raises(MmdistError, match=r"longer_side in .* got 0"):
        describe(str(folder))


def test_profiles_are_told_in_words():
    told = {name: profile_of(ENTRIES[name].config) for name in TABLE}
    assert list(told["i3d-rgb-charades"]) == [
        "frames", "size", "crop", "values", "mode", "window", "stride",
    ]  # fmt: skip
    assert "24 fps exactly" in told["i3d-rgb-charades"]["frames"]
    assert "longer side 320" in told["i3d-rgb-charades"]["size"]
    assert "226" in told["i3d-rgb-charades"]["size"]
    assert "consecutive" in told["i3d-flow-charades"]["flow"]
    assert "256" in told["i3d-flow-imagenet"]["size"]
    assert told["c3d-sports1m-mm"]["layer"] == "fc7"
    assert "own rate" in told["c3d-sports1m-mm"]["frames"]
    assert "[104, 117, 128]" in told["c3d-sports1m-mm"]["values"]
    assert profile_of({"fps": 12, "modality": "rgb", "preprocessing": {"size": 112},
                       "window": 16, "stride": 8})["crop"] == "none"  # fmt: skip


def test_matters_of_a_plain_rgb_extractor_are_those_that_models_have_recorded(tiny_extractor):
    spec = describe(str(tiny_extractor))
    assert spec.matters == {
        "extractor": "tiny",
        "weights": spec.digest,
        "mode": "windows",
        "fps": 12.0,
        "fps_policy": "ceiling",
        "window": 16,
        "stride": 8,
        "tail": "repeat_last",
    }


def test_matters_name_what_changes_the_features(tiny_flow_extractor, tiny_c3d, tmp_path):
    flow = describe(str(tiny_flow_extractor), mode="dense", fps_policy="exact").matters
    assert (flow["mode"], flow["fps_policy"]) == ("dense", "exact")
    settings = {
        "algorithm": "tvl1",
        "native": NATIVE_SOLVER,
        "shorter_side": 16,
        "bound": 20.0,
        "quantise": False,
    }
    assert settings.items() <= flow["flow"].items()
    assert {"tau", "scales", "warps", "iterations", "epsilon"} <= set(flow["flow"])
    assert json.loads(json.dumps(flow)) == flow  # as it comes back from a feature file
    assert describe(str(tiny_c3d)).matters["layer"] == "fc6"
    save_pca(tmp_path / "pca.npz", 64)
    reduced = describe(str(tiny_c3d), layer="fc7", pca=tmp_path / "pca.npz").matters
    assert reduced["layer"] == "fc7"
    assert len(reduced["pca"]) == 16


def test_describing_never_imports_torch(tiny_flow_extractor, tmp_path):
    save_pca(tmp_path / "pca.npz", 128)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mmdist_e2e.extractors.profiles import describe\n"
        f"spec = describe({str(tiny_flow_extractor)!r}, pca=Path({str(tmp_path / 'pca.npz')!r}))\n"
        "print(sorted(spec.matters), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'flow'" in run.stdout
    assert "'pca'" in run.stdout
    assert run.stdout.strip().endswith("False")


def test_dense_rows_are_nominally_sixteen_frames_every_eight(tmp_path):
    folder = make_extractor(tmp_path / "wide", window=32, stride=4)
    assert (describe(str(folder)).window, describe(str(folder)).stride) == (32, 4)
    spec = describe(str(folder), mode="dense")
    assert (spec.window, spec.stride) == (16, 8)


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("tiny", {"mode": "sparse"}, "valid: windows, dense"),
        ("tiny", {"fps_policy": "floor"}, "valid: ceiling, exact, own"),
        ("tiny", {"layer": "fc6"}, "an I3D network and has no layer 'fc6'"),
        ("c3d", {"layer": "fc8"}, "valid: fc6, fc7"),
        ("c3d", {"mode": "dense"}, "a C3D network, which reads windows only"),
        ("tiny", {"pca": Path("missing.npz")}, "missing.npz"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(tiny_extractor, tiny_c3d, which, options, words):
    with pytest.raises(MmdistError, match=words):
        describe(str(tiny_extractor if which == "tiny" else tiny_c3d), **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": "lstm"}, "the network 'lstm'; this version runs: i3d, c3d, pytorchvideo"),
        ({"modality": "sound"}, "the modality 'sound'; this version runs: rgb, flow"),
        ({"modality": "flow", "preprocessing": {"size": 32}}, "preprocessing in .* is wrong"),
        ({"preprocessing": {"size": 32, "colour": 1}}, "preprocessing in .* is wrong"),
        ({"width": 0.3}, "cannot be loaded .*width 0.3"),
        ({"width": float("nan")}, "cannot be loaded"),
        ({"width": float("inf")}, "cannot be loaded"),
        ({"num_classes": -1}, "cannot be loaded"),
        ({"in_channels": 2}, "rgb has 3 channels, and in_channels is 2"),
        ({"num_classes": 5}, "do not fit the network 'i3d'"),
        *(
            ({key: value}, f"The {key} in .*config.json must be a .* number")
            for key, values in {
                "fps": (0, -25.0, float("nan"), float("inf"), "25", True, None),
                "window": (0, -16, 16.0, "16", True),
                "stride": (0, -8, 8.5, None),
            }.items()
            for value in values
        ),
        ({"width": 0.25}, "do not fit the network 'i3d'"),
    ],
)
def test_a_checkpoint_that_cannot_run_is_one_sentence(tmp_path, changes, words):
    folder = make_extractor(tmp_path / "odd")
    edit_config(folder, **changes)
    with pytest.raises(MmdistError, match=words):
        SnippetNetwork(describe(str(folder)), device="cpu", precision="fp32")


@pytest.mark.parametrize("key", ["network", "modality", "fps", "preprocessing", "trained_on"])
def test_a_setting_that_is_missing_is_named(tmp_path, key):
    folder = make_extractor(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MmdistError, match=f"has no '{key}'"):
        describe(str(folder))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(MmdistError, match="not a checkpoint"):
        describe(str(folder))


def test_damaged_weights_are_one_sentence(tmp_path):
    folder = make_extractor(tmp_path / "odd")
    spec = describe(str(folder))
    state = load_file(folder / "model.safetensors")
    state["Mixed_3b.b0.bn.running_var"][0] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(MmdistError, match=r"not finite Mixed_3b\.b0\.bn\.running_var"):
        load_network(spec)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(MmdistError, match="cannot be loaded"):
        load_network(spec)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MmdistError, match="cannot be loaded"):
        load_network(spec)


def oracle(folder: Path, frames_BCTHW: np.ndarray, network: torch.nn.Module, **chosen: str):
    """The network in float64, unfolded, averaged over time."""
    network.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.inference_mode():
        frames = torch.from_numpy(frames_BCTHW.astype(np.float64))
        return network.double().eval().features(frames, **chosen).mean(1).numpy()


def test_rgb_rows_are_the_networks(tiny_extractor):
    windows = np.random.default_rng(0).integers(0, 256, (3, 24, 32, 32, 3), dtype=np.uint8)
    network = SnippetNetwork(describe(str(tiny_extractor)), device="cpu", precision="fp32")
    expected = oracle(
        tiny_extractor,
        windows.transpose(0, 4, 1, 2, 3) / 127.5 - 1,
        InceptionI3d(4, 3, 0.125),
    )
    got = network.rows(torch.from_numpy(windows)).numpy()
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_flow_rows_are_the_networks(tiny_flow_extractor):
    fields = np.random.default_rng(0).uniform(-20, 20, (2, 16, 32, 32, 2)).astype(np.float16)
    network = SnippetNetwork(describe(str(tiny_flow_extractor)), device="cpu", precision="fp32")
    expected = oracle(
        tiny_flow_extractor,
        fields.astype(np.float64).transpose(0, 4, 1, 2, 3) / 20,
        InceptionI3d(4, 2, 0.125),
    )
    np.testing.assert_allclose(
        network.rows(torch.from_numpy(fields)), expected, rtol=1e-3, atol=1e-5
    )
    assert network.info["flow_backend"] == "auto"


def test_dense_rows_are_those_of_the_middle(tiny_extractor):
    spec = describe(str(tiny_extractor), mode="dense")
    network = SnippetNetwork(spec, device="cpu", precision="fp32")
    frames = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
    )
    every = network.dense_rows(Chunk(frames, 0, 5))
    assert every.shape == (5, 128)
    np.testing.assert_array_equal(network.dense_rows(Chunk(frames, 2, 4)), every[2:4])
    np.testing.assert_allclose(every.mean(0), network.rows(frames[None])[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", ["fc6", "fc7"])
def test_c3d_gives_the_layer_that_was_asked_for_and_its_pca(tiny_c3d, tmp_path, layer):
    windows = np.random.default_rng(0).integers(0, 256, (2, 16, 112, 112, 3), dtype=np.uint8)
    expected = oracle(
        tiny_c3d, windows.transpose(0, 4, 1, 2, 3) / 127.5 - 1, C3D(0, 1 / 64), layer=layer
    )
    spec = describe(str(tiny_c3d), layer=layer)
    rows = SnippetNetwork(spec, device="cpu", precision="fp32").rows(torch.from_numpy(windows))
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-6)
    mean, basis = save_pca(tmp_path / "pca.npz", 64)
    spec = describe(str(tiny_c3d), layer=layer, pca=tmp_path / "pca.npz")
    reduced = SnippetNetwork(spec, device="cpu", precision="fp32").reduced(rows.numpy())
    np.testing.assert_allclose(reduced, (expected - mean) @ basis, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_pytorchvideo_backbone_is_one_more_network(tmp_path):
    pytest.importorskip("pytorchvideo")
    from mmdist_e2e.extractors.networks.pytorchvideo import HubBackbone

    folder = make_extractor(tmp_path / "x3d")
    edit_config(
        folder,
        network="pytorchvideo",
        backbone="x3d_xs",
        window=4,
        preprocessing={"size": 160, "mean": [114.75] * 3, "std": [57.375] * 3},
    )
    torch.manual_seed(0)
    backbone = HubBackbone("x3d_xs")
    save_file(backbone.state_dict(), folder / "model.safetensors")
    windows = np.random.default_rng(0).integers(0, 256, (1, 4, 160, 160, 3), dtype=np.uint8)
    expected = oracle(folder, (windows.transpose(0, 4, 1, 2, 3) - 114.75) / 57.375, backbone)
    rows = SnippetNetwork(describe(str(folder)), device="cpu", precision="fp32").rows(
        torch.from_numpy(windows)
    )
    np.testing.assert_allclose(rows, expected, rtol=1e-3, atol=1e-4)


def test_a_pca_of_another_network_is_refused_before_any_video(tiny_extractor, tmp_path):
    save_pca(tmp_path / "pca.npz", 64)
    spec = describe(str(tiny_extractor), pca=tmp_path / "pca.npz")
    with pytest.raises(MmdistError, match="rows of 64 channels, and 'tiny' gives 128"):
        SnippetNetwork(spec, device="cpu", precision="fp32")


def test_bf16_rows_agree_with_fp32(tiny_extractor, tiny_flow_extractor):
    rng = np.random.default_rng(0)
    for folder, windows in (
        (tiny_extractor, rng.integers(0, 256, (3, 16, 32, 32, 3), dtype=np.uint8)),
        (tiny_flow_extractor, rng.uniform(-20, 20, (3, 16, 32, 32, 2)).astype(np.float16)),
    ):
        full, half = (
            SnippetNetwork(describe(str(folder)), device="cpu", precision=precision).rows(
                torch.from_numpy(windows)
            )
            for precision in ("fp32", "bf16")
        )
        assert half.dtype == np.float32
        cosine = (half * full).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(full, axis=1)
        assert cosine.min() > 0.999
        assert not np.array_equal(half, full)


@pytest.mark.parametrize("good", [True, False])
def test_auto_takes_bf16_where_it_is_fast_and_right(tiny_extractor, monkeypatch, recwarn, good):
    from mmdist_e2e.extractors.networks import fold

    original = fold.prepare_for_inference

    def prepare(network, device, bf16):
        prepared = original(network, device, bf16)
        if bf16 and not good:
            with torch.no_grad():
                for parameter in prepared.parameters():
                    parameter.copy_(torch.rand_like(parameter))
        return prepared

    monkeypatch.setattr(networks, "fast_bf16", lambda device: True)
    monkeypatch.setattr(fold, "prepare_for_inference", prepare)
    network = SnippetNetwork(describe(str(tiny_extractor)), device="cpu")
    assert network.use_bf16 == good
    assert network.info["precision"] == ("bf16" if good else "fp32")
    assert [str(w.message)[:22] for w in recwarn] == ([] if good else ["bf16 differs from fp32"])


def test_a_folder_keeps_its_weights(tiny_extractor):
    """Folding and casting work on copies: the loaded network is as on the disk."""
    spec = describe(str(tiny_extractor))
    state = load_file(tiny_extractor / "model.safetensors")
    for key, value in load_network(spec).state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "valid: auto, fp32, bf16"),
        ({"device": "toaster"}, "valid: auto, cpu, cuda, cuda:N"),
        ({"device": "meta"}, "valid: auto, cpu, cuda, cuda:N"),
        ({"device": "cuda:99"}, "'cuda:99' does not exist: torch finds [0-9]+ GPUs"),
    ],
)
def test_bad_machine_settings_name_the_valid_ones(tiny_extractor, options, words):
    with pytest.raises(MmdistError, match=words):
        SnippetNetwork(describe(str(tiny_extractor)), **options)
