"""`mmdist train`: a grounding model from features and sentences, without timestamps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mmdist_e2e.cli.display import StepDisplay, results
from mmdist_e2e.structures import MmdistError


@click.group("train")
def train_group() -> None:
    """Train a grounding model from video–sentence pairs without timestamps."""


@train_group.command("cpl")
@click.option("--features", required=True, type=click.Path(path_type=Path), help="Store or HDF5.")
@click.option("--train", "train_path", required=True, type=click.Path(path_type=Path))
@click.option("--val", "val_path", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--glove", type=click.Path(path_type=Path), help="GloVe text or CPL's glove.pkl.")
@click.option("--durations", type=click.Path(path_type=Path), help="JSON: video id to seconds.")
@click.option("--length", default=64, show_default=True, type=click.IntRange(min=4), help="L.")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: the recipe's.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any other setting of the recipe; may be repeated.",
)
def cpl_command(
    features: Path,
    train_path: Path,
    val_path: Path | None,
    out: Path,
    seed: int,
    glove: Path | None,
    durations: Path | None,
    length: int,
    epochs: int | None,
    settings: Sequence[str],
) -> None:
    """Train the `cpl` recipe: the global branch alone.

    A killed run goes on where it was; the same command on a finished run does nothing.
    """
    from mmdist_e2e.grounding.train import train_run
    from mmdist_e2e.weights.words import load_word_vectors, shipped_word_vectors

    overrides = parse_settings(settings)
    if epochs is not None:
        overrides["epochs"] = epochs
    vectors = load_word_vectors(glove) if glove is not None else shipped_word_vectors()
    with StepDisplay() as display:
        summary = train_run(
            recipe_name="cpl",
            features_path=features,
            train_path=train_path,
            val_path=val_path,
            out=out,
            seed=seed,
            word_vectors=vectors,
            durations=durations,
            length=length,
            overrides=overrides,
            trained_on=training_source(train_path),
            progress=display,
        )
    validation = ", ".join(f"{name} {value:.2f}" for name, value in summary["validation"].items())
    results.print(
        f"{out}: recipe {summary['recipe']}, seed {seed}, {summary['queries']} queries, "
        f"best epoch {summary['best_epoch']} of {summary['epochs']} "
        f"(chosen by {summary['selected_by']}): {validation}",
        markup=False,
        soft_wrap=True,
    )


def training_source(train_path: Path) -> str | None:
    """What the model card says of annotations of a synthetic world; None for any others."""
    facts_path = train_path.parent / "world.json"
    if not facts_path.is_file():
        return None
    try:
        facts = json.loads(facts_path.read_text())
        version, seed = facts["world_version"], facts["seed"]
    except (ValueError, KeyError, TypeError):
        return None  # somebody's own file of that name
    return f"our own synthetic world, version {version} (seed {seed}, {train_path.name})"


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Turn NAME=VALUE pairs into numbers and words. Raises MmdistError without a "="."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise MmdistError(f"--set takes NAME=VALUE, like --set dropout=0.2; got {setting!r}.")
        parsed[name] = _value(value)
    return parsed


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
