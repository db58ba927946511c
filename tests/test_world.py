"""The Storyboard world: its language, its physics, its splits, and the oracle that judges answers."""

from __future__ import annotations

import itertools
import re

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from diptych.document import Document, Image, Text
from diptych.evaluation.storyboard import Judged, rates_by_kind
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.conversations import TURNS, make_turn
from diptych.worlds.storyboard.oracle import judge, read_pictures
from diptych.worlds.storyboard.render import render
from diptych.worlds.storyboard.scene import Event, Scene, Thing, pair_split, random_scene
from diptych.worlds.storyboard.tasks import Task, Truth, make_task, random_event, task_stream
from diptych.worlds.storyboard.world import BACKGROUNDS, COLOURS, FAMILIES, KINDS

VERBS = ("paint", "grow", "shrink", "move", "leave", "add", "background")
SPLITS = ("train", "validation", "test")
BALL, TREE, HOUSE = Thing("ball", "red", "small"), Thing("tree", "blue", "big"), Thing("house", "green", "small")


def random_scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, int(rng.integers(4))) for _ in range(count)]


def random_events(count: int, seed: int = 0) -> list[tuple[Event, Scene]]:
    """Events with a scene in which they can happen."""
    rng = np.random.default_rng(seed)
    found: list[tuple[Event, Scene]] = []
    while len(found) < count:
        scene = random_scene(rng, int(rng.integers(4)))
        event = random_event(rng, scene, VERBS)
        if event is not None:
            found.append((event, scene))
    return found


# --- language ----------------------------------------------------------------------------------------------------------


def test_sentences_are_read_back():
    words = set(language.vocabulary())
    for scene in random_scenes(400):
        sentence = language.describe(scene)
        assert language.parse_scene(sentence) == scene
        assert set(sentence.split()) <= words
    events = random_events(400)
    assert {event.verb for event, _ in events} == set(VERBS)
    for event, scene in events:
        sentence = language.tell(event)
        assert language.parse_event(sentence) == event
        assert set(sentence.split()) <= words
        after = event.apply(scene)
        assert language.parse_step(language.step_text(event, after)) == (event, after)


def test_sentences_by_hand():
    scene = Scene("night", (BALL, TREE, None))
    assert language.describe(scene) == "on the left a small red ball , in the middle a big blue tree , at night"
    assert language.describe(Scene("snow", (None, None, None))) == "nothing , in the snow"
    assert language.tell(Event("background", background="beach")) == "the sea comes"
    assert language.tell(Event("shrink", "tree")) == "the tree shrinks"
    assert language.tell(Event("add", "house", "green", "small", "right")) == "add on the right a small green house"
    assert language.parse_scene("on the left A small RED ball, in the middle a big blue tree,at night") == scene


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "at night",  # no "nothing"
        "on the left a small red ball",  # no background
        "on the left a small red ball at night",  # no comma
        "on the left a small ball , at night",  # no colour
        "on the left a red small ball , at night",
        "on the left a small pink ball , at night",
        "on the left a small red ball , on the left a big blue tree , at night",  # one place twice
        "nothing , on the left a small red ball , at night",
        "on the left a small red ball today , at night",
        "on the left a small red ball , at night .",
        "on the left a small red ball , at night , at night",
    ],
)
def test_broken_descriptions_are_no_scene(sentence):
    assert language.parse_scene(sentence) is None


@pytest.mark.parametrize(
    "sentence",
    ["", "the ball", "ball grows", "the ball turns", "the ball turns big", "the ball moves left", "the ball grows .",
     "the ball grows , then the tree leaves", "the dog leaves", "add on the left a red ball", "night comes"],
)  # fmt: skip
def test_broken_events_are_no_event(sentence):
    assert language.parse_event(sentence) is None


