"""`mmdist train`: a grounding model from features and sentences, without timestamps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from mmdist_e2e.cli import common as options
from mmdist_e2e.cli.common import PATH, StepDisplay, notes, results, say
from mmdist_e2e.cli.extract import parse_modalities
from mmdist_e2e.grounding.config import OURS, advice, configure
from mmdist_e2e.store import check_out
from mmdist_e2e.structures import MmdistError
from mmdist_e2e.workspace import RUNS, fill

SETTINGS = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other setting of the recipe; may be repeated.",
)

HELP = """\
The checkpoint is the epoch that rebuilds the sentences of --val best or, without --val, those of a
part of the training videos; the last line of output says which. This reads no timestamps; --set
select_by=val_recall does. To compare settings on annotations that choose nothing, train with
--carve 0.1, then run `mmdist evaluate RUN --annotations val.json`.

The same command resumes an interrupted run and leaves a finished one as it is; with more --epochs
it continues. A run of other features, annotations or settings is never overwritten.

Several GPUs of one machine: torchrun --nproc-per-node N -m mmdist_e2e.cli.main train …"""


@click.group("train")
def train_group() -> None:
    """Train a grounding model from video–sentence pairs without timestamps."""


OPTIONS = (  # of every recipe, in the order of the help
    options.preset,
    options.places("rgb", "flow", "train", "val"),
    click.option(
        "--carve",
        type=click.FloatRange(0, 1, max_open=True),
        help="Instead of --val: the share of training videos set aside to choose the checkpoint "
        "on; 0 takes the last epoch.  [default: 0.1 where there is no validation file]",
    ),
    click.option(
        "--out",
        type=PATH,
        help="Folder of the run.  [default: runs/RECIPE; with another seed runs/RECIPE-seedN]",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(min=0),
        help="Seed of weights, order, masks and dropout.",
    ),
    options.places("glove", "durations"),
    click.option(
        "--vocabulary",
        "vocabulary_path",
        type=PATH,
        help="Words to predict: one per line, a JSON list or CPL's glove.pkl; default: those of "
        "--train.",
    ),
    options.skip_missing,
    options.protocol,
    options.length,
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        help="Passes over the training data.  [default: 30 for cpl, else 15]",
    ),
    options.device,
    SETTINGS,
    click.option(
        "--tensorboard",
        is_flag=True,
        help="Also write the figures of log.csv for TensorBoard, to OUT/tensorboard.",
    ),
)


def add_recipe(recipe: str, what: str, *more: Callable[..., Any], modality: str = "rgb") -> None:
    """Make `mmdist train RECIPE`; more: further options."""

    @click.option(
        "--modality",
        default=modality,
        show_default=True,
        help="What the network reads: rgb, flow or rgb,flow.",
    )
    def command(**given: Any) -> None:
        _train(recipe, **given)

    for option in reversed((*more, *OPTIONS)):
        command = option(command)
    text = f"Train the `{recipe}` recipe: {what}.\n\n{HELP}"
    train_group.command(recipe, help=text)(command)


add_recipe("cpl", "the global branch alone (CPL)")
add_recipe("baseline", "the global and the local branch (the paper's baseline)")
add_recipe("teacher", "two modalities that teach each other", modality="rgb,flow")
add_recipe("student", "the baseline's network, taught by a teacher", options.places("teacher"))


def _train(
    recipe: str,
    *,
    out: Path | None,
    modality: str,
    carve: float | None,
    epochs: int | None,
    device: str,
    settings: Sequence[str],
    **given: Any,
) -> None:
    """given: paths by the names of OPTIONS, and what `train_run` takes under the same name."""
    from mmdist_e2e.extractors.runner import resolve_device
    from mmdist_e2e.grounding.parallel import processes, rank
    from mmdist_e2e.grounding.train import CARVED_FRACTION, train_run
    from mmdist_e2e.weights.words import load_word_vectors

    check_out(out or RUNS)
    if carve is not None and given.pop("val") is not None:
        raise MmdistError("--carve makes a validation split, and --val is one; give only one.")
    modalities = parse_modalities(modality)
    found = fill(f"train {recipe}", given, "teacher", *modalities, "train")
    if out is None:
        out = RUNS / (f"{recipe}-seed{given['seed']}" if given["seed"] else recipe)
        found += f" --out {out}"
    overrides = parse_settings(settings) | ({} if epochs is None else {"epochs": epochs})
    vectors = load_word_vectors(given["glove"])
    with processes(resolve_device(device)) as device, StepDisplay() as display:
        first = rank() == 0
        if first:
            say(found)
        summary = train_run(
            recipe_name=recipe,
            features_path=given.pop("rgb") or given["flow"],
            flow_features_path=given.pop("flow"),
            train_path=given.pop("train"),
            val_path=given.pop("val", None),
            modalities=modalities,
            carve=CARVED_FRACTION if carve is None else carve,
            out=out,
            word_vectors=vectors,
            overrides=overrides,
            device=device,
            started=partial(_show, recipe, given["preset"]) if first else None,
            progress=display if first else None,
            **given,
        )
    if not first:  # of several processes one prints
        return
    notes = [] if summary["how"] == "trained" else [summary["how"]]
    validation = ", ".join(f"{name} {value:.2f}" for name, value in summary["validation"].items())
    result = (
        f"recipe {recipe}, seed {summary['seed']}, {summary['queries']} queries, "
        f"best epoch {summary['best_epoch']} of {summary['epochs']} "
        f"(chosen by {summary['selected_by']}): {validation or 'no validation'}"
    )
    notes += [options.skipped(name, left) for name, left in summary["skipped"].items()]
    for line in (*notes, *summary["continued"], result):
        results.print(f"{out}: {line}", markup=False, soft_wrap=True)


def _show(recipe: str, preset: str, settings: Mapping[str, Any], queries: int) -> None:
    """Print every setting of a training, with the paper's value where it differs."""
    paper = preset if preset != "small" else "paper"
    standard = configure(recipe, preset=paper, modalities=2)
    table = Table(title=f"Settings (preset {preset})", title_justify="left", show_edge=False)
    for column in ("setting", "value", "paper or CPL, where it differs"):
        table.add_column(column)
    for name, value in settings.items():
        part = standard.parts.get(standard.homes.get(name, ""))
        other = getattr(part, name, value)
        told = "" if other == value else _shown(other) + (" (ours)" if name in OURS else "")
        table.add_row(name, _shown(value), told)
    notes.print(table)
    if text := advice(preset, queries):
        say(text)


def _shown(value: object) -> str:
    """A setting's value as --set takes it."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Turn NAME=VALUE pairs into numbers and words. Raises MmdistError without a "="."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise MmdistError(f"--set takes NAME=VALUE, like --set dropout=0.2; got {setting!r}.")
        parsed[name] = value
        for kind in (float, int):
            with suppress(ValueError):
                parsed[name] = kind(value)
    return parsed
