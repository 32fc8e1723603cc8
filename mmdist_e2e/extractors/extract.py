"""One video to features: streaming, each frame decoded once, memory independent of length.

Shapes: N frames of a chunk, T frames of a window, S rows, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.extractors.networks import FPS_POLICY, TAIL, SnippetNetwork
from mmdist_e2e.extractors.snippets import Windows, row_times
from mmdist_e2e.extractors.video import VideoError
from mmdist_e2e.store import fast_digest
from mmdist_e2e.structures import Features, Provenance

if TYPE_CHECKING:
    from mmdist_e2e.extractors.video import Decoder

WINDOWS_PER_CALL = 8
MINIMUM_SIDE_PIXELS = 16

Progress = Callable[[float], None]


def extract_video(
    path: Path,
    network: SnippetNetwork,
    decoder: Decoder,
    *,
    source: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Features:
    """Decode one video and run the network over it.

    Args:
        source: the file's `fast_digest`, where the caller has it already.
        progress: called with the fraction done, 0 to 1.

    Returns Features with S = ⌈frames / stride⌉ rows; `times` from 0 to the duration.
    Raises VideoError when the file cannot be decoded whole or is smaller than 16 pixels a side.
    """
    spec = network.spec
    if source is None:
        source = fast_digest(path) if path.is_file() else {}
    windows = Windows(window=spec.window, stride=spec.stride, tail=TAIL)
    rows: list[NDArray[np.float32]] = []
    pending: list[NDArray[np.generic]] = []

    def take(batch: Iterator[NDArray[np.generic]]) -> None:
        for window in batch:
            pending.append(window)
            if len(pending) == WINDOWS_PER_CALL:
                flush()

    def flush() -> None:
        if pending:
            rows.append(network.rows(np.stack(pending).astype(np.uint8, copy=False)))
            pending.clear()

    stream = decoder.frames(path, fps=spec.fps, fps_policy=FPS_POLICY)
    info = stream.info
    if min(info.width, info.height) < MINIMUM_SIDE_PIXELS:
        raise VideoError(
            path,
            f"{path} is {info.width}×{info.height} pixels; videos need at least "
            f"{MINIMUM_SIDE_PIXELS} pixels on each side.",
        )
    for chunk in stream:
        take(windows.push(network.preprocessing(chunk.frames_NHWC)))
        if progress is not None:
            progress(min(float(chunk.times_N[-1]) / info.duration_seconds, 1.0))
    take(windows.finish())
    flush()
    assert rows, "the decoder raises for a video without frames"
    data_SD = np.concatenate(rows)
    return Features(
        data=data_SD,
        times=row_times(
            len(data_SD),
            window=spec.window,
            stride=spec.stride,
            fps=stream.fps,
            duration_seconds=stream.info.duration_seconds,
        ),
        duration_seconds=stream.info.duration_seconds,
        modality=spec.modality,
        provenance=Provenance(
            matters=spec.matters,
            info={
                **network.info,
                "decoder": info.decoder,
                "effective_fps": stream.fps,
                "trained_on": spec.trained_on,
            },
            source=source,
        ),
    )
