"""Worlds as settings: the large one's words, pictures, events, splits and oracle; sources and models of other worlds; pretraining of it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.config import EvaluateConfig, GRPOConfig, SamplingParams, WarmupConfig, load_config
from diptych.data import Mixture
from diptych.data.records import open_source
from diptych.document import Document, Image, Text
from diptych.evaluation.storyboard import evaluate_documents, held_out_tasks, retained_skills
from diptych.forms import AnswerForm
from diptych.models import load_model, packaged_folder
from diptych.models.storyboard import StoryboardConfig, StoryboardModel, build_tokenizer
from diptych.models.storyboard.codec import PatchCodec
from diptych.pretrain import pretrain
from diptych.pretrain.base_model import Lesson, PatchCodes, make_batch, new_model
from diptych.pretrain.codec import patches_of
from diptych.pretrain.settings import SETTINGS, check_geometry
from diptych.rewards import load_reward
from diptych.sampling.engine import sample
from diptych.sampling.logprobs import score
from diptych.tokens import collate
from diptych.training.grpo import check_judges
from diptych.worlds.storyboard import language
from diptych.worlds.storyboard.conversations import RECALL_TURNS, make_turn
from diptych.worlds.storyboard.oracle import Verdict, judge, read_pictures
from diptych.worlds.storyboard.reading import all_things
from diptych.worlds.storyboard.render import render, render_array
from diptych.worlds.storyboard.scene import Event, Scene, Thing, outcome, pair_split, random_scene
from diptych.worlds.storyboard.tasks import Task, Truth, make_task, random_event, task_stream
from diptych.worlds.storyboard.world import (
    ALL_VERBS,
    CHARACTERS,
    COLOURS,
    FULL,
    KINDS,
    LARGE,
    LARGE_128,
    LONG,
    TERSE,
    WORLDS,
    World,
    world_named,
)

SPLITS = ("train", "validation", "test")
GIRL, BOY = Thing("girl", "red", "big", hat="blue"), Thing("boy", "green", "big", hat="orange")
BALL, BALLS, TREE = Thing("ball", "red", "small"), Thing("ball", "red", "small", 2), Thing("tree", "blue", "big")
START = Scene("meadow", (GIRL, TREE, None, None, BALL, BOY))  # back left, middle, right; front left, middle, right


def placed(scene: Scene, **changes: Thing | None) -> Scene:
    """The scene with other things, `front_left=...`."""
    for place, thing in changes.items():
        scene = scene.with_place(LARGE.places.index(place.replace("_", " ")), thing)
    return scene


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 3}, "rows is 3; pictures have 1 row of places, or 2"),
        ({"max_count": 3}, "max_count is 3; a place has room for 1 thing, or for 2 small ones"),
        ({"pixels": 100}, r"pixels is 100; .* one of \[48, 64, 96, 128, 192, 384\]"),
        ({"pixels": 128}, "pixels is 128, which 3 columns do not divide"),
        ({"columns": ("left", "top")}, "columns has 'top', for which there are no words and no drawing"),
        ({"columns": ("left",), "things": (1, 1)}, "two or more of far left, left"),
        ({"colours": ("red", "red")}, "a name stands there twice"),
        ({"columns": ("left", "right"), "things": (2, 2)}, "it needs three places"),
        ({"held_out": 2}, "held_out is 2; at least 3"),
        ({"events": (2, 6)}, "words for 5 pictures"),
        ({"rows": 2}, "are told tersely; set telling to 'terse'"),
        ({"telling": "terse", "families": ("story",), "verbs": ("join",)}, "'join' or 'part', which need a max_count of 2"),
        ({"telling": "terse", "families": ("story",), "verbs": ("dress",)}, "'dress', which needs characters"),
        ({"telling": "terse", "families": ("story",), "characters": CHARACTERS, "things": (1, 2)}, "2 characters are in every story"),
    ],
)
def test_settings_that_no_picture_or_task_can_meet(settings, message):
    with pytest.raises(ValueError, match=message):
        World(**settings)


def test_worlds_are_found_by_name_and_telling():
    assert world_named("standard", "full") == FULL == World()
    assert world_named("standard", "terse") == TERSE
    with pytest.raises(ValueError, match="there is no world 'huge'; known are standard, long, large, large_128"):
        world_named("huge", "full")
    with pytest.raises(ValueError, match="the world 'large' has no telling 'full'; set telling to terse"):
        world_named("large", "full")
    assert get_args(EvaluateConfig.model_fields["world"].annotation) == tuple(WORLDS)
    with pytest.raises(ValueError, match="the world 'large' tells only what happens; set telling: terse"):
        load_config(EvaluateConfig, None, {"world": "large"})


@pytest.mark.parametrize(("world", "places"), [(LARGE, 6), (LARGE_128, 8)])
def test_the_large_worlds_are_large(world, places):
    assert (len(world.places), world.rows, world.max_count, world.characters, world.events[1]) == (places, 2, 2, CHARACTERS, 5)
    assert set(world.verbs) == set(ALL_VERBS)


@pytest.mark.parametrize("columns", [("left", "right"), ("far left", "left", "right", "far right")])
def test_one_row_of_other_places_in_the_full_telling(columns):
    """Fewer or more columns, other sizes of pictures: told, drawn and judged."""
    families = ("story", "how_to", "reasoning")[: 2 if len(columns) < 3 else 3]
    world = World(columns=columns, families=families, things=(2, 2), pixels=64)
    tasks = list(itertools.islice(task_stream(0, "test", world), 12))
    assert render_array(tasks[0].start, world).shape == (64, 64, 3)
    assert all(verdict.document == 1 for verdict in judge([t.truth.document() for t in tasks], [t.truth for t in tasks]))


# --- words -------------------------------------------------------------------------------------------------------------


def test_sentences_of_the_large_world_by_hand():
    scene = Scene("night", (GIRL, None, TREE, BALLS, None, None))
    words = (
        "at the back on the left the girl in red with a blue hat , at the back on the right a big blue tree , "
        "in front on the left two small red balls , at night"
    )
    assert language.describe(scene, LARGE) == words
    assert language.parse_scene(words, LARGE) == scene
    told = {
        Event("join", "ball"): "one more ball comes",
        Event("part", "ball"): "one ball goes",
        Event("dress", "boy", hat="orange"): "the boy takes an orange hat",
        Event("paint", "girl", colour="blue"): "the girl wears blue",
        Event("paint", "tree", colour="blue"): "the tree turns blue",
        Event("move", "girl", place="front right"): "the girl moves to the front right",
        Event("add", "box", "green", "small", "back middle", count=2): "add at the back in the middle two small green boxes",
        Event("again", picture=2): "like the second picture",
    }
    for event, sentence in told.items():
        assert language.tell(event, LARGE) == sentence
        assert language.parse_event(sentence, LARGE) == event


@pytest.mark.parametrize(
    "sentence",
    ["in front on the left two big red balls , at night", "in front on the left a small red balls , at night",
     "on the left a small red ball , at night", "in front on the left the girl in red , at night",
     "in front on the left the girl in red with a blue hat , in front on the right the girl in red with a red hat , at night"],
)  # fmt: skip
def test_broken_descriptions_of_the_large_world(sentence):
    assert language.parse_scene(sentence, LARGE) is None


@pytest.mark.parametrize(
    "sentence", ["one more ball comes", "the girl leaves", "like the second picture", "the ball moves to the back left"]
)
def test_sentences_of_the_large_world_are_none_of_the_standard_one(sentence):
    assert language.parse_event(sentence, LARGE) is not None
    assert language.parse_event(sentence) is None


def random_scenes(world: World, count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, int(rng.integers(len(world.places) + 1)), world) for _ in range(count)]


@pytest.mark.parametrize("world", [LARGE, LARGE_128])
def test_sentences_of_the_large_worlds_are_read_back(world):
    words = set(language.vocabulary(world))
    rng, verbs = np.random.default_rng(1), set()
    for scene in random_scenes(world, 200):
        sentence = language.describe(scene, world)
        assert language.parse_scene(sentence, world) == scene
        assert set(sentence.split()) <= words
        event = random_event(rng, scene, (*world.verbs, "add"), world)
        if event is not None:
            verbs.add(event.verb)
            assert language.parse_event(language.tell(event, world), world) == event
            assert event.apply(scene, world.places) != scene
    assert verbs == set(ALL_VERBS)
    rng = np.random.default_rng(2)
    for kind in RECALL_TURNS:
        for _ in range(15):
            asked, answered = make_turn(rng, kind, world=world)
            assert set(f"{asked.text} {answered.text}".split()) <= words
            assert len({type(segment) for segment in answered}) == 1  # never interleaved
            assert len(answered.images) <= 1


# --- what happens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Event("join", "ball"), placed(START, front_middle=BALLS)),
        (Event("dress", "girl", hat="red"), placed(START, back_left=dataclasses.replace(GIRL, hat="red"))),
        (Event("paint", "girl", colour="blue"), placed(START, back_left=dataclasses.replace(GIRL, colour="blue"))),
        (Event("move", "boy", place="back right"), placed(START, front_right=None, back_right=BOY)),
        (Event("again", picture=1), START),
        (Event("dress", "girl", hat="blue"), START),  # she has it
        (Event("grow", "girl"), None),
        (Event("part", "ball"), None),
        (Event("join", "tree"), None),
        (Event("join", "girl"), None),
        (Event("dress", "tree", hat="red"), None),
    ],
)  # fmt: skip
def test_outcomes_of_the_large_world_by_hand(event, expected):
    assert outcome(event, START, LARGE.places) == expected


def test_two_things_neither_grow_nor_become_three():
    scene = placed(START, front_middle=BALLS)
    assert outcome(Event("grow", "ball"), scene, LARGE.places) is None
    assert outcome(Event("join", "ball"), scene, LARGE.places) is None
    assert outcome(Event("part", "ball"), scene, LARGE.places) == START


# --- tasks and splits --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Task]]:
    return {split: list(itertools.islice(task_stream(7, split, LARGE), 90)) for split in SPLITS}


def test_splits_of_the_large_world_share_no_pairs(tasks):
    """From the scenes of all pictures; that they are what prompts and answers show is read from those of a few."""
    shown = {}
    for split in SPLITS:
        scenes = [scene for task in tasks[split] for scene in (task.start, *task.truth.scenes)]
        shown[split] = {frozenset({(a.kind, a.colour), (b.kind, b.colour)}) for s in scenes for a, b in itertools.combinations(s.things, 2)}
        few = tasks[split][:6]
        pictures = [image.pixels for task in few for document in (task.prompt, task.truth.document()) for image in document.images]
        assert read_pictures(pictures, LARGE) == [scene for task in few for scene in (task.start, *task.truth.scenes)]
    splits = {split: {pair for pair in pairs if split_of(pair) == split} for split, pairs in shown.items()}
    assert splits["train"] == shown["train"]
    for split, other in (("validation", "test"), ("test", "validation")):
        assert splits[split]
        assert not splits[split] & (shown["train"] | shown[other])


@pytest.mark.parametrize("world", [LARGE, LARGE_128])
def test_nothing_reaches_the_sky(world):
    """The oracle knows the background by the upper three eighths of a picture."""
    columns, top = len(world.columns), world.pixels * 3 // 8
    for background in world.backgrounds:
        empty = render_array(Scene(background, (None,) * 2 * columns), world)[:top]
        for thing in all_things(world)[1::3]:
            full = render_array(Scene(background, (thing,) * columns + (thing,) * columns), world)[:top]
            assert np.array_equal(full, empty)


def split_of(pair: frozenset[tuple[str, str]]) -> str:
    first, second = (Thing(kind, colour, "big") for kind, colour in pair)
    return pair_split(first, second, LARGE)


def test_shares_of_the_splits_of_the_large_world():
    found = [
        pair_split(Thing(a, c, "big"), Thing(b, d, "big"), LARGE)
        for a, b in itertools.combinations((*KINDS, *CHARACTERS), 2) for c, d in itertools.product(COLOURS, COLOURS)
    ]  # fmt: skip
    assert found.count("test") / len(found) == pytest.approx(1 / 16, abs=0.01)
    assert found.count("validation") / len(found) == pytest.approx(1 / 16, abs=0.01)


def test_tasks_of_the_large_world(tasks):
    for split in SPLITS:
        assert [task.family for task in tasks[split][:3]] == list(LARGE.families)
        assert {task.kind for task in tasks[split]} == {"story", "how_to", "ask", "again"}
    some = [task for split in SPLITS for task in tasks[split]]
    assert max(task.truth.num_steps for task in some) == 5
    for task in some:
        if task.family != "how_to":
            assert {"girl", "boy"} <= {thing.kind for thing in task.start.things}
        scenes = [task.start, *task.truth.scenes]
        for number, (event, after) in enumerate(zip(task.truth.events, task.truth.scenes, strict=True)):
            before = scenes[event.picture - 1] if event.verb == "again" else scenes[number]
            assert event.apply(before, LARGE.places) == after
        assert task.columns == {"num_images": task.truth.num_steps, "ends_with_text": task.kind == "ask"}


def test_questions_are_answered_by_an_earlier_picture(tasks):
    """From the words of the prompt and the pictures alone; the picture asked about is neither the prompt's nor the last."""
    kinds = set()
    for task in (task for split in SPLITS for task in tasks[split][:60] if task.kind == "ask"):
        question = task.prompt.text.rsplit(" . ", 1)[1].split()
        number = language.ORDINALS.index(next(word for word in reversed(question) if word in language.ORDINALS))
        assert 0 < number < task.truth.num_steps
        seen = read_pictures([image.pixels for image in task.truth.document().images], LARGE)[number - 1]
        kind = next(word for word in question if word in language._SINGULARS or word in LARGE.all_kinds)
        thing = next(t for t in seen.things if t.kind == language._SINGULARS.get(kind, kind))
        asked = " ".join(question[:2])
        kinds.add(asked)
        place = LARGE.places[seen.places.index(thing)]
        assert task.truth.answer == {
            "what colour": thing.colour, "what size": thing.size, "what hat": thing.hat, "where was": place,
            "how many": ("none", "one", "two")[thing.count],
        }[asked]  # fmt: skip
    assert len(kinds) == 5


