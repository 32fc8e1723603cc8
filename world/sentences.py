"""The grammar: one action as several people would write it down.

A sentence is a subject, a verb phrase in one of three forms and an object with its synonyms,
in lower case with a full stop, like those of Charades-STA. Every word is a common one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SUBJECTS = ("person", "a person", "the person", "he", "she", "someone", "a man", "a woman")
_SUBJECT_ODDS = (0.34, 0.26, 0.24, 0.03, 0.03, 0.06, 0.02, 0.02)
# How the verb stands: "opens", "is opening", "opening" (as in "person opening a door.").
_FORMS = ("finite", "progressive", "participle")
_FORM_ODDS = (0.58, 0.27, 0.15)

_NOUNS: dict[str, tuple[str, ...]] = {
    "door": ("door", "door", "door", "front door"),
    "cabinet": ("cabinet", "cabinet", "cabinet door", "kitchen cabinet"),
    "refrigerator": ("refrigerator", "refrigerator", "refrigerator door"),
    "laptop": ("laptop", "laptop", "computer", "laptop computer"),
    "cup": ("cup", "cup", "glass", "coffee cup"),
    "book": ("book", "book", "novel"),
    "phone": ("phone", "phone", "telephone", "mobile phone"),
    "bag": ("bag", "bag", "shopping bag", "purse"),
    "box": ("box", "box", "package", "cardboard box"),
    "broom": ("brush", "brush", "floor brush"),
    "chair": ("chair", "chair", "wooden chair"),
    "couch": ("couch",),
    "lamp": ("lamp", "light", "lamp", "floor lamp"),
    "television": ("television", "tv"),
    "hat": ("hat", "hat", "cap"),
    "sandwich": ("sandwich", "sandwich", "some food"),
    "table": ("table", "desk"),
}
_HOMES = {
    "cup": "table",
    "book": "table",
    "phone": "table",
    "bag": "floor",
    "box": "floor",
    "broom": "floor",
}

# Verb phrases: finite/participle, "opens/opening"; {o} the object with its article.
# "starts_wiping" where the plain form is too rare a word.
_TEMPLATES: dict[str, tuple[str, ...]] = {
    "opens": ("opens/opening {o}", "opens/opening {o}", "opens/opening up {o}"),
    "closes": ("closes/closing {o}", "closes/closing {o}", "starts_closing/closing {o}"),
    "picks up": (
        "picks/picking up {o}",
        "picks/picking up {o} from the {home}",
        "takes/taking {o} from the {home}",
        "takes/taking {o} off the {home}",
        "grabs/grabbing {o}",
        "lifts/lifting {o}",
    ),
    "puts down": (
        "puts/putting {o} down",
        "puts/putting down {o}",
        "puts/putting {o} on the {home}",
        "places/placing {o} on the {home}",
        "sets/setting down {o}",
    ),
    "sits down": (
        "sits/sitting down on {o}",
        "sits/sitting down on {o}",
        "sits/sitting in {o}",
        "takes/taking a seat on {o}",
    ),
    "stands up": (
        "stands/standing up from {o}",
        "gets/getting up from {o}",
        "stands/standing up",
        "rises/rising from {o}",
    ),
    "turns on": ("turns/turning on {o}", "turns/turning {o} on", "switches/switching on {o}"),
    "turns off": ("turns/turning off {o}", "turns/turning {o} off", "switches/switching off {o}"),
    "pushes": (
        "pushes/pushing {o}",
        "pushes/pushing {o} across the floor",
        "pushes/pushing {o} away",
    ),
    "pulls": (
        "pulls/pulling {o}",
        "pulls/pulling {o} across the floor",
        "starts_dragging/dragging {o}",
    ),
    "puts on": ("puts/putting on {o}", "puts/putting {o} on", "puts/putting {o} on their head"),
    "takes off": ("takes/taking off {o}", "takes/taking {o} off", "removes/removing {o}"),
    "drinks": (
        "drinks/drinking from {o}",
        "drinks/drinking from {o}",
        "takes/taking a drink from {o}",
        "drinks/drinking some water",
        "drinks/drinking a {drink} of {liquid}",
    ),
    "reads": (
        "reads/reading {o}",
        "reads/reading {o}",
        "reads/reading through {o}",
        "starts/starting to read {o}",
        "looks/looking at the pages of {o}",
    ),
    "eats": (
        "eats/eating {o}",
        "eats/eating {o}",
        "takes/taking a bite of {o}",
        "starts/starting to eat {o}",
    ),
    "sweeps": (
        "sweeps/sweeping the floor",
        "sweeps/sweeping the floor with {o}",
        "sweeps/sweeping with {o}",
        "uses/using {o} to clean the floor",
    ),
    "wipes": (
        "starts_wiping/wiping {o}",
        "starts_wiping/wiping {o} with a cloth",
        "starts_cleaning/cleaning {o}",
        "starts_cleaning/cleaning {o} with a towel",
        "uses/using a cloth to clean {o}",
    ),
    "waves": (
        "waves/waving",
        "waves/waving their hand",
        "waves/waving a hand in the air",
        "waves/waving at the camera",
        "waves/waving hello",
    ),
}
_SEATED = {"drinks", "reads", "waves"}


def templates_of(action: str) -> tuple[str, ...]:
    """Return the verb phrases that `action` is told with."""
    return _TEMPLATES[action]


def sample_sentence(
    rng: np.random.Generator, action: str, thing: str | None, *, seat: str | None = None
) -> str:
    """Write one sentence about `action` with `thing`, done while sitting on `seat` if given."""
    template = _choice(rng, templates_of(action))
    form = _FORMS[rng.choice(len(_FORMS), p=_FORM_ODDS)]
    verb, _, rest = template.partition(" ")
    finite, participle = verb.split("/")
    subject = _SUBJECTS[rng.choice(len(_SUBJECTS), p=_SUBJECT_ODDS)]
    spoken = {
        "finite": finite.replace("_", " "),
        "progressive": f"is {participle}",
        "participle": participle,
    }[form]
    if form == "participle" and subject in ("he", "she", "someone"):
        subject = "person"
    words = f"{subject} {spoken} {rest}".rstrip()
    if seat is not None and action in _SEATED and rng.random() < 0.4:
        words += f" while sitting on {_phrase(rng, seat)}"
    noun = _phrase(rng, thing) if thing else ""
    home = _HOMES.get(thing or "", "")
    words = words.format(
        o=noun,
        home=_choice(rng, _NOUNS["table"]) if home == "table" else home,
        drink=_choice(rng, ("cup", "glass")),
        liquid=_choice(rng, ("water", "coffee", "tea")),
    )
    owner = {"he": "his", "she": "her"}.get(subject, "their")
    return words.replace("their", owner) + "."


def vocabulary() -> frozenset[str]:
    """Return every word that the grammar can write."""
    words: set[str] = set()
    for phrase in (*_SUBJECTS, *(n for nouns in _NOUNS.values() for n in nouns)):
        words.update(phrase.split())
    for templates in _TEMPLATES.values():
        for template in templates:
            for word in template.split():
                if not word.startswith("{"):
                    words.update(word.replace("_", "/").split("/"))
    words.update(_HOMES.values())
    words.update(("is", "a", "the", "his", "her", "on", "while", "sitting"))
    words.update(("cup", "glass", "water", "coffee", "tea"))
    return frozenset(words)


def _phrase(rng: np.random.Generator, thing: str) -> str:
    noun = _choice(rng, _NOUNS[thing])
    if noun.startswith("some "):
        return noun
    if thing == "hat":
        return f"{_choice(rng, ('a', 'the', 'their', 'a'))} {noun}"
    return f"{_choice(rng, ('the', 'the', 'a'))} {noun}"


def _choice(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
