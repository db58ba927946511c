"""The terse telling: records, single turns, and an oracle that charges an error once, to the step that made it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from diptych.data.records import open_source
from diptych.document import Document, Image, Text
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.conversations import TURNS, make_turn
from diptych.worlds.storyboard.oracle import Verdict, judge, read_pictures
from diptych.worlds.storyboard.render import render
from diptych.worlds.storyboard.scene import Event, Scene, Thing, in_split, outcome, random_scene, scene_splits
from diptych.worlds.storyboard.tasks import Truth, make_task, task_stream
from diptych.worlds.storyboard.world import TERSE, World

BALL, TREE, BOX = Thing("ball", "red", "small"), Thing("tree", "blue", "big"), Thing("box", "green", "small")
BIG_BALL, RED_TREE = Thing("ball", "red", "big"), Thing("tree", "red", "big")
START = Scene("meadow", (BALL, TREE, None))
GROWN = Scene("meadow", (BIG_BALL, TREE, None))
GONE = Scene("meadow", (BIG_BALL, None, None))
NIGHT = Scene("night", (BIG_BALL, None, None))
EVENTS = (Event("grow", "ball"), Event("leave", "tree"), Event("background", background="night"))
TRUTH = Truth(EVENTS, (GROWN, GONE, NIGHT), start=START, world=TERSE)
TEXTS = ("the ball grows .", "the tree leaves .", "night falls .")


def said(*pairs: tuple[str, Scene | PIL.Image.Image]) -> Verdict:
    pictures = [(Text(text), Image(render(shown) if isinstance(shown, Scene) else shown)) for text, shown in pairs]
    return judge([Document(tuple(itertools.chain(*pictures)))], [TRUTH])[0]


def noise(seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8))


# --- tasks and records ---------------------------------------------------------------------------------------------------


def test_a_text_tells_the_event_alone_and_the_picture_shows_the_scene():
    for task in itertools.islice(task_stream(0, "train", TERSE), 60):
        segments = task.truth.document().segments
        texts, images = segments[::2], segments[1::2]
        assert [s.text for s in texts] == [f"{language.tell(event)} ." for event in task.truth.events]
        assert read_pictures([image.pixels for image in images]) == list(task.truth.scenes)
        scene = task.start
        for event, after in zip(task.truth.events, task.truth.scenes, strict=True):
            scene = event.apply(scene)
            assert scene == after
        assert [type(s) for s in task.prompt] == [Text, Image, Text]
        assert read_pictures([task.prompt.images[0].pixels]) == [task.start]
        told = task.prompt.segments[2].text.removeprefix("first ").removesuffix(" .").split(" , then ")
        assert tuple(language.parse_event(sentence) for sentence in told) == task.truth.events
        assert task.columns == {"num_images": len(images), "ends_with_text": False}
        assert set(task.prompt.text.split()) <= set(language.vocabulary())


def test_families_take_turns_and_none_reasons():
    families = [task.family for task in itertools.islice(task_stream(0, "test", TERSE), 6)]
    assert families == ["story", "how_to"] * 3
    with pytest.raises(ValueError, match="unknown task family 'reasoning'; known are story, how_to"):
        make_task(np.random.default_rng(0), "train", "reasoning", TERSE)


def test_splits_stay_apart():
    for split in ("train", "validation", "test"):
        for task in itertools.islice(task_stream(3, split, TERSE), 30):
            assert in_split([task.start, *task.truth.scenes], split)
    assert all(
        scene_splits(scene) <= {"train"}
        for task in itertools.islice(task_stream(3, "train", TERSE), 60) for scene in (task.start, *task.truth.scenes)
    )  # fmt: skip


def test_records_of_the_full_telling_are_what_they_were():
    """A hash of texts, pictures and columns that was taken before there was another telling."""
    found = hashlib.sha256()
    for name in ("interleaved", "prompts", "text_to_image", "understanding", "text"):
        for split in ("train", "test"):
            source = open_source(f"storyboard:{name}", seed=3, split=split)
            for index in range(20):
                record = source[index]
                for segment in (*record.prompt, *(record.answer or ())):
                    found.update(segment.text.encode() if isinstance(segment, Text) else segment.pixels.tobytes())
                found.update(repr(record.columns).encode())
    assert found.hexdigest()[:16] == "b0e07fea1c7e70a0"


def test_sources_of_the_terse_telling():
    documents, prompts, edits = (open_source(f"storyboard:{name}", 8, seed=1) for name in ("terse/interleaved", "terse/prompts", "edit"))
    assert prompts[3].answer is None
    assert documents[3].prompt.text == prompts[3].prompt.text
    assert [len(segment.text.split(" .")) for segment in documents[3].answer if isinstance(segment, Text)][:1] == [2]
    assert documents[11].prompt.text == documents[3].prompt.text
    assert documents.columns == {"num_images", "ends_with_text"}
    assert [type(s) for s in edits[0].answer] == [Image]
    assert edits[0].columns == {"num_images": 1}
    with pytest.raises(ValueError, match="storyboard:terse/prompts"):
        open_source("storyboard:terse")


def test_no_single_turn_mixes_words_and_pictures():
    rng = np.random.default_rng(0)
    for kind in TURNS:
        for _ in range(20):
            assert len({type(s) for s in make_turn(rng, kind)[1]}) == 1
    for _ in range(40):
        (before, asked), (after,) = (document.segments for document in make_turn(rng, "edit", "test"))
        event = language.parse_event(asked.text.removesuffix(" . draw the next picture ."))
        scenes = read_pictures([before.pixels, after.pixels])
        assert event.apply(scenes[0]) == scenes[1]
        assert in_split(scenes, "test")
    asked, told = make_turn(rng, "recount")
    assert asked.text.startswith("say it in words .")
    assert all(language.parse_event(sentence) for sentence in told.text.removesuffix(" .").split(" . "))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"telling": "terse"}, "'reasoning' has no terse telling"),
        ({"families": ("poem",)}, "unknown task family 'poem'"),
        ({"things": (2, 4)}, "things is"),
        ({"things": (3, 2)}, "things is"),
        ({"events": (0, 2)}, "events is"),
        ({"colours": ("red", "pink")}, "colours has 'pink', for which there are no words and no drawing"),
        ({"columns": ("right", "left")}, "from left to right"),
    ],
)
def test_worlds_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**settings)


def test_a_world_is_its_settings():
    """More and longer stories, and fewer colours, are another instance."""
    world = World(
        "terse", ("story",), colours=("red", "blue"), things=(1, 1), events=(4, 5), verbs=("paint", "grow", "shrink", "move", "background")
    )
    tasks = [make_task(np.random.default_rng(seed), "train", world=world) for seed in range(20)]
    assert {task.truth.num_steps for task in tasks} == {4, 5}
    assert {len(task.start.things) for task in tasks} == {1}
    assert {thing.colour for task in tasks for scene in task.truth.scenes for thing in scene.things} == {"red", "blue"}


# --- the oracle -----------------------------------------------------------------------------------------------------------


def test_the_truth_is_right():
    verdicts = judge([TRUTH.document(), *(t.truth.document() for t in itertools.islice(task_stream(1, "test", TERSE), 20))],
                     [TRUTH, *(t.truth for t in itertools.islice(task_stream(1, "test", TERSE), 20))])  # fmt: skip
    for verdict in verdicts:
        assert (verdict.format, verdict.text, verdict.image, verdict.given, verdict.kept, verdict.order, verdict.document) == (1,) * 7


def test_an_error_is_charged_once():
    """The second picture loses nothing but paints the ball: the third is wrong by the task, and right given what stands before it."""
    blue = Scene("meadow", (Thing("ball", "blue", "big"), None, None))
    verdict = said((TEXTS[0], GROWN), (TEXTS[1], blue), (TEXTS[2], dataclasses.replace(blue, background="night")))
    assert [right for _, right in verdict.steps] == [True, False, False]
    assert verdict.steps_given == (True, False, True)
    assert (verdict.text, verdict.image, verdict.given) == (1, pytest.approx(1 / 3), pytest.approx(2 / 3))
    # kept: tree and meadow (2 of 2); of ball and meadow the meadow (1 of 2); the ball (1 of 1, the background was told)
    assert verdict.kept == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert (verdict.format, verdict.document) == (1, 0)


def test_a_picture_is_judged_by_its_own_text():
    """A wrong text, and the picture that it tells: the text is wrong, the picture is right given it, and wrong by the task."""
    told = Scene("meadow", (BALL, None, None))
    verdict = said(("the tree leaves .", told), (TEXTS[0], GONE), (TEXTS[2], NIGHT))
    assert verdict.steps == ((False, False), (False, True), (True, True))
    assert verdict.steps_given == (True, True, True)
    assert verdict.order == pytest.approx(2 / 3)


def test_what_cannot_be_judged_is_left_out():
    """No text of the grammar; an event that has no meaning there; and a picture that shows nothing, which is charged itself."""
    assert said(("the ball sings .", GROWN), (TEXTS[1], GONE), (TEXTS[2], NIGHT)).steps_given == (None, True, True)
    assert said(("the ball moves to the middle .", GROWN), (TEXTS[1], GONE), (TEXTS[2], NIGHT)).steps_given == (None, True, True)
    verdict = said((TEXTS[0], noise()), (TEXTS[1], GONE), (TEXTS[2], NIGHT))
    assert verdict.steps_given == (False, None, True)
    assert verdict.given == 0.5
    assert said(("", GROWN), ("", GONE), ("", NIGHT)).given == 0


def test_missing_pictures_are_wrong_and_further_ones_count_for_nothing():
    assert said((TEXTS[0], GROWN)).steps_given == (True, False, False)
    more = said(*zip(TEXTS, (GROWN, GONE, NIGHT), strict=True), ("snow falls .", NIGHT))
    assert (more.steps_given, more.format, more.document) == ((True, True, True), 0, 0)


def test_the_full_text_of_a_step_is_no_terse_text():
    verdict = said((language.step_text(EVENTS[0], GROWN), GROWN), (TEXTS[1], GONE), (TEXTS[2], NIGHT))
    assert verdict.steps[0] == (False, True)


@pytest.mark.parametrize("text", ["the ball grows", "the ball grows . .", "the ball grows . the tree leaves .", ". the ball grows .", ""])
def test_a_terse_text_is_one_sentence_with_its_full_stop(text):
    assert language.parse_terse(text) is None
    assert language.parse_terse("The ball grows.") == Event("grow", "ball")


def test_given_in_the_full_telling_is_what_the_text_states():
    truth = Truth(EVENTS[:1], (GROWN,), start=START)
    stated = Scene("meadow", (BIG_BALL, RED_TREE, None))
    answers = [
        Document((Text(language.step_text(EVENTS[0], told)), Image(render(shown)))) for told, shown in ((stated, stated), (stated, GROWN))
    ]
    verdicts = judge(answers, [truth] * 2)
    assert [v.steps_given for v in verdicts] == [(True,), (False,)]
    assert [v.kept for v in verdicts] == [0.5, 1]  # of tree and meadow


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event("grow", "tree"), START),  # it is big already
        (Event("paint", "ball", colour="red"), START),
        (Event("background", background="meadow"), START),
        (Event("leave", "box"), START),
        (Event("move", "ball", place="left"), START),
        (Event("add", "ball", "red", "small", "left"), START),
        (Event("add", "ball", "red", "big", "left"), None),
        (Event("move", "ball", place="middle"), None),
        (Event("grow", "box"), None),
        (Event("paint", "box", colour="red"), None),
        (Event("add", "box", "green", "small", "right"), Scene("meadow", (BALL, TREE, BOX))),
        (Event("grow", "ball"), GROWN),
    ],
)  # fmt: skip
def test_outcomes_by_hand(event, expected):
    assert outcome(event, START) == expected


def drawn_worse(picture: PIL.Image.Image, kind: str, rng: np.random.Generator) -> PIL.Image.Image:
    if kind == "blurred":
        return picture.filter(PIL.ImageFilter.GaussianBlur(1.2))
    array = np.asarray(picture).astype(float) + rng.normal(0, 22, (96, 96, 3))
    return PIL.Image.fromarray(array.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("kind", ["rendered", "noisy", "blurred"])
def test_the_oracle_is_exact_on_pictures_with_known_mistakes(kind):
    """Half of the pictures show another scene; what is right given the one before is known by construction. 240 documents."""
    rng = np.random.default_rng(5)
    answers, truths, expected = [], [], []
    for task in itertools.islice(task_stream(9, "test", TERSE), 240):
        before, segments, rights = task.start, [], []
        for event in task.truth.events:
            after = outcome(event, before)
            shown = random_scene(rng, int(rng.integers(4))) if after is None or rng.random() < 0.5 else after
            rights.append(None if after is None else shown == after)
            picture = render(shown)
            segments += [Text(f"{language.tell(event)} ."), Image(picture if kind == "rendered" else drawn_worse(picture, kind, rng))]
            before = shown
        answers.append(Document(tuple(segments)))
        truths.append(task.truth)
        expected.append(tuple(rights))
    found = [verdict.steps_given for verdict in judge(answers, truths)]
    flat = [(a, b) for line, other in zip(found, expected, strict=True) for a, b in zip(line, other, strict=True)]
    assert len(flat) > 500
    assert {right for _, right in flat} == {True, False, None}
    assert np.mean([a == b for a, b in flat]) >= 0.995


@pytest.mark.slow
def test_the_benchmark_of_picture_rewards_runs_at_its_quick_size():
    command = [sys.executable, str(Path(__file__).parents[1] / "benchmarks" / "picture_rewards.py"), "--quick"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr[-2000:]
    rewards = json.loads(found.stdout.splitlines()[-1])["rewards"]
    assert rewards["image_likelihood"]["AUC"] > 0.9
    assert rewards["next_picture"]["AUC"] > 0.8
    assert rewards["image_text"]["AUC"] < rewards["image_likelihood"]["AUC"]