# --- pictures and the oracle -------------------------------------------------------------------------------------------


def test_what_stands_in_front_hides_a_part_and_never_all():
    """Every thing behind every shape in front differs from every other thing there, and some of it is covered."""
    covered = 0
    behind = [thing for thing in all_things(LARGE) if thing is not None][::5]
    for front in (Thing("house", "red", "big"), Thing("ball", "red", "big"), GIRL, Thing("box", "red", "small", 2)):
        shown = [render_array(Scene("meadow", (b, None, None, front, None, None)), LARGE).astype(int) for b in behind]
        for one, other in itertools.combinations(shown, 2):
            assert np.abs(one - other).max() > 40
        alone = [render_array(Scene("meadow", (b, None, None, None, None, None)), LARGE).astype(int) for b in behind]
        empty = render_array(Scene("meadow", (None,) * 6), LARGE).astype(int)
        front_alone = render_array(Scene("meadow", (None, None, None, front, None, None)), LARGE).astype(int)
        covered += sum(bool(((a != empty).any(-1) & (s == front_alone).all(-1)).any()) for a, s in zip(alone, shown, strict=True))
    assert covered > 40


@pytest.mark.parametrize(("world", "count"), [(LARGE, 120), (LARGE_128, 30)])
def test_rendered_pictures_of_the_large_worlds_are_read_exactly(world, count):
    scenes = random_scenes(world, count, 3)
    assert read_pictures([render(scene, world) for scene in scenes], world) == scenes
    noise = np.random.default_rng(0).integers(0, 256, (world.pixels, world.pixels, 3), dtype=np.uint8)
    assert read_pictures([PIL.Image.fromarray(noise)], world) == [None]


