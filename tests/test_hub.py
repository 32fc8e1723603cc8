"""pytorchvideo's backbones: the published keys, and what their classifiers would read."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings

import pytest
import torch
from torch import nn

from mmdist_e2e.extractors.networks import pytorchvideo as hub
from mmdist_e2e.extractors.networks.fold import fold_batch_norm, prepare_for_inference
from mmdist_e2e.extractors.networks.pytorchvideo import FRAMES, HubBackbone
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.weights.registry import ENTRIES

installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pytorchvideo", "torchvision"))),
    reason="pytorchvideo is not installed (extra `backbones`)",
)
SIZES = {"x3d_xs": 160, "x3d_s": 160, "x3d_m": 224, "mvit_base_16x4": 224}


def clip(name: str, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 3, FRAMES[name], size, size, generator=generator)


def randomise(network: nn.Module) -> None:
    """Make every BatchNorm do something."""
    torch.manual_seed(9)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)


def published(name: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's, as it is imported
        models = importlib.import_module("pytorchvideo.models.hub")
    return getattr(models, name)(pretrained=False)


def pair(name: str) -> tuple[nn.Module, HubBackbone]:
    """pytorchvideo's own network with random weights, and ours with the same."""
    original = published(name).eval()
    randomise(original)
    ours = HubBackbone(name).eval()
    assert list(ours.state_dict()) == list(original.state_dict())
    ours.load_state_dict(original.state_dict())
    return original, ours


def published_head(original: nn.Module) -> nn.Module:
    return original.head if hasattr(original, "head") else original.blocks[-1]


@installed
@pytest.mark.parametrize(
    "name",
    [
        "x3d_xs",
        "x3d_s",
        "c2d_r50",
        "slowfast_r50",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("slow_r50", "i3d_r50", "x3d_m")),
        pytest.param("mvit_base_16x4", marks=pytest.mark.slow),
    ],
)
def test_features_are_what_the_classifier_reads(name):
    original, ours = pair(name)
    frames = clip(name, SIZES.get(name, 224))
    seen = []
    head = published_head(original)
    head.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        features = ours.features(frames)
        if name.startswith("slowfast"):
            original([frames[:, :, [0, 4, 8, 13, 17, 22, 26, 31]], frames.clone()])
        else:
            original(frames)
    assert features.shape == (1, 1, ours.feature_channels)
    assert features.std() > 1e-4
    # At the size of training there is one position, so nothing is averaged.
    torch.testing.assert_close(features.flatten(), seen[0].flatten(), rtol=1e-4, atol=1e-5)


@installed
def test_larger_frames_average_what_the_classifier_reads():
    original, ours = pair("c2d_r50")
    frames = clip("c2d_r50", 256)
    proj = published_head(original).proj
    with torch.inference_mode():
        by_hand = ours.features(frames)[:, 0] @ proj.weight.T + proj.bias
        torch.testing.assert_close(by_hand, original(frames), rtol=1e-4, atol=1e-5)


@installed
@pytest.mark.parametrize("name", ["slowfast_r101", "x3d_l", "mvit_base_32x3"])
def test_the_deeper_and_longer_ones_have_the_published_keys(name):
    original, ours = published(name), HubBackbone(name)
    shapes = {key: value.shape for key, value in original.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    assert ours.feature_channels == published_head(original).proj.in_features


@installed
def test_folded_and_in_bf16_the_features_stay():
    _, network = pair("x3d_xs")
    frames = clip("x3d_xs", 160)
    with torch.inference_mode():
        expected = network.double().features(frames.double())
        folded = fold_batch_norm(network).features(frames.double())
        ready = prepare_for_inference(network.float(), "cpu", True)
        half = ready.features(frames.bfloat16()).double()
    torch.testing.assert_close(folded, expected, rtol=1e-10, atol=1e-10)
    assert torch.cosine_similarity(half, expected, dim=2).item() > 0.999
    assert (half - expected).norm() < 0.05 * expected.norm()


@installed
def test_a_folded_slowfast_is_the_same_function():
    network = HubBackbone("slowfast_r50").eval()
    randomise(network)
    folded = fold_batch_norm(network)
    assert not any(isinstance(module, nn.BatchNorm3d) for module in folded.modules())
    frames = clip("slowfast_r50", 224)
    with torch.inference_mode():
        expected = network.features(frames)
        torch.testing.assert_close(folded.features(frames), expected, rtol=1e-3, atol=1e-4)


@installed
def test_a_clip_of_another_length_is_refused():
    network = HubBackbone("x3d_xs").eval()
    with pytest.raises(MmdistError, match=r"x3d_xs reads clips of 3 channels and 4 frames"):
        network.features(torch.zeros(1, 3, 16, 160, 160))


def test_the_slow_pathway_takes_the_published_frames():
    frames = torch.arange(32.0).reshape(1, 1, 32, 1, 1)
    slow, fast = hub.slow_and_fast(frames)
    assert slow.flatten().tolist() == [0, 4, 8, 13, 17, 22, 26, 31]
    assert fast is frames


def test_windows_span_the_published_clips():
    """Public files are named for frames × rate of their clips, as in SLOW_8x8_R50.pyth."""
    spans = {}
    for name in FRAMES:
        config, url = ENTRIES[name].config, ENTRIES[name].url
        if named := re.search(r"_(\d+)x(\d+)", url):
            spans[name] = config["window"] * 30 / config["fps"]
            assert spans[name] == int(named[1]) * int(named[2])
    assert len(spans) == 7


def test_an_unknown_backbone_names_the_valid_ones():
    with pytest.raises(MmdistError, match=r"'r50' is unknown; valid: slow_r50, .*mvit_base_32x3"):
        HubBackbone("r50")


def test_without_pytorchvideo_the_extra_is_named(monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == "pytorchvideo"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pytorchvideo", None)
    with pytest.raises(MmdistError, match=r'pip install "mmdist-e2e\[backbones\]"'):
        HubBackbone("slow_r50")