def test_each_half_of_a_step_is_read_alone():
    scene = Scene("night", (BALL, None, None))
    good = "the ball grows . on the left a small red ball , at night ."
    assert language.parse_step(good) == (Event("grow", "ball"), scene)
    assert language.parse_step(good.replace("grows", "sings")) == (None, scene)
    assert language.parse_step(good.replace("red", "pink")) == (Event("grow", "ball"), None)
    assert language.parse_step("the ball grows .") == (None, None)
    assert language.parse_step(good + " the ball leaves .") == (None, None)


# --- events ------------------------------------------------------------------------------------------------------------

MEADOW = Scene("meadow", (BALL, TREE, None))


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event("paint", "ball", colour="blue"), Scene("meadow", (Thing("ball", "blue", "small"), TREE, None))),
        (Event("grow", "ball"), Scene("meadow", (Thing("ball", "red", "big"), TREE, None))),
        (Event("shrink", "tree"), Scene("meadow", (BALL, Thing("tree", "blue", "small"), None))),
        (Event("move", "ball", place="right"), Scene("meadow", (None, TREE, BALL))),
        (Event("leave", "tree"), Scene("meadow", (BALL, None, None))),
        (Event("add", "house", "green", "small", "right"), Scene("meadow", (BALL, TREE, HOUSE))),
        (Event("background", background="snow"), Scene("snow", (BALL, TREE, None))),
    ],
)
def test_events_by_hand(event, expected):
    assert event.apply(MEADOW) == expected


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Event("paint", "ball", colour="red"), "changes nothing"),
        (Event("grow", "tree"), "changes nothing"),
        (Event("shrink", "ball"), "changes nothing"),
        (Event("move", "ball", place="middle"), "middle is taken"),
        (Event("move", "ball", place="left"), "left is taken"),
        (Event("leave", "house"), "there is no house"),
        (Event("grow", "house"), "there is no house"),
        (Event("add", "house", "green", "small", "left"), "the kind or the place is taken"),
        (Event("add", "ball", "green", "small", "right"), "the kind or the place is taken"),
        (Event("background", background="meadow"), "already is meadow"),
        (Event("sing", "ball"), "unknown verb 'sing'"),
    ],
)
def test_impossible_events_raise(event, message):
    with pytest.raises(ValueError, match=message):
        event.apply(MEADOW)


# --- splits ------------------------------------------------------------------------------------------------------------

Pair = frozenset[tuple[str, str]]


def scenes_shown(documents: list[Document]) -> list[list[Scene]]:
    """The scenes that the words and the prompt's pictures of each document show, read from the document alone."""
    pictures = iter(read_pictures([image.pixels for document in documents for image in document.images]))
    found = []
    for document in documents:
        sentences = [s.strip() for segment in document if isinstance(segment, Text) for s in segment.text.split(" .")]
        scenes = [language.parse_scene(sentence) for sentence in sentences] + [next(pictures) for _ in document.images]
        found.append([scene for scene in scenes if scene is not None])
    return found


def pairs_of(scenes: list[Scene]) -> set[Pair]:
    """Every two things that stand in one picture, as {(kind, colour), (kind, colour)}."""
    return {frozenset({(a.kind, a.colour), (b.kind, b.colour)}) for s in scenes for a, b in itertools.combinations(s.things, 2)}


def split_of(pair: Pair) -> str:
    first, second = (Thing(kind, colour, "big") for kind, colour in pair)
    return pair_split(first, second)


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Task]]:
    return {split: list(itertools.islice(task_stream(7, split), 600)) for split in SPLITS}


def test_splits_share_no_pairs(tasks):
    """Read from prompts and answers as the model sees them, not from the generator's own lists."""
    shown: dict[str, list[set[Pair]]] = {}
    for split in SPLITS:
        prompts = scenes_shown([task.prompt for task in tasks[split]])
        answers = scenes_shown([Document(tuple(s for s in t.truth.document() if isinstance(s, Text))) for t in tasks[split]])
        shown[split] = [pairs_of(asked + told) for asked, told in zip(prompts, answers, strict=True)]
    everything = {split: set().union(*shown[split]) for split in SPLITS}
    assert all(split_of(pair) == "train" for pair in everything["train"])
    assert len(everything["train"]) > 350  # of 405 or so: the training documents nearly cover their pairs
    for split, other in (("validation", "test"), ("test", "validation")):
        held_out = {pair for pair in everything[split] if split_of(pair) == split}
        assert not held_out & everything["train"]
        assert not held_out & everything[other]
        assert all(pairs & held_out for pairs in shown[split])  # every document needs a combination never seen in training