def said(truth: Truth, *pairs: tuple[str, Scene], closing: str = "") -> Verdict:
    segments = [segment for text, scene in pairs for segment in (Text(text), Image(render(scene, LARGE)))]
    return judge([Document((*segments, *([Text(closing)] if closing else [])))], [truth])[0]


def test_right_answers_of_the_large_world_are_right(tasks):
    some = tasks["test"][:12]
    for verdict in judge([task.truth.document() for task in some], [task.truth for task in some]):
        assert (verdict.format, verdict.text, verdict.image, verdict.given, verdict.kept, verdict.order, verdict.document) == (1,) * 7


def test_an_error_is_charged_once_also_where_a_picture_is_drawn_again():
    """The second picture (the first of the answer) gives the girl another hat; the last one shows it again as it was drawn."""
    moved = placed(START, front_right=None, back_right=BOY)
    night = dataclasses.replace(moved, background="night")
    events = (Event("move", "boy", place="back right"), Event("background", background="night"), Event("again", picture=2))
    truth = Truth(events, (moved, night, moved), start=START, world=LARGE)
    texts = ("the boy moves to the back right .", "night falls .", "like the second picture .")
    other = placed(moved, back_left=dataclasses.replace(GIRL, hat="green"))
    drawn = (other, dataclasses.replace(other, background="night"), other)
    verdict = said(truth, *zip(texts, drawn, strict=True))
    assert verdict.steps_given == (False, True, True)
    assert (verdict.image, verdict.text, verdict.format) == (0, 1, 1)
    # kept: of girl, tree, ball, background 3 of 4; all of the 4 things that night leaves; all that the second picture showed
    assert verdict.kept == pytest.approx((3 / 4 + 1 + 1) / 3)
    assert said(truth, *zip(texts, (other, drawn[1], moved), strict=True)).steps_given == (False, True, False)


