"""What several commands share: consoles, progress bars and options."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import progress
from rich.console import Console
from rich.text import Text

from mmdist_e2e.grounding.config import PRESETS
from mmdist_e2e.grounding.data.annotations import PROTOCOLS
from mmdist_e2e.weights.pull import model_folder
from mmdist_e2e.workspace import OPTIONS

if TYPE_CHECKING:
    from mmdist_e2e.extractors.journal import Log
    from mmdist_e2e.extractors.search import Outcome, Video


# A file or a pipe has no width: lines of tables are not wrapped there.
PIPE_WIDTH = 200
LINE_SECONDS, DRAW_SECONDS = 60.0, 0.5  # between two lines of progress; in a terminal
results = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else PIPE_WIDTH)
notes = Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """Print one plain line on stderr, without wrapping or markup; nothing for an empty one."""
    if line:
        notes.print(line, markup=False, soft_wrap=True)


class ExtractionProgress:
    """What an extraction has done so far: a line that changes in a terminal, else one a minute.

    Called by the engine from any thread. outcomes: of the videos that are finished.
    log: a file to which they are written.
    """

    def __init__(self, total: int, log: Log | None = None) -> None:
        self._log = log
        self.outcomes: list[Outcome] = []
        self._total, self._begun = total, time.monotonic()
        self._sizes: Mapping[Video, int] = {}
        self._running: dict[Video, float] = {}  # fractions done
        self._drawn = notes.status("")
        self._over = threading.Event()
        self._lines = threading.Thread(target=self._say_now_and_then, daemon=True)

    def __enter__(self) -> ExtractionProgress:
        if notes.is_terminal:
            self._drawn.start()
        self._lines.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._lines.join()
        self._drawn.stop()
        if not notes.is_terminal and any(outcome.attempts for outcome in self.outcomes):
            say(self.line())

    def planned(self, sizes: Mapping[Video, int]) -> None:
        self._sizes, self._begun = sizes, time.monotonic()

    def advanced(self, video: Video, fraction: float) -> None:
        self._running[video] = fraction

    def finished(self, outcome: Outcome) -> None:
        self._running.pop(outcome.video, None)
        self.outcomes.append(outcome)
        if self._log is not None:
            self._log.write(outcome)
        if outcome.status == "failed":
            say(f"failed: {outcome.cause}")

    def line(self) -> str:
        """How many videos are done, how fast, for how long still, and which are running."""
        hours = max(time.monotonic() - self._begun, 1e-3) / 3600
        outcomes, running = [*self.outcomes], dict(self._running)
        ours = [outcome for outcome in outcomes if outcome.attempts]
        failed = sum(outcome.status == "failed" for outcome in outcomes)
        parts = [f"{len(outcomes)} of {self._total} videos, {failed} failed"]
        if ours:
            seconds = sum(outcome.video_seconds for outcome in ours)
            parts.append(f"{len(ours) / hours / 3600:.2f} videos/s")
            parts.append(f"{seconds / 3600 / hours:.1f} hours of video per hour")
        done = sum((self._sizes.get(outcome.video, 0) for outcome in outcomes), 0.0)
        done += sum(self._sizes.get(video, 0) * part for video, part in running.items())
        share = done / max(sum(self._sizes.values()), 1)
        if 0 < share < 1:
            left = timedelta(seconds=round(hours * 3600 * (1 - share) / share))
            parts.append(f"{left} left")
        names = ", ".join(video.label[-40:] for video in running)
        return ", ".join(parts) + (f"; running: {names}" if names else "")

    def _say_now_and_then(self) -> None:
        while not self._over.wait(DRAW_SECONDS if notes.is_terminal else LINE_SECONDS):
            if notes.is_terminal:
                self._drawn.update(Text(self.line()))
            else:
                say(self.line())


class StepDisplay(progress.Progress):
    """A bar that restarts with each step; called with (step, done, total).

    logged: where there is no terminal for a bar, print a line for each step.
    """

    def __init__(self, *, logged: bool = True) -> None:
        super().__init__(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=notes,
            transient=True,
            disable=not notes.is_terminal,
        )
        self._logged = logged and not notes.is_terminal
        self._step = self.add_task("loading")
        self._said = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        self.update(self._step, description=what, completed=done, total=total)
        if what != self._said and self._logged:
            say(what)
        self._said = what


def skipped(name: str, left_out: Mapping[str, int]) -> str:
    """What --skip-missing left out of annotations."""
    return "{}: left out {queries} queries of {videos} videos without features".format(
        name, **left_out
    )


PATH = click.Path(path_type=Path)


def pulled(name: Path) -> Path:
    """The folder of a model that is given by name. Raises MmdistError as `model_folder`."""
    with StepDisplay() as display:
        return model_folder(str(name), display)


PLACES = {  # what the options of a workspace are, and where they are looked for
    "rgb": "Features: a folder that mmdist extract wrote, an HDF5 file or a folder of VIDEO.npy.  "
    "[default: in features/]",
    "flow": "Flow features that are not in --features.  [default: in features/]",
    "train": "Annotations to train on.  [default: the training file in annotations/]",
    "val": "Annotations of other videos, to choose the checkpoint on.  [default: the validation "
    "file in annotations/, if there is one]",
    "test": "Annotations for testing.  [default: the test file in annotations/]",
    "annotations": "Annotations to score on.  [default: the test file in annotations/, else the "
    "validation file]",
    "teacher": "Run of the teacher to learn from.  [default: the newest finished one in runs/]",
    "glove": "Word vectors: GloVe text or CPL's glove.pkl.  [default: annotations/glove* if there "
    "is one, else those that ship]",
    "durations": "Seconds by video: JSON, Charades' CSV or a feature store.  [default: "
    "annotations/durations* if there is one]",
}


def places(*names: str, **more: Any) -> Callable[[Any], Any]:
    """A decorator that adds the options of these names, in this order."""

    def add(command: Any) -> Any:
        for name in reversed(names):
            option = click.option(OPTIONS[name], name, type=PATH, help=PLACES[name], **more)
            command = option(command)
        return command

    return add


def choice(flag: str, *valid: str, help: str) -> Callable[[Any], Any]:  # noqa: A002 - click's
    """An option with a fixed set of values, the default first."""
    return click.option(flag, default=valid[0], type=click.Choice(valid), help=help)


skip_missing = click.option(
    "--skip-missing",
    is_flag=True,
    help="Leave out queries of videos without features, and count them.",
)

protocol = click.option(
    "--protocol",
    default=PROTOCOLS[0],
    type=click.Choice(PROTOCOLS),
    help="official keeps all queries; cpl drops those that end after their video.",
)

preset = click.option(
    "--preset",
    default="paper",
    type=click.Choice(list(PRESETS)),
    help="Where settings come from: the paper, its values on ActivityNet Captions, or a smaller "
    "network for few queries. --length and --set replace single ones.",
)

length = click.option(
    "--length",
    type=click.IntRange(min=4),
    help="Positions L that features are resampled to.  [default: the preset's]",
)

device = click.option(
    "--device", default="auto", help="Where networks run: auto, cpu, cuda or cuda:N."
)