def test_shares_of_the_splits():
    counts = dict.fromkeys(SPLITS, 0)
    for k1, k2 in itertools.combinations(KINDS, 2):
        for c1, c2 in itertools.product(COLOURS, COLOURS):
            first, second = Thing(k1, c1, "big"), Thing(k2, c2, "big")
            split = pair_split(first, second)
            assert split == pair_split(second, first) == pair_split(Thing(k1, c1, "small"), second)
            counts[split] += 1
    total = 15 * 36  # pairs of six kinds, pairs of six colours
    assert sum(counts.values()) == total
    assert counts["test"] / total == pytest.approx(1 / 8, abs=0.01)
    assert counts["validation"] / total == pytest.approx(1 / 8, abs=0.01)
    assert counts["train"] / total == pytest.approx(3 / 4, abs=0.01)


def test_training_turns_keep_to_their_split_and_are_never_interleaved():
    rng = np.random.default_rng(0)
    turns = [make_turn(rng, kind) for kind in TURNS for _ in range(40)]
    for prompt, answer in turns:
        assert len({type(segment) for segment in answer}) == 1
        assert prompt.segments
    for scenes in scenes_shown([document for turn in turns for document in turn]):
        assert all(split_of(pair) == "train" for pair in pairs_of(scenes))


def test_drawn_and_described_scenes_agree():
    rng = np.random.default_rng(1)
    drawn = [make_turn(rng, "draw") for _ in range(40)]
    for (prompt, _), scene in zip(drawn, read_pictures([answer.images[0].pixels for _, answer in drawn]), strict=True):
        assert language.parse_scene(re.split(r" \. | : |now draw ", prompt.text)[-1].removesuffix(" .")) == scene
    described = [make_turn(rng, "describe") for _ in range(40)]
    assert {len(prompt.images) for prompt, _ in described} == {1, 2}
    for prompt, answer in described:
        seen = read_pictures([image.pixels for image in prompt.images])
        assert language.parse_scene(answer.text.removesuffix(" .")) == seen[0 if "first" in prompt.text else -1]


# --- tasks -------------------------------------------------------------------------------------------------------------

Plain = tuple[str, dict[str, tuple[str, str, str]]]  # background, place -> (kind, colour, size)


def plain(scene: Scene) -> Plain:
    places = zip(("left", "middle", "right"), scene.places, strict=True)
    return scene.background, {place: (t.kind, t.colour, t.size) for place, t in places if t is not None}


def happen(state: Plain, sentence: str) -> Plain:
    """Physics from the words alone: shares no code with `Event`."""
    background, things = state[0], dict(state[1])
    comes = {"spring comes": "meadow", "the sea comes": "beach", "snow falls": "snow", "night falls": "night"}
    words = sentence.split()
    if sentence in comes:
        return comes[sentence], things
    if words[0] == "add":
        assert words[3] not in things  # add on the left a small red ball
        things[words[3]] = (words[7], words[6], words[5])
        return background, things
    (place,) = (p for p, (kind, _, _) in things.items() if kind == words[1])
    kind, colour, size = things.pop(place)
    if words[2] == "moves":
        assert words[-1] not in things
        place = words[-1]
    elif words[2] == "turns":
        colour = words[-1]
    elif words[2] in ("grows", "shrinks"):
        size = "big" if words[2] == "grows" else "small"
    if words[2] != "leaves":
        things[place] = (kind, colour, size)
    return background, things