def test_a_closing_answer_is_judged_by_the_truth():
    moved = placed(START, front_right=None, back_right=BOY)
    truth = Truth((Event("move", "boy", place="back right"),), (moved,), "blue", START, LARGE)
    text = "the boy moves to the back right ."
    assert said(truth, (text, moved), closing="the answer is blue .").document == 1
    assert said(truth, (text, moved), closing="the answer is red .").text == 0.5
    assert said(truth, (text, moved)).format == 0


# --- sources and models ------------------------------------------------------------------------------------------------


def test_sources_of_the_large_world():
    for kind in ("interleaved", "prompts", "text_to_image", "understanding", "edit", "look_up"):
        source = open_source(f"storyboard:large/{kind}", 8, seed=1)
        assert source.world == "large"
        answers = [source[index].answer for index in range(8)]
        assert all(answer is None for answer in answers) if kind == "prompts" else all(len(answer) for answer in answers)
    assert open_source("storyboard:terse/prompts", 8).world == "standard"
    with pytest.raises(ValueError, match="storyboard:large/look_up"):
        open_source("storyboard:large/poems")


def test_a_model_of_another_world_is_refused_at_the_start(tmp_path):
    model = load_model("storyboard")
    source = {"name": "storyboard:large/interleaved", "weight": 1.0}
    mixture = Mixture(load_config(WarmupConfig, "warmup", {"sources": [source]}).sources, 0)
    with pytest.raises(ValueError, match=r"large/interleaved: this model knows .* 'standard' \(3 x 3 positions of 2 codes, 96"):
        mixture.check_model(model)
    config = load_config(EvaluateConfig, None, {"world": "large", "telling": "terse", "num_prompts": 1})
    with pytest.raises(ValueError, match="was asked for those of 'large'"):
        evaluate_documents(model, held_out_tasks(config), SamplingParams(), config)


