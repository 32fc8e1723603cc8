"""Dense mode against one run of the whole padded video, and against its own derivation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmdist_e2e.extractors.networks.i3d import InceptionI3d
from mmdist_e2e.extractors.profiles import DENSE_STRIDE
from mmdist_e2e.extractors.runner import CONTEXT_FRAMES, DenseChunks, dense_row_count

# Why chunks of dense mode give exactly the rows of one run over the whole video:
#
# SAME padding depends on the size that it pads. A video's frames are padded to a multiple of eight
# by repeating the last one. If every length and every chunk's start is a multiple of eight, the
# network's strides fall on the same frames in a chunk as in the whole video.
#
# Frames seen by one row, traced back from map j (one map every eight frames), first and last:
#
#     Mixed_5b, 5c      each ±1                        j − 2 … j + 2
#     MaxPool3d_5a      2i … 2i + 1                    2j − 4 … 2j + 5
#     Mixed_4b … 4f     each ±1                        2j − 9 … 2j + 10
#     MaxPool3d_4a      2i … 2i + 2                    4j − 18 … 4j + 22
#     2c, Mixed_3b, 3c  each ±1                        4j − 21 … 4j + 25
#     Conv3d_1a         2i − 2 … 2i + 4                8j − 44 … 8j + 54
#
# Row j is the average of maps j and j + 1, so it sees the 107 frames 8j − 44 … 8j + 62. Rows
# a … b − 1 need the frames 8a − 44 … 8b + 54: a context of 56, the next multiple of eight, on
# either side of the frames 8a … 8b − 1.
LENGTHS = (1, 7, 8, 9, 16, 17, 63, 64, 65, 119, 120, 121, 127, 128, 129, 200, 287, 288, 289, 301)


@pytest.fixture(scope="module")
def network() -> InceptionI3d:
    """Random weights of a scale that lets distant frames be felt."""
    torch.manual_seed(11)
    network = InceptionI3d(3, 2, 0.125)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    for name, parameter in network.named_parameters():
        if name.endswith("conv3d.weight"):
            torch.nn.init.kaiming_normal_(parameter)
    return network.double().eval()


def video(length: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(length).uniform(-1, 1, (length, 8, 8, 2)))


def run(network: InceptionI3d, frames_THWC: torch.Tensor) -> np.ndarray:
    frames = frames_THWC.permute(3, 0, 1, 2)[None]
    with torch.inference_mode():
        return network.features(frames)[0].numpy()


def padded(frames: torch.Tensor) -> torch.Tensor:
    return torch.cat([frames, *[frames[-1:]] * (-len(frames) % 8)])


def chunks_of(frames: torch.Tensor, chunks: DenseChunks, push: int):
    for first in range(0, len(frames), push):
        yield from chunks.push(frames[first : first + push])
    yield from chunks.finish()


@pytest.mark.parametrize(("core", "push"), [(8, 5), (64, 100), (128, 301)])
@pytest.mark.parametrize("tail", ["repeat_last", "none"])
def test_chunks_give_the_rows_of_one_whole_run(network, core, push, tail):
    for length in (*LENGTHS, *range(290, 297)):
        frames = video(length)
        whole = run(network, frames if tail == "none" and length > 8 else padded(frames))
        chunks = DenseChunks(core_frames=core, frames=length if tail == "none" else 0)
        rows = [
            run(network, chunk.frames)[chunk.first_row : chunk.last_row]
            for chunk in chunks_of(frames, chunks, push)
        ]
        assert all(len(row) for row in rows)
        assert sum(map(len, rows)) == dense_row_count(length) == len(whole) == chunks.rows
        np.testing.assert_allclose(np.concatenate(rows), whole, rtol=1e-10, atol=1e-13)


def test_a_row_sees_the_frames_of_the_derivation_and_no_other(network):
    frames, row = video(160), 8
    plain = run(network, frames)[row]
    seen = []
    for index in range(160):
        changed = frames.clone()
        changed[index] = -changed[index]
        if not np.array_equal(run(network, changed)[row], plain):
            seen.append(index)
    assert seen[0] >= 8 * row - 44
    assert seen[-1] <= 8 * row + 62
    # Maxima and ReLUs may hide the outermost frames, but not much more than them.
    assert seen[0] <= 8 * row - 44 + 3
    assert seen[-1] >= 8 * row + 62 - 3


def test_less_context_would_not_be_enough(network):
    frames = video(320)
    whole = run(network, frames)
    short = CONTEXT_FRAMES - DENSE_STRIDE
    chunk = run(network, frames[: 128 + short])
    assert abs(chunk[:16] - whole[:16]).max() > 1e-6 * abs(whole).max()
    enough = run(network, frames[: 128 + CONTEXT_FRAMES])
    np.testing.assert_allclose(enough[:16], whole[:16], rtol=1e-10, atol=1e-13)


def test_memory_does_not_grow_with_the_video():
    chunks = DenseChunks(core_frames=64)
    for _ in range(500):
        for chunk in chunks.push(torch.zeros((10, 1, 1, 3), dtype=torch.uint8)):
            assert len(chunk.frames) <= 64 + 2 * 56
        assert sum(map(len, chunks._pieces)) < 64 + 2 * 56 + 2 * 10
    (last,) = chunks.finish()
    assert len(last.frames) <= 64 + 2 * 56
    assert chunks.rows == dense_row_count(5000) == 624


def test_rows_are_counted():
    assert [dense_row_count(n) for n in (0, 1, 8, 9, 16, 17, 24, 25)] == [0, 1, 1, 1, 1, 2, 2, 3]
    assert list(DenseChunks().finish()) == []