def answer_of(question: str, state: Plain) -> str:
    words, things = question.split(), state[1]
    if question == "how many things are there ?":
        return ("none", "one", "two", "three")[len(things)]
    if question.startswith("where is"):
        return next(place for place, (kind, _, _) in things.items() if kind == words[3])
    sizes = {kind: size for kind, _, size in things.values()}
    assert {sizes[words[5]], sizes[words[8]]} == {"big", "small"}  # which is bigger , the A or the B ?
    return words[5] if sizes[words[5]] == "big" else words[8]


def given_scene(task: Task) -> Scene | None:
    """The scene that the prompt gives, as a picture or in words."""
    if task.prompt.images:
        return read_pictures([task.prompt.images[0].pixels])[0]
    segment = task.prompt.segments[0 if task.family == "reasoning" else 1]
    assert isinstance(segment, Text)
    return language.parse_scene(segment.text.removesuffix(" ."))


def test_truths_follow_from_the_prompts(tasks):
    for task in itertools.chain.from_iterable(tasks[split][:150] for split in SPLITS):
        truth, given = task.truth, given_scene(task)
        assert given is not None
        states = [plain(scene) for scene in truth.scenes]
        sentences = [language.tell(event) for event in truth.events]
        if task.family == "how_to":
            state: Plain = (given.background, {})
            assert states[-1] == plain(given)
            assert len(sentences) == len(given.things)
        else:
            last = task.prompt.segments[-1]
            assert isinstance(last, Text)
            told, _, question = last.text.removeprefix("first ").partition(" .")
            assert told.split(" , then ") == sentences
            state = plain(given)
        for sentence, expected in zip(sentences, states, strict=True):
            before, state = state, happen(state, sentence)
            assert state == expected
            assert state != before
        if task.family == "reasoning":
            assert truth.answer == answer_of(question.strip(), state)
        else:
            assert truth.answer is None


def test_all_families_and_kinds_occur(tasks):
    for split in SPLITS:
        assert [task.family for task in tasks[split][:6]] == [*FAMILIES, *FAMILIES]  # in turn
        assert {task.kind for task in tasks[split]} == {"story", "how_to", "count", "track", "compare"}
        assert {bool(task.prompt.images) for task in tasks[split]} == {True, False}
    with pytest.raises(ValueError, match="unknown task family 'poem'; known are story, how_to, reasoning"):
        make_task(np.random.default_rng(0), "train", "poem")


def test_task_streams_repeat_under_a_seed():
    def first(seed: int, split: str) -> list[tuple]:
        return [(t.start, t.truth, t.prompt.text, len(t.prompt.images)) for t in itertools.islice(task_stream(seed, split), 30)]

    assert first(3, "train") == first(3, "train")
    assert first(3, "train") != first(4, "train")
    assert first(3, "validation") != first(3, "test")


def test_true_documents_get_perfect_verdicts(tasks):
    some = [task for split in SPLITS for task in tasks[split][:60]]
    for task, verdict in zip(some, judge([t.truth.document() for t in some], [t.truth for t in some]), strict=True):
        assert (verdict.format, verdict.text, verdict.image, verdict.order, verdict.document, verdict.score) == (1, 1, 1, 1, 1, 1)
        assert verdict.steps == ((True, True),) * task.truth.num_steps


# --- oracle: accuracy --------------------------------------------------------------------------------------------------


def share_read(scenes: list[Scene], pictures: list[PIL.Image.Image]) -> float:
    return sum(a == b for a, b in zip(read_pictures(pictures), scenes, strict=True)) / len(scenes)


def test_clean_pictures_are_read_exactly():
    scenes = random_scenes(400)
    pictures = [render(scene) for scene in scenes]
    assert share_read(scenes, pictures) == 1
    assert share_read(scenes[:50], [p.resize((192, 192)).convert("RGBA") for p in pictures[:50]]) == 1
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)