def test_a_world_that_differs_in_its_tasks_alone_is_known_to_the_same_models():
    """Longer stories of the standard world: its words, its pictures."""
    load_model("storyboard").check_world("long")
    assert language.vocabulary(LONG) == language.vocabulary(TERSE)
    records = [open_source("storyboard:long/interleaved", 6)[i] for i in range(6)]
    assert {record.answer.images[0].pixels.size for record in records} == {(96, 96)}
    assert {len(record.answer.images) for record in records} == {5}


def test_a_reward_that_judges_by_a_model_of_another_world_is_refused_at_the_start():
    changes = {"rewards": [{"name": "format"}, {"name": "text_likelihood", "label": "words", "options": {"model": "storyboard"}}]}
    config = load_config(GRPOConfig, "large_grpo", changes)
    functions = [(reward, load_reward(reward.name)) for reward in config.rewards]
    with pytest.raises(ValueError, match=r"reward 'words' judges by storyboard: storyboard:large/prompts: this model knows"):
        check_judges(functions, Mixture(config.prompts, 0))
    check_judges(functions, Mixture(load_config(GRPOConfig, "terse_grpo").prompts, 0))


def test_pictures_of_model_and_world_must_have_one_size():
    config = StoryboardConfig(vocab_size=200, grid=3, patch=16, world="large")
    with pytest.raises(ValueError, match=r"grid 3 x patch 16 makes pictures of 48 pixels a side, .* world 'large' have 96"):
        check_geometry(config, LARGE)
    with pytest.raises(ValueError, match=r"patch is 12; .* a multiple of 8"):
        check_geometry(dataclasses.replace(config, grid=8, patch=12), LARGE)
    for setting in SETTINGS.values():
        assert setting.config().grid ** 2 >= (9 if setting.world == "standard" else 25)


