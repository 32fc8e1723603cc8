"""Video networks. Each has `in_channels`, `feature_channels` and `features`.

`features(frames_BCTHW) -> [B, T', D]`: of B clips of T frames, T' rows of D feature channels.
"""


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`. Raises ValueError unless that is a whole number, at least 1."""
    count = channels * width
    if count != int(count) or count < 1:
        raise ValueError(
            f"width {width} gives {count} channels instead of {channels}; use a power of 2 up to 1"
        )
    return int(count)