def test_every_thing_in_every_place_is_read_exactly():
    scenes = []
    for background, place, kind, colour, size in itertools.product(BACKGROUNDS, range(3), KINDS, COLOURS, ("small", "big")):
        scenes.append(Scene(background, (None, None, None)).with_place(place, Thing(kind, colour, size)))
    assert share_read(scenes, [render(scene) for scene in scenes]) == 1  # 4 * 3 * 72 pictures


def test_noisy_and_blurred_pictures_are_read():
    """Measured on 1500 scenes: 1.0 for both. Noise of sigma 40 and blur of radius 2 are beyond the oracle (0.01, 0.88)."""
    scenes = random_scenes(400, seed=1)
    rng = np.random.default_rng(2)
    pictures = [render(scene) for scene in scenes]
    noisy = [np.clip(np.asarray(p) + rng.normal(0, 12, (96, 96, 3)), 0, 255).round().astype(np.uint8) for p in pictures]
    assert share_read(scenes, [PIL.Image.fromarray(array) for array in noisy]) >= 0.995
    assert share_read(scenes, [p.filter(PIL.ImageFilter.GaussianBlur(0.7)) for p in pictures]) >= 0.995


def test_what_shows_no_scene_is_not_read():
    rng = np.random.default_rng(3)
    noise = [PIL.Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)) for _ in range(30)]
    assert read_pictures(noise) == [None] * 30
    assert read_pictures([PIL.Image.new("RGB", (96, 96), (128, 128, 128))]) == [None]
    assert read_pictures([]) == []
    upside_down = [render(scene).transpose(PIL.Image.Transpose.FLIP_TOP_BOTTOM) for scene in random_scenes(30)]
    assert read_pictures(upside_down) == [None] * 30


# --- oracle: verdicts --------------------------------------------------------------------------------------------------

STORY = Truth(  # begins with a small red ball on the left and a big blue tree in the middle of the meadow
    (Event("paint", "ball", colour="green"), Event("leave", "tree"), Event("background", background="night")),
    (
        Scene("meadow", (Thing("ball", "green", "small"), TREE, None)),
        Scene("meadow", (Thing("ball", "green", "small"), None, None)),
        Scene("night", (Thing("ball", "green", "small"), None, None)),
    ),
)
T1, P1, T2, P2, T3, P3 = STORY.document().segments
COUNT = Truth((Event("leave", "tree"),), (Scene("meadow", (BALL, None, None)),), "one")
CT, CP, CLOSING = COUNT.document().segments
WRONG = Image(render(MEADOW))


def with_words(segment, old: str, new: str) -> Text:
    assert segment.text.count(old) == 1
    return Text(segment.text.replace(old, new))