TINY = dataclasses.replace(
    SETTINGS["large"],
    sizes={"grid": 6, "patch": 16, "levels": (4, 4, 4), "hidden_size": 64, "num_layers": 2, "num_heads": 2, "intermediate_size": 96,
           "depth_hidden_size": 32, "depth_layers": 1, "codec_width": 8, "max_positions": 640},
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> StoryboardModel:
    """Random weights in the large world's geometry, and a tiny model."""
    torch.manual_seed(0)
    config = TINY.config()
    model = new_model(PatchCodec(6, 16, 2, (4, 4, 4), 8), 0, TINY)
    assert model.config == config
    return model.eval()


def test_documents_of_the_large_geometry_score_as_they_were_sampled(tiny, tasks):
    params = SamplingParams(form=AnswerForm.TEXT_IMAGE, max_images=3, max_text_tokens=5)
    prompts = [tiny.encode_prompt(task.prompt, params.form) for task in tasks["train"][:3] for _ in range(2)]
    rollouts = sample(tiny, prompts, params, generator=torch.Generator().manual_seed(1))
    assert sum(len(rollout.document.images) for rollout in rollouts) == 6
    batch = collate([rollout.row for rollout in rollouts])
    scores = score(tiny, batch, params).logprobs
    sampled = torch.nn.utils.rnn.pad_sequence([rollout.rollout_logprobs for rollout in rollouts], batch_first=True)
    chosen = batch.choice_mask
    assert float((scores - sampled)[chosen].abs().max().detach()) < 1e-4
    assert {image.pixels.size for rollout in rollouts for image in rollout.document.images} == {(96, 96)}
    config = load_config(EvaluateConfig, None, {"world": "large", "telling": "terse", "num_prompts": 3, "num_retention": 2})
    params = SamplingParams(max_images=1, max_text_tokens=5)
    judged = evaluate_documents(tiny, held_out_tasks(config), params, config)
    assert all(item.verdict.document == 0 for item in judged)
    assert set(retained_skills(tiny, params, config)) == {"text_to_image", "understanding", "editing", "look_up"}


def test_conversations_of_the_large_world_fill_their_rows(tiny):
    """Codes patch by patch are those of the whole picture, and no turn is longer than the context."""
    codes = PatchCodes(tiny)
    picture = render(START, LARGE)
    assert torch.equal(codes.of(picture), tiny.image_codes(Image(picture)))
    batch, bare = make_batch(tiny, codes, 0, 0, Lesson(tuple(RECALL_TURNS), 4, 300), LARGE)
    assert len(batch) == 4
    assert batch.text_ids.shape[1] <= tiny.max_positions
    assert not (batch.text_ids == tiny.tokenizer.token_to_id("<unk>")).any()
    assert len(bare) == 1


def test_pretraining_of_a_setting_makes_a_model_of_its_world(tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "large", dataclasses.replace(TINY, codec_steps=4, base_steps=4, course=small_course()))
    monkeypatch.setattr("diptych.pretrain.patches_of", lambda world, patch: patches_of(world, patch, num_scenes=40))
    monkeypatch.setattr("diptych.pretrain.measure_reading", lambda codec, world: 0.0)
    with pytest.raises(ValueError, match="no part 'image_text' to pretrain with the setting 'large'; the parts are storyboard"):
        pretrain(tmp_path / "out", seed=0, scale=1, log=print, parts=("image_text",), setting="large")
    with pytest.raises(ValueError, match="no setting 'huge' to pretrain; the settings are standard, large, large_100m"):
        pretrain(tmp_path / "out", seed=0, scale=1, log=print, setting="huge")
    with pytest.raises(ValueError, match=r"made with another setting than 'large': it differs in .*grid, patch"):
        pretrain(tmp_path / "out", seed=0, scale=1, log=print, setting="large", init_from=packaged_folder("storyboard"))
    pretrain(tmp_path / "out", seed=0, scale=0.01, log=lambda line: None, setting="large")
    model = load_model(tmp_path / "out" / "storyboard")
    assert (model.config.world, model.image_spec.num_positions, model.image_spec.depth) == ("large", 36, 2)


def small_course():
    some = Lesson(("facts", "edit"), 1, 40)
    return dataclasses.replace(SETTINGS["large"].course, facts=some, words=some, alone=some, amid=some)


@pytest.mark.parametrize("name", ["large_warmup", "large_grpo"])
def test_recipes_of_the_large_world_ask_for_its_sources(name):
    config = load_config(WarmupConfig if name == "large_warmup" else GRPOConfig, name)
    sources = [*(config.sources if name == "large_warmup" else (*config.prompts, *config.ptx.sources))]
    assert {open_source(source.name, 1).world for source in sources} == {"large"}
    assert make_task(np.random.default_rng(0), "train", "recall", LARGE).truth.num_steps <= config.sampling.max_images


def test_the_packaged_words_are_those_of_the_standard_world():
    words = load_model("storyboard").tokenizer
    assert build_tokenizer(language.vocabulary()).get_vocab() == words.get_vocab()
    assert build_tokenizer(language.vocabulary(TERSE)).get_vocab() == words.get_vocab()
