"""Videos for the drill: good ones of many kinds, ten ways of being broken, mutated real ones.

Everything is made from fixed seeds.
"""

from __future__ import annotations

import itertools
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from make_videos import cut, make_audio, make_video, pictures

QUIET = {"libx265": {"x265-params": "log-level=none:pools=none:frame-threads=1"}}

# Good videos: codec and suffix. One that cannot be encoded here is replaced by the first.
KINDS = (
    ("mpeg4", "mp4"),
    ("libx264", "mp4"),
    ("libx264", "mkv"),
    ("libx264", "mov"),
    ("libx264", "ts"),
    ("libx264", "flv"),
    ("libx265", "mp4"),
    ("libx265", "mkv"),
    ("libvpx-vp9", "webm"),
    ("libvpx", "webm"),
    ("mpeg4", "avi"),
    ("mjpeg", "avi"),
    ("ffv1", "mkv"),
    ("mpeg2video", "mpg"),
    ("wmv2", "wmv"),
)


def encodable(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.UnknownCodecError:
        return False
    return True


def make_good(folder: Path, count: int) -> list[Path]:
    """Videos of about a second, no two alike in size and length: 15 codecs and containers."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind if encodable(kind[0]) else KINDS[0] for kind in KINDS]
    made = []
    for i in range(count):
        codec, suffix = kinds[i % len(kinds)]
        fixed = codec == "libx265"  # which writes past its memory at some small sizes
        rates = (24, 25, 30) if codec == "mpeg2video" else (8, 10, 12, 15, 24, 25, 30)
        made.append(
            make_video(
                folder / f"good-{i:03}.{suffix}",
                10 + i % 31,
                width=96 if fixed else 48 + 8 * (i % 9),
                height=64 if fixed else 32 + 8 * (i % 7),
                rate=rates[i % len(rates)],
                codec=codec,
                pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
                b_frames=2 if codec in ("libx264", "libx265") and suffix != "flv" else 0,
                options=QUIET.get(codec),
                audio=i % 5 == 1 and suffix in ("mp4", "mov", "mkv"),
            )
        )
    return made


# ---- ways of being broken. Each makes three variants: path (suffix to be chosen) and 0, 1 or 2.


def truncated(stem: Path, variant: int) -> Path:
    """Without its index; with its index but not all pictures; Matroska."""
    suffix, fraction = ((".mp4", 0.5), (".mov", 0.7), (".mkv", 0.6))[variant]
    front = {"movflags": "faststart"} if variant == 1 else None
    whole = make_video(stem.with_suffix(".whole" + suffix), 40, container_options=front)
    whole.rename(stem.with_suffix(".whole"))
    made = cut(stem.with_suffix(".whole"), stem.with_suffix(suffix), fraction)
    stem.with_suffix(".whole").unlink()
    return made


def flipped(stem: Path, variant: int) -> Path:
    """Every 20th byte of the middle has a bit changed."""
    codec, suffix = (("libx264", ".mp4"), ("mpeg4", ".mp4"), ("libx264", ".mkv"))[variant]
    made = make_video(stem.with_suffix(suffix), 40, codec=codec, b_frames=0)
    data = np.frombuffer(made.read_bytes(), np.uint8).copy()
    middle = slice(len(data) // 4, 3 * len(data) // 4, 20)
    bits = np.random.default_rng(variant).integers(0, 8, data[middle].shape, np.uint8)
    data[middle] ^= np.left_shift(np.uint8(1), bits)
    made.write_bytes(data.tobytes())
    return made


def zero_bytes(stem: Path, variant: int) -> Path:
    """Empty, all zeros, zeros after a good start (as after a power cut)."""
    made = stem.with_suffix(".mp4")
    if variant == 2:
        make_video(made, 40)
    head = made.read_bytes()[:48] if variant == 2 else b""
    made.write_bytes(head + bytes((0, 20_000, 50_000)[variant]))
    return made


def wrong_container(stem: Path, variant: int) -> Path:
    """A text, an archive, a picture, all with a video's suffix."""
    made = stem.with_suffix((".mp4", ".mkv", ".avi")[variant])
    if variant == 0:
        made.write_text("<html><body>404: the video is gone</body></html>\n" * 9)
    elif variant == 1:
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("video.mp4", b"\0" * 5000)
    else:
        with av.open(str(made), "w", format="image2") as container:
            stream = container.add_stream("mjpeg", rate=1)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
            frame = av.VideoFrame.from_ndarray(pictures(1)[0], format="rgb24")
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return made


def over_reported(stem: Path, variant: int) -> Path:
    """More claimed than there is: Matroska's seconds, MP4's table of sizes, AVI's index lost."""
    made = stem.with_suffix((".mkv", ".mp4", ".avi")[variant])
    codec = "mpeg4" if variant == 2 else "libx264"
    front = {"movflags": "faststart"} if variant == 1 else None
    make_video(made, 65, codec=codec, b_frames=0, container_options=front)
    data = bytearray(made.read_bytes())
    if variant == 0:  # one packet and the index of seeks are gone
        data = data[: int(len(data) * 0.97)]
    elif variant == 1:  # half of the pictures are gone, and the box of pictures says so
        at = data.index(b"mdat") - 4
        data = data[: at + (len(data) - at) // 2]
        data[at : at + 4] = (len(data) - at).to_bytes(4, "big")
    else:
        data = data[: len(data) // 2]
    made.write_bytes(data)
    return made


def hang(stem: Path, variant: int) -> Path:
    """A good video whose name makes TRAPS stop the decoder, at three places."""
    place = ("open", "reader", "next")[variant]
    return make_video(stem.with_name(f"{stem.name}-{place}.mp4"), 40 + variant, rate=10)


def blank_video(path: Path, width: int, height: int) -> Path:
    """Three PNG pictures of one bit a pixel, in a file of some kilobytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "monob"
        for _ in range(3):
            frame = av.VideoFrame(width, height, "monob")
            frame.planes[0].update(bytes(frame.planes[0].buffer_size))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def absurd_size(stem: Path, variant: int) -> Path:
    """2×2 pixels; 16000×16000, in some kilobytes; a header changed to say 16384×16384."""
    if variant == 0:
        return make_video(stem.with_suffix(".mp4"), 20, width=2, height=2)
    if variant == 1:
        return blank_video(stem.with_suffix(".avi"), 16000, 16000)
    made = make_video(stem.with_suffix(".avi"), 5, codec="mjpeg", pix_fmt="yuvj420p", b_frames=0)
    height = width = 16384
    data = made.read_bytes()
    # MJPEG's frame header: 8 bits, height, width; AVI's headers: width, height
    data = data.replace(struct.pack(">BHH", 8, 64, 96), struct.pack(">BHH", 8, height, width))
    data = data.replace(struct.pack("<II", 96, 64), struct.pack("<II", width, height))
    made.write_bytes(data)
    return made


def no_pictures(stem: Path, variant: int) -> Path:
    """Sound alone."""
    return make_audio(stem.with_suffix((".mp4", ".mkv", ".m4v")[variant]))


def unreadable(stem: Path, variant: int) -> Path:
    """A link to nothing, a pipe, a link to itself. (Permissions do not bind root.)"""
    made = stem.with_suffix(".mp4")
    if variant == 1:
        os.mkfifo(made)
    else:
        made.symlink_to(stem.parent / "gone" if variant == 0 else made)
    return made


def deleted(stem: Path, variant: int) -> Path:
    """A good video that the drill deletes once the run has begun; the shortest, so the last."""
    return make_video(stem.with_name(f"zz-{stem.name}.mp4"), 5 + variant)


BROKEN: dict[str, Callable[[Path, int], Path]] = {
    way.__name__: way
    for way in (
        truncated,
        flipped,
        zero_bytes,
        wrong_container,
        over_reported,
        hang,
        absurd_size,
        no_pictures,
        unreadable,
        deleted,
    )
}


def make_broken(folder: Path, each: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [way(folder / f"{name}-{i}", i) for name, way in BROKEN.items() for i in range(each)]


# ---- mutations of real videos


def remux(source: Path, target: Path, seconds: float, **options: str) -> Path:
    """The first seconds of a video, its packets unchanged."""
    with av.open(str(source)) as old, av.open(str(target), "w", options=options) as new:
        pairs = {s.index: new.add_stream_from_template(s) for s in old.streams if s.type != "data"}
        for packet in old.demux():
            if packet.dts is not None and packet.dts * packet.time_base < seconds:
                packet.stream = pairs[packet.stream.index]
                new.mux(packet)
    return target


def boxes(data: bytes) -> list[tuple[int, int]]:
    """Start and end of the outermost boxes of an MP4; halves of anything else."""
    found, at = [], 0
    while at + 8 <= len(data) and data[at + 4 : at + 8].isalnum():
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:
            break
        found.append((at, min(at + size, len(data))))
        at += size
    return found if len(found) > 1 else [(0, len(data) // 2), (len(data) // 2, len(data))]


def header(data: bytes) -> tuple[int, int]:
    """Where the facts of the file are: an MP4's moov, else the first 2 KiB."""
    at = data.find(b"moov")
    return (at - 4, at - 4 + int.from_bytes(data[at - 4 : at], "big")) if at > 0 else (0, 2048)


def mutate(data: bytes, kind: str, strength: int, rng: np.random.Generator) -> bytes:
    """Damage a file; strength 0, 1 or 2."""
    size = len(data)
    new = np.frombuffer(data, np.uint8).copy()
    at = int(rng.integers(0, size))
    length = min(int(size * (0.001, 0.02, 0.2)[strength]) + 1, size - at)
    if kind == "bytes":
        where = rng.integers(0, size, (5, 100, 2000)[strength])
        new[where] = rng.integers(0, 256, len(where))
    elif kind == "bits":
        where = rng.integers(0, size, (1, 30, 500)[strength])
        new[where] ^= np.left_shift(np.uint8(1), rng.integers(0, 8, len(where), np.uint8))
    elif kind == "header":
        where = rng.integers(*header(data), (1, 5, 60)[strength]).clip(0, size - 1)
        extreme = rng.choice(np.array([0, 1, 127, 128, 255], np.uint8), len(where))
        new[where] = np.where(rng.random(len(where)) < 0.5, extreme, new[where] ^ 255)
    elif kind == "fields":
        for _ in range((1, 2, 6)[strength]):
            name = FIELDS[rng.integers(len(FIELDS))]
            field = max(data.find(name), 0) + len(name) + int(rng.integers(0, 40))
            value = rng.choice(np.array([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
            new[field : field + 4] = np.frombuffer(int(value).to_bytes(4, "big"), np.uint8)[
                : max(size - field, 0)
            ]
    elif kind == "zeros":
        new[at : at + length] = 0
    elif kind == "double":
        return data[: at + length] + data[at:]
    elif kind == "remove":
        return data[:at] + data[at + length :]
    elif kind == "truncate":
        return data[: int(size * (0.995, 0.8, 0.2)[strength] * rng.uniform(0.95, 1))]
    elif kind == "swap":
        parts = [data[start:end] for start, end in boxes(data)]
        rng.shuffle(parts)  # type: ignore[arg-type]
        return b"".join(parts)
    return new.tobytes()


# Boxes of MP4 and elements of Matroska that say sizes, times and positions.
FIELDS = (
    *(b"mvhd", b"tkhd", b"mdhd", b"elst", b"stts", b"ctts", b"stsd", b"avcC", b"stsc", b"stsz"),
    *(b"\x2a\xd7\xb1", b"\x44\x89", b"\xae", b"\xe0", b"\xb0", b"\xba", b"\xe7", b"\xa3"),
)
MUTATIONS = ("bytes", "bits", "header", "fields", "zeros", "double", "remove", "truncate", "swap")
FORMATS = (("mp4", {}), ("mp4", {"movflags": "faststart"}), ("mkv", {}), ("ts", {}))


def make_mutations(
    data: Path, folder: Path, count: int, *, first: int = 0, seconds: float = 2.0
) -> list[Path]:
    """Copies of the videos in `data`, cut and damaged, each by its own seed from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for path, (suffix, options) in itertools.product(sorted(data.glob("*.mp4")), FORMATS):
        target = folder / f"source-{len(sources)}.{suffix}"
        sources.append(remux(path, target, seconds, **options))
    contents = [(path.suffix, path.read_bytes()) for path in sources]
    for path in sources:
        path.unlink()
    made = []
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        kind = MUTATIONS[i % len(MUTATIONS)]
        suffix, content = contents[rng.integers(len(contents))]
        made.append(folder / f"m{i:03}-{kind}{suffix}")
        made[-1].write_bytes(mutate(content, kind, int(rng.integers(3)), rng))
    return made