@pytest.mark.parametrize(
    ("truth", "segments", "format_", "text", "image", "order"),
    [
        # steps 1 and 2 swapped: only step 3 stands right; of (2, 1, 3) two events are in order
        pytest.param(STORY, (T2, P2, T1, P1, T3, P3), 1, 1 / 3, 1 / 3, 2 / 3, id="swapped steps"),
        # only the texts swapped
        pytest.param(STORY, (T2, P1, T1, P2, T3, P3), 1, 1 / 3, 1, 2 / 3, id="swapped texts"),
        # two texts in a row: the later counts, so pair 2 tells and shows step 3; told (1, 3) of 3
        pytest.param(STORY, (T1, P1, T2, T3, P3), 0, 1 / 3, 1 / 3, 2 / 3, id="picture 2 dropped"),
        # the third text closes a document that has no closing text; told (1, 2) of 3
        pytest.param(STORY, (T1, P1, T2, P2, T3), 0, 2 / 3, 2 / 3, 2 / 3, id="picture 3 dropped"),
        # the event stands (order 1), its description does not
        pytest.param(STORY, (T1, P1, with_words(T2, "green", "red"), P2, T3, P3), 1, 2 / 3, 1, 1, id="wrong colour in a description"),
        # here the event is another, so 2 of 3 are told
        pytest.param(STORY, (with_words(T1, "turns green", "turns red"), P1, T2, P2, T3, P3), 1, 2 / 3, 1, 2 / 3, id="wrong event"),
        pytest.param(STORY, (T1, P1, T2, WRONG, T3, P3), 1, 1, 2 / 3, 1, id="wrong picture"),
        # pictures before their texts: text i stands before picture i + 1, so no text is right; told (-, 1, 2) of 3
        pytest.param(STORY, (P1, T1, P2, T2, P3, T3), 0, 0, 1, 2 / 3, id="pictures first"),
        # 3 right steps and one too many: 3 of 4 told events are right
        pytest.param(STORY, (T1, P1, T2, P2, T3, P3, T3, P3), 0, 1, 1, 3 / 4, id="a step too many"),
        # only the first text missing: told (-, 2, 3)
        pytest.param(STORY, (P1, T2, P2, T3, P3), 0, 2 / 3, 1, 2 / 3, id="picture first"),
        pytest.param(STORY, (Text("hm"), T1, P1, T2, P2, T3, P3), 0, 1, 1, 1, id="two texts in a row"),
        pytest.param(STORY, (T1, P1, T2, P2, T3, P3, CLOSING), 0, 1, 1, 1, id="closing text not asked for"),
        pytest.param(STORY, (), 0, 0, 0, 0, id="empty document"),
        pytest.param(STORY, (T1, P1, Text("  "), P2, T3, P3), 0, 2 / 3, 1, 2 / 3, id="empty text"),
        # texts: the step's and the closing one, 1 of 2 right
        pytest.param(COUNT, (CT, CP), 0, 1 / 2, 1, 1, id="closing answer missing"),
        pytest.param(COUNT, (CT, CP, Text("the answer is two .")), 1, 1 / 2, 1, 1, id="wrong answer"),
        pytest.param(COUNT, (CT, CP, Text("The answer is one.")), 1, 1, 1, 1, id="answer in other spelling"),
    ],
)
def test_verdicts_by_hand(truth, segments, format_, text, image, order):
    (verdict,) = judge([Document(segments)], [truth])
    assert (verdict.format, verdict.text, verdict.image, verdict.order) == pytest.approx((format_, text, image, order))
    assert verdict.document == (format_ == text == image == order == 1)
    assert verdict.score == pytest.approx((format_ + text + image + order) / 4)


def test_verdicts_say_which_step_is_wrong():
    swapped, dropped = Document((T2, P2, T1, P1, T3, P3)), Document((T1, WRONG, T2, P2, T3))
    first, second = judge([swapped, dropped], [STORY, STORY])
    assert first.steps == ((False, False), (False, False), (True, True))
    assert second.steps == ((True, False), (True, True), (False, False))


def test_a_batch_of_documents_equals_one_by_one():
    documents = [Document((T1, P1)), STORY.document(), Document((Text("hm"),)), Document((T1, WRONG, T2, P3, T3, P3))]
    assert judge(documents, [STORY] * 4) == [judge([document], [STORY])[0] for document in documents]


def test_rates_by_kind_are_of_the_family_and_the_pictures_asked_for():
    tasks = list(itertools.islice(task_stream(0, "test"), 60))
    answers = [Document(task.truth.document().segments[:4]) if task.truth.num_steps == 3 else task.truth.document() for task in tasks]
    verdicts = judge(answers, [task.truth for task in tasks])
    found = rates_by_kind([Judged(*parts) for parts in zip(tasks, answers, verdicts, strict=True)])
    assert list(found) == [
        "story, 2 pictures", "story, 3 pictures", "how_to, 2 pictures", "how_to, 3 pictures", "reasoning, 1 picture",
        "reasoning, 2 pictures",
    ]  # fmt: skip
    assert sum(row["prompts"] for row in found.values()) == 60
    for kind, row in found.items():
        whole = float("3 pictures" not in kind)
        assert (row["document"], row["format"], row["text"], row["image"]) == (whole, whole, *(whole or 0.6667,) * 2)
