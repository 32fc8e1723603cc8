"""The documents name settings, options, files and headings that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mmdist_e2e.cli.main import main
from mmdist_e2e.grounding.config import OURS, RECIPES, configure

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()
DERIVED = {"feature_dim", "word_dim", "vocabulary_size", "length", "channels"}  # from the data


def recipes(preset: str) -> list:
    return [configure(name, preset=preset, modalities=2) for name in RECIPES]


def test_the_settings_page_names_every_setting_and_both_presets_values():
    page = (ROOT / "docs" / "settings.md").read_text()
    cells = r" ?([^|]*?) ?\|"
    rows = re.findall(rf"^\|[^|]*\| `(\w+)` \|{cells}{cells}{cells}", page, re.M)
    assert {name for name, *_ in rows} == {n for r in recipes("paper") for n in r.homes} - DERIVED
    assert {name for name, _, _, source in rows if source == "ours"} == set(OURS)
    for column, preset in enumerate(("paper", "small"), start=1):
        told = {row[0]: (row[column] or row[1]).strip("` ") for row in rows}
        plain = {name: cell for name, cell in told.items() if re.fullmatch(r"[\w.]+", cell)}
        assert len(plain) > len(rows) / 2
        for recipe in recipes(preset):
            for name in plain.keys() & recipe.homes.keys():
                value = getattr(recipe.parts[recipe.homes[name]], name)
                if not isinstance(value, str):
                    number = isinstance(value, float)
                    value = f"{value:g}" if number else str(value).lower()
                assert plain[name] == value, (preset, name)


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_of_ours(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not heading or heading in headings(target), link


def commands(page: Path) -> list[list[str]]:
    """What follows `mmdist` in the lines of code blocks, continued lines joined."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S)
    lines = (
        "\n".join(text for language, text in blocks if not language)
        .replace("\\\n", " ")
        .splitlines()
    )
    found = (re.match(r"(?:\$ )?mmdist (.*)", line) for line in lines)
    return [shlex.split(each[1], comments=True) for each in found if each]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_and_options_exist(page):
    for words in commands(page):
        command: click.Command = main
        while isinstance(command, click.Group):
            found = command.get_command(click.Context(command), words[0])
            assert found is not None, words
            command, words = found, words[1:]
        with command.make_context("mmdist", words):  # parses, and runs nothing
            pass


def test_the_readme_shows_commands():
    assert len(commands(ROOT / "README.md")) >= 8


def test_the_readme_shows_what_the_command_prints(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MMDIST_CACHE", str(tmp_path))
    command, shown = re.search(
        r"^```\n\$ mmdist (ground [^\n]*)\n(.*?)^```", README, re.M | re.S
    ).groups()
    printed = CliRunner().invoke(main, shlex.split(command)).stdout
    without_figures = [re.sub(r"[ -]\d+\.\d+", " #", text) for text in (shown, printed)]
    assert without_figures[0] == without_figures[1]
