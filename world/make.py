"""Render a world to disk: videos, annotations in the Charades-STA format, and its facts.

    python -m world render --videos 1000 --out runs/world2/videos


It writes into --out:

    videos/<id>.mp4                    H.264, written atomically
    world_sta_{train,val,test}.txt     `<id> <start> <end>##<sentence>`, seconds
    durations.json                     {id: seconds}
    world.json                         version, seed, counts, statistics

A killed run resumes: complete videos of the same world are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mmdist_e2e.cli.common import StepDisplay
from mmdist_e2e.extractors.video.reader import Decoder, VideoError
from mmdist_e2e.extractors.video.writer import write_video
from mmdist_e2e.store import write_atomically, write_json
from mmdist_e2e.structures import MmdistError
from world.render import render_frames
from world.statistics import statistics_of
from world.world import FPS, HEIGHT, SPLITS, WIDTH, WORLD_VERSION, Script, sample_script


def annotation_path(out: Path, split: str) -> Path:
    """The annotation file of a split ("train", "val" or "test") of a world."""
    return out / f"world_sta_{split}.txt"


def make_world(
    out: Path,
    *,
    videos: int,
    seed: int,
    workers: int = 1,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:
    """Render videos 0 … videos - 1 of world `seed` into the folder `out`.

    progress: called with the number of videos that are ready. Returns what world.json holds,
    and how many videos this call rendered.
    Raises MmdistError for a number out of range or a folder that cannot be written.
    """
    if videos < 1:
        raise MmdistError(f"A world has at least one video; got {videos}.")
    if seed < 0:
        raise MmdistError(f"The seed of a world is a whole number from 0 on; got {seed}.")
    folder = out / "videos"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MmdistError(
            f"The folder {folder} cannot be made ({error.strerror}); choose another --out."
        ) from error
    scripts = [sample_script(seed, index) for index in range(videos)]
    missing = _not_whole(folder, scripts)
    ready = videos - len(missing)
    progress(ready)
    for _ in _rendered(folder, seed, missing, workers):
        ready += 1
        progress(ready)
    for split in SPLITS:
        lines = annotation_lines([s for s in scripts if s.split == split])
        write_atomically(
            annotation_path(out, split), "".join(f"{line}\n" for line in lines).encode()
        )
    write_json(out / "durations.json", {s.id: round(s.duration_seconds, 3) for s in scripts})
    summary = {
        "world_version": WORLD_VERSION,
        "seed": seed,
        "videos": videos,
        "fps": FPS,
        "size": [WIDTH, HEIGHT],
        "counts": {
            split: {
                "videos": sum(s.split == split for s in scripts),
                "queries": sum(len(s.queries) for s in scripts if s.split == split),
            }
            for split in SPLITS
        },
        "statistics": statistics_of(scripts),
    }
    write_json(out / "world.json", summary)
    return {**summary, "rendered": len(missing)}


def annotation_lines(scripts: list[Script]) -> list[str]:
    """The queries of `scripts` in the Charades-STA format, one per line."""
    return [
        f"{script.id} {query.start:.1f} {query.end:.1f}##{query.sentence}"
        for script in scripts
        for query in script.queries
    ]


def render_video(folder: Path, seed: int, index: int) -> Path:
    """Render video `index` of world `seed` into `folder`, atomically."""
    script = sample_script(seed, index)
    path = folder / f"{script.id}.mp4"
    comment = f"mmdist synthetic world, version {WORLD_VERSION}, seed {seed}, video {index}"
    metadata = {"comment": comment, "world_version": str(WORLD_VERSION)}
    write_video(path, render_frames(script), fps=script.fps, metadata=metadata)
    return path


def _rendered(folder: Path, seed: int, indices: list[int], workers: int) -> Iterator[Path]:
    if workers <= 1 or len(indices) <= 1:
        yield from (render_video(folder, seed, index) for index in indices)
        return
    # Spawned, not forked: video encoders do not survive a fork.
    with ProcessPoolExecutor(min(workers, len(indices)), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(render_video, folder, seed, index) for index in indices]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _not_whole(folder: Path, scripts: list[Script]) -> list[int]:
    """The indices of the scripts whose video is missing or incomplete."""
    missing = []
    with Decoder() as decoder:
        for index, script in enumerate(scripts):
            path = folder / f"{script.id}.mp4"
            if not path.is_file():
                missing.append(index)
                continue
            try:
                if decoder.probe(path).frame_count != script.frames:
                    missing.append(index)
            except VideoError:
                missing.append(index)
    return missing


def main() -> None:
    """Command line of this module; see `--help`."""
    parser = argparse.ArgumentParser(
        description="Render short home videos and train, val and test annotations in the "
        "Charades-STA format. The same seed gives the same annotations and frames. A killed run "
        "resumes."
    )
    parser.add_argument("--videos", type=int, required=True, help="number of videos")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--out", type=Path, required=True, help="folder of the world")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; default: all cores"
    )
    args = parser.parse_args()
    with StepDisplay() as display:
        summary = make_world(
            args.out,
            videos=args.videos,
            seed=args.seed,
            workers=args.workers,
            progress=lambda done: display("rendering", int(done), args.videos),
        )
    for key, value in summary.items():
        sys.stdout.write(f"{key}: {value}\n")
