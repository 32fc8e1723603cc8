"""Folded and prepared networks give what the plain ones give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdist_e2e.extractors.networks import fold
from mmdist_e2e.extractors.networks.fold import fold_batch_norm, prepare_for_inference
from mmdist_e2e.extractors.networks.i3d import InceptionI3d, Unit3D

SHAPES = [(16, 32, 32), (9, 33, 47), (1, 17, 65), (26, 40, 34)]
FUSED = fold._fuses(Unit3D(1, 1))
needs_fused = pytest.mark.skipif(not FUSED, reason="this torch has no fused convolution for CPUs")


def randomise(network: nn.Module) -> nn.Module:
    """Make every BatchNorm do something."""
    torch.manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.01, 0.5)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def clip(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def kinds(network: nn.Module) -> set[type[nn.Module]]:
    return {type(module) for module in network.modules()}


@pytest.mark.parametrize("shape", SHAPES)
def test_folding_changes_nothing_in_float64(shape):
    network = randomise(InceptionI3d(4, 3, 0.125)).double()
    folded = fold_batch_norm(network)
    frames = clip(2, 3, *shape).double()
    assert nn.BatchNorm3d in kinds(network)
    assert nn.BatchNorm3d not in kinds(folded)
    with torch.no_grad():
        expected = network.features(frames)
        torch.testing.assert_close(folded.features(frames), expected, rtol=1e-10, atol=1e-10)
    assert expected.std() > 1e-3


def test_a_bias_is_folded_too():
    unit = randomise(Unit3D(3, 4, kernel=(3, 1, 3), stride=(2, 1, 2))).double()
    unit.conv3d.bias = nn.Parameter(clip(4).double())
    frames = clip(1, 3, 6, 5, 7).double()
    torch.testing.assert_close(fold_batch_norm(unit)(frames), unit(frames), rtol=1e-10, atol=1e-10)


def test_unknown_structures_are_left_as_they_are():
    # A BatchNorm before its convolution: whoever folded by neighbourhood would break it.
    network = randomise(nn.Sequential(nn.Conv3d(3, 3, 1), nn.ReLU(), nn.BatchNorm3d(3)))
    folded = fold_batch_norm(network)
    assert kinds(folded) == kinds(network)
    assert torch.equal(folded(clip(1, 3, 2, 4, 4)), network(clip(1, 3, 2, 4, 4)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [2, 3])
def test_a_prepared_network_gives_the_same_rows(channels, shape):
    network = randomise(InceptionI3d(4, channels, 0.125))
    ready = prepare_for_inference(network, "cpu", False)
    frames = clip(2, channels, *shape)
    with torch.no_grad():
        expected = network.features(frames)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        rows = ready.features(frames.contiguous(memory_format=layout))
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5 * expected.max().item())
    assert not rows.requires_grad
    assert nn.BatchNorm3d in kinds(network)  # the network given is not touched


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bf16_rows_keep_their_direction_and_are_float32(shape):
    network = randomise(InceptionI3d(4, 3, 0.125))
    ready = prepare_for_inference(network, torch.device("cpu"), True)
    assert {parameter.dtype for parameter in ready.parameters()} == {torch.bfloat16}
    frames = clip(2, 3, *shape)
    with torch.no_grad():
        rows, expected = ready.features(frames.bfloat16()), network.features(frames)
    assert rows.dtype == torch.float32
    assert rows.shape == expected.shape
    assert torch.cosine_similarity(rows, expected, dim=2).min() > 0.999


@needs_fused
def test_a_cpu_gets_the_faster_parts():
    network = InceptionI3d(4, 3, 0.125)
    single, half = (prepare_for_inference(network, "cpu", bf16) for bf16 in (False, True))
    assert isinstance(single.Mixed_4b.b2b, fold.ConvReLU)
    for ready in (single, half):  # all but the first, of stride 2
        assert sum(isinstance(module, Unit3D) for module in ready.modules()) == 1
    weight = half.Mixed_4b.b2b.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d)


@needs_fused
def test_one_frame_does_not_read_uninitialised_memory():
    # oneDNN with AMX: wrong for 9 to 15 channels where padding surrounds the only frame.
    unit = fold_batch_norm(randomise(Unit3D(12, 16, kernel=(3, 3, 3))))
    volume = clip(2, 12, 1, 4, 4)
    expected = unit(volume)
    fused = fold.ConvReLU(unit.bfloat16())
    for _ in range(3):
        junk = [torch.full((n,), float("nan"), dtype=torch.bfloat16) for n in (500, 4000, 30000)]
        del junk  # what the next allocations are likely to find
        torch.testing.assert_close(fused(volume.bfloat16()).float(), expected, rtol=0.05, atol=0.05)


def test_without_the_fused_operator_the_units_stay(monkeypatch):
    monkeypatch.setattr(fold, "_fuses", lambda unit: False)
    network = randomise(InceptionI3d(4, 3, 0.125))
    ready = prepare_for_inference(network, "cpu", False)
    frames = clip(1, 3, 16, 32, 32)
    assert Unit3D in kinds(ready)
    with torch.no_grad():
        expected = network.features(frames)
    torch.testing.assert_close(ready.features(frames), expected, rtol=1e-4, atol=1e-5)


def test_float64_networks_can_be_prepared():
    network = randomise(InceptionI3d(4, 3, 0.125)).double()
    frames = clip(1, 3, 16, 32, 32).double()
    rows = prepare_for_inference(network, "cpu", False).features(frames)
    torch.testing.assert_close(rows, network.features(frames), rtol=1e-10, atol=1e-10)
