"""The synthetic world's scripts: what happens, when, and the sentences about it."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from mmdist_e2e.weights.words import shipped_word_vectors
from world.sentences import sample_sentence, vocabulary
from world.statistics import best_constant_span, statistics_of
from world.story import (
    ACTIONS,
    COMBINATIONS,
    NOVEL,
    OBJECTS,
    OPPOSITES,
    after,
    is_possible,
    sample_contents,
    state_for,
)
from world.world import MIN_GAP_SECONDS, Script, sample_script, split_of


@cache
def scripts(seed: int = 0) -> tuple[Script, ...]:
    return tuple(sample_script(seed, index) for index in range(1000))


def performed(script: Script) -> list[tuple[str, str | None]]:
    return [(s.action, s.object) for s in script.segments if s.action != "idle"]


def test_the_same_seed_gives_the_same_scripts_and_another_seed_others() -> None:
    assert [sample_script(5, i) for i in range(20)] == [sample_script(5, i) for i in range(20)]
    assert all(sample_script(5, i) != sample_script(6, i) for i in range(20))
    assert len({script.id for script in scripts()}) == 1000


def test_splits_go_by_index_alone() -> None:
    assert [split_of(i) for i in range(10)] == ["train"] * 7 + ["val"] + ["test"] * 2
    assert all(script.split == split_of(i) for i, script in enumerate(scripts()))


def test_the_world_is_as_large_as_promised() -> None:
    assert len(ACTIONS) >= 12
    assert len(OBJECTS) >= 8
    seen = {pair for script in scripts() for pair in performed(script)}
    assert seen == {(action, thing) for action in ACTIONS for thing in COMBINATIONS[action]}


def test_statistics_are_like_those_of_charades_sta() -> None:
    numbers = statistics_of(scripts())
    assert numbers["moment_fraction_mean"] == pytest.approx(0.27, abs=0.02)
    assert numbers["moment_fraction_p10"] == pytest.approx(0.16, abs=0.02)
    assert numbers["moment_fraction_p90"] == pytest.approx(0.42, abs=0.03)
    assert numbers["words_per_query"] == pytest.approx(6.0, abs=0.5)
    assert numbers["queries_per_video"] == pytest.approx(2.2, abs=0.15)
    assert numbers["vocabulary"] >= 60
    assert numbers["best_constant_span_recall"] < 35.0


def test_best_constant_span_against_counting_by_hand() -> None:
    spans = np.array([[0.0, 0.5], [0.05, 0.55], [0.7, 0.9]])
    span, recall = best_constant_span(spans)
    hits = 0
    for start, end in spans:
        shared = max(0.0, min(end, span[1]) - max(start, span[0]))
        hits += shared / (end - start + span[1] - span[0] - shared) >= 0.5
    assert recall == pytest.approx(100 * hits / 3)
    assert hits == 2


def test_segments_follow_each_other_and_leave_time_to_walk() -> None:
    for script in scripts():
        assert 15.0 <= script.duration_seconds <= 30.0
        assert script.frames == pytest.approx(script.duration_seconds * script.fps)
        clock = 0.0
        for segment in script.segments:
            assert segment.start == clock
            assert segment.end > segment.start
            clock = segment.end
        assert clock == script.duration_seconds
        ends = [s for s in script.segments if s.action != "idle"]
        for one, other in pairwise(ends):
            assert other.start - one.end >= MIN_GAP_SECONDS - 0.101


def test_every_action_is_possible_when_it_happens_and_happens_once() -> None:
    for script in scripts():
        state, story = script.initial, performed(script)
        assert len(story) >= 2
        assert len(set(story)) == len(story)
        for action, thing in story:
            assert is_possible(action, thing, state, script.contents), (script.id, action, thing)
            state = after(action, thing, state)


def test_what_is_possible_follows_what_was_done() -> None:
    contents = tuple(OBJECTS)
    rng = np.random.default_rng(0)
    for action, opposite in OPPOSITES:
        assert set(COMBINATIONS[action]) == set(COMBINATIONS[opposite])
        if action == "pushes":  # these two do not undo each other
            continue
        for thing in COMBINATIONS[action]:
            state = state_for(action, thing, rng, contents)
            assert not is_possible(opposite, thing, state, contents)
            state = after(action, thing, state)
            assert not is_possible(action, thing, state, contents)
            assert is_possible(opposite, thing, state, contents)


def test_a_required_thing_is_in_its_room() -> None:
    rng = np.random.default_rng(1)
    for thing in OBJECTS:
        assert thing in sample_contents(rng, required=[thing])


def test_objects_alone_do_not_give_the_query_away() -> None:
    used = [{thing for _, thing in performed(s) if thing} for s in scripts()]
    unused = [len(set(s.contents) - u) for s, u in zip(scripts(), used, strict=True)]
    assert np.mean(unused) >= 4


def test_queries_tell_what_happens_then() -> None:
    for script in scripts():
        spans = {(s.start, s.end) for s in script.segments if s.action != "idle"}
        assert len(set(script.queries)) == len(script.queries) >= 1
        meant = {query.sentence: query[:2] for query in script.queries}
        assert all(meant[query.sentence] == query[:2] for query in script.queries)
        for query in script.queries:
            assert (query.start, query.end) in spans
            assert 0.0 <= query.start < query.end <= script.duration_seconds
            assert (round(query.start, 1), round(query.end, 1)) == query[:2]


def test_standing_up_says_from_where_when_it_happens_twice() -> None:
    for script in scripts():
        if [action for action, _ in performed(script)].count("stands up") > 1:
            for query in script.queries:
                assert not query.sentence.endswith(("stands up.", "standing up."))


def test_novel_combinations_are_in_test_alone_and_their_words_in_training() -> None:
    trained: set[str] = set()
    novel: set[str] = set()
    for script in scripts():
        if script.split != "test":
            assert not NOVEL.intersection(performed(script))
        for segment in script.segments:
            words = {
                word
                for query in script.queries
                if query[:2] == (segment.start, segment.end)
                for word in query.sentence[:-1].split()
            }
            if script.split == "train":
                trained |= words
            elif (segment.action, segment.object) in NOVEL:
                novel |= words
    in_test = [pair for s in scripts() if s.split == "test" for pair in performed(s)]
    assert set(in_test) >= NOVEL
    assert len(novel) > 20
    assert novel <= trained


def test_sentences_use_common_words_and_no_sentence_means_two_actions() -> None:
    vectors = shipped_word_vectors()
    assert [word for word in sorted(vocabulary()) if word not in vectors] == []
    rng = np.random.default_rng(2)
    meanings: dict[str, tuple[str, str | None]] = {}
    for action in ACTIONS:
        for thing in COMBINATIONS[action]:
            for _ in range(150):
                sentence = sample_sentence(rng, action, thing)
                assert sentence.endswith(".")
                assert sentence == sentence.lower()
                assert set(sentence[:-1].split()) <= vocabulary()
                if "standing up." in sentence or "stands up." in sentence:
                    continue  # from whichever seat
                assert meanings.setdefault(sentence, (action, thing)) == (action, thing)


def test_one_action_is_told_in_many_ways() -> None:
    rng = np.random.default_rng(3)
    told = {sample_sentence(rng, "drinks", "cup") for _ in range(200)}
    assert len(told) > 40
