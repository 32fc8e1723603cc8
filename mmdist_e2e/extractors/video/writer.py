"""Encoding: frames to an MP4.

Shape suffixes: H height, W width, C channels (always 3, RGB).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmdist_e2e.structures import MmdistError


def write_video(
    path: Path,
    frames: Iterable[NDArray[np.uint8]],
    *,
    fps: float,
    crf: int = 23,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write frames [H, W, C] uint8 RGB as an H.264 (yuv420p) MP4, whole or not at all.

    The file is made under a temporary name in the same folder, synced and renamed. One encoder
    thread, so that equal frames give equal files whatever the machine. `crf` is x264's constant
    rate factor (lower is better). Any `metadata` key is kept in the container.

    Raises:
        MmdistError: no frames, odd sides, sides that change, a bad fps, or an unwritable path.
    """
    import av  # lazily: most processes that import this module never write

    path = Path(path)
    if not (np.isfinite(fps) and 0 < fps <= 1000):
        raise MmdistError(f"A video's fps must be between 0 and 1000; got {fps} for {path}.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(
            str(temporary.absolute()),
            "w",
            format="mp4",
            container_options={"movflags": "use_metadata_tags", "fflags": "+bitexact"},
        ) as container:
            container.metadata.update(metadata or {})
            stream = None
            shape: tuple[int, ...] = ()
            for frame_HWC in frames:
                if stream is None:
                    shape = frame_HWC.shape
                    if len(shape) != 3 or shape[2] != 3 or shape[0] % 2 or shape[1] % 2:
                        raise MmdistError(
                            f"Frames for {path} must be [height, width, 3] with even sides "
                            f"(H.264 halves the colour); got {list(shape)}."
                        )
                    rate = Fraction(fps).limit_denominator(10_000)
                    stream = container.add_stream("libx264", rate=rate)
                    stream.height, stream.width = shape[:2]
                    stream.pix_fmt = "yuv420p"
                    stream.options = {"crf": str(crf), "threads": "1"}
                if frame_HWC.shape != shape or frame_HWC.dtype != np.uint8:
                    raise MmdistError(
                        f"Every frame of {path} must be uint8 {list(shape)}; got "
                        f"{frame_HWC.dtype} {list(frame_HWC.shape)}."
                    )
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
                container.mux(stream.encode(frame))
            if stream is None:
                raise MmdistError(f"{path} cannot be written without frames; give at least one.")
            container.mux(stream.encode(None))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, av.FFmpegError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise MmdistError(f"{path} cannot be written: {cause}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
