"""Documents that join and leave a batch are those that would have been written alone."""

from __future__ import annotations

import random

import pytest
import torch
from served import drawing

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.document import Document, Text
from diptych.forms import AnswerForm
from diptych.models.base import UnifiedModel
from diptych.runtime import generator
from diptych.sampling import texts
from diptych.sampling.batch import Asked, Batch
from diptych.sampling.engine import sample
from diptych.sampling.rollout import Rollout, finish
from diptych.serving.wording import Wording

PROMPTS = [
    "tell the story . in the middle a big red ball , in the meadow . first snow falls , then the ball turns purple .",
    "draw this . on the right a big orange tree , at the beach .", "tell the story . first the sea comes .", "how do we build this ?",
    "how do we build this ? on the left a small blue flower , in the middle a small blue house , at night .", "draw this . a box .",
]  # fmt: skip
FORMS = (None, None, AnswerForm.TEXT_IMAGE, AnswerForm.IMAGE, AnswerForm.TEXT)


def warm(temperature: float = 1.0, scale: float = 1.5, **changes) -> SamplingParams:
    image = ImageSampling(temperature=temperature, guidance_scale=scale)
    return SamplingParams(text=TextSampling(temperature=temperature), image=image, **{"max_text_tokens": 40, **changes})


def asked_of(model: UnifiedModel, number: int, **changes) -> list[Asked]:
    rows = [model.encode_prompt(Document((Text(PROMPTS[i % len(PROMPTS)]),)), FORMS[i % len(FORMS)]) for i in range(number)]
    return [Asked(row, generator(i), **{"count": 1 + (i % 4 == 3), "max_images": 1 + i % 4, **changes}) for i, row in enumerate(rows)]


def texts_of(model: UnifiedModel, **changes) -> list[Asked]:
    asked = asked_of(model, 12, **{"count": 1, "max_images": 3, **changes})
    return [one for one in asked if one.prompt.form in (None, AnswerForm.TEXT_IMAGE)]


def alone(model: UnifiedModel, asked: Asked, params: SamplingParams) -> list[Rollout]:
    own = params.model_copy(update={"max_images": asked.max_images})
    fresh = torch.Generator()
    fresh.set_state(asked.generator.get_state())
    return sample(model, [asked.prompt], own, num_generations=asked.count, generator=fresh)


def same(one: Rollout, other: Rollout) -> None:
    assert torch.equal(one.row.text_ids, other.row.text_ids)
    assert torch.equal(one.row.codes, other.row.codes)
    assert one.truncated == other.truncated
    assert one.document.text == other.document.text


@torch.no_grad()
def written(
    model: UnifiedModel, params: SamplingParams, waiting: list[Asked], rng: random.Random, leave: float = 0.0, yields: bool = True
) -> list:
    """Joins a few at every phase that they can join, in turn; returns the finished rollouts by what was asked, and who left."""
    model.eval()
    batch, done, owner, left = Batch(model, params, yields=yields), {}, {}, set()
    waiting = list(waiting)
    while waiting or batch.partials:
        joins = [one for one in waiting[: rng.randint(0, 3)] if yields or not batch.drawing or one.prompt.form is AnswerForm.IMAGE]
        if not batch.partials:
            joins = joins or waiting[:1]
        if joins:
            who = [one for one in joins for _ in range(one.count)]
            owner |= zip(batch.join(joins), who, strict=True)
            waiting = [one for one in waiting if one not in joins]
        if leave and len(batch.partials) > 1 and rng.random() < leave:
            gone = rng.choice(batch.partials)
            batch.drop([gone])
            left.add(owner.pop(gone))
        done |= {partial: finish(model, [partial], params)[0] for partial in batch.advance()}
    found = {one: [done[partial] for partial, whose in owner.items() if whose is one] for one in owner.values()}
    return [found, left]


@pytest.mark.parametrize("name", ["storyboard", "storyboard_terse"])
@pytest.mark.parametrize(("temperature", "scale", "yields"), [(1.0, 1.5, True), (0.0, 1.0, True), (1.0, 1.0, False)])
def test_who_joins_late_gets_what_he_would_have_got_alone(name, temperature, scale, yields):
    model, params = drawing(name), warm(temperature, scale)
    asked = asked_of(model, 10)
    expected = [alone(model, one, params) for one in asked]
    found, _ = written(model, params, asked, random.Random(0), yields=yields)
    assert len({len(rollout.document.images) for rollouts in expected for rollout in rollouts}) >= 3
    for one, rollouts in zip(asked, expected, strict=True):
        for mine, theirs in zip(found[one], rollouts, strict=True):
            same(mine, theirs)


def test_who_leaves_changes_nothing_for_the_others(tiny_model):
    params = warm(0.8, 3.0, max_text_tokens=6)
    asked = asked_of(tiny_model, 16)
    expected = [alone(tiny_model, one, params) for one in asked]
    found, left = written(tiny_model, params, asked, random.Random(1), leave=0.3)
    assert 2 <= len(left) <= 12
    for one, rollouts in zip(asked, expected, strict=True):
        if one not in left:
            for mine, theirs in zip(found[one], rollouts, strict=True):
                same(mine, theirs)


@pytest.mark.parametrize("yields", [True, False])
def test_steps_of_unchanging_shape_join_too(tiny_model, monkeypatch, yields):
    """What a GPU records as graphs."""
    params, asked = warm(0.8, 3.0, max_text_tokens=6), asked_of(tiny_model, 8)
    expected = [alone(tiny_model, one, params) for one in asked]
    plain = Batch.__init__
    monkeypatch.setattr(Batch, "__init__", lambda self, model, params, yields: plain(self, model, params, True, yields))
    found, _ = written(tiny_model, params, asked, random.Random(2), yields=yields)
    for one, rollouts in zip(asked, expected, strict=True):
        for mine, theirs in zip(found[one], rollouts, strict=True):
            same(mine, theirs)


@pytest.mark.parametrize("yields", [True, False])
@pytest.mark.parametrize("limit", [1, 3, 9])
@torch.no_grad()
def test_all_texts_of_a_document_together_have_a_limit(tiny_model, limit, yields):
    """Up to it the document is the same; it ends where its texts have so many tokens, but for the picture that its form ends with."""
    params = warm(0.8, 3.0, max_text_tokens=6, max_images=3)
    expected = [alone(tiny_model, one, params)[0] for one in texts_of(tiny_model)]
    batch, cut = Batch(tiny_model, params, yields=yields), 0
    bounded = texts_of(tiny_model, max_text_tokens=limit)
    partials = batch.join(bounded)
    while batch.partials:
        batch.advance()
    for whole, mine in zip(expected, finish(tiny_model, partials, params), strict=True):
        tokens = [rollout.row.text_ids[rollout.row.completion_mask & (rollout.row.modality == 1)].tolist() for rollout in (whole, mine)]
        assert tokens[1] == tokens[0][:limit]
        if len(tokens[0]) > limit:
            cut += 1
            assert mine.truncated
            assert mine.row.form is None or len(mine.document.images) == 1
        else:
            assert len(mine.document.images) == len(whole.document.images)
    assert cut >= (limit < 9)


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("ask_every", [1, 3, 8])
@torch.no_grad()
def test_tokens_are_told_as_they_are_chosen(tiny_model, monkeypatch, ask_every, endless):
    """All of them, however seldom the device is asked, and in whichever phase they are written."""
    monkeypatch.setattr(texts, "ASK_EVERY", {"cpu": ask_every})
    if endless:
        ends, plain = torch.tensor([tiny_model.eos_id, tiny_model.image_spec.begin_id]), type(tiny_model).text_logits
        monkeypatch.setattr(type(tiny_model), "text_logits", lambda self, hidden: plain(self, hidden).index_fill(-1, ends, -1e4))
    params, asked = warm(0.8, 3.0, max_text_tokens=25 if endless else 6), asked_of(tiny_model, 10)
    if endless:  # half of the rows draw: the others write on in passes that are no multiple of 8
        rows = [tiny_model.encode_prompt(Document((Text(PROMPTS[0]),)), form) for form in 3 * [AnswerForm.TEXT, AnswerForm.IMAGE]]
        asked = [Asked(row, generator(i), 1, 1) for i, row in enumerate(rows)]
    batch, told = Batch(tiny_model, params, yields=True), {}
    partials = batch.join(asked)
    steps = []

    def watch(tokens):
        steps.append(len(tokens))
        for partial, ids in tokens:
            told.setdefault(partial, []).extend(ids)

    while batch.partials:
        batch.advance(watch)
    for partial, rollout in zip(partials, finish(tiny_model, partials, params), strict=True):
        chosen = rollout.row.completion_mask & (rollout.row.modality == 1)
        assert told.get(partial, []) == rollout.row.text_ids[chosen].tolist()
    assert len(steps) > 6 / ask_every


@torch.no_grad()
def test_when_all_who_would_draw_have_left_the_others_write_on(tiny_model):
    params = warm(0.8, 3.0, max_text_tokens=6)
    rows = [tiny_model.encode_prompt(Document((Text(PROMPTS[0]),)), form) for form in (AnswerForm.TEXT, AnswerForm.IMAGE)]
    asked = [Asked(row, generator(i), 1, 1) for i, row in enumerate(rows)]
    expected = alone(tiny_model, asked[0], params)[0]
    batch = Batch(tiny_model, params, yields=True)
    text, image = batch.join(asked)
    batch.advance()
    assert batch.partials == [text, image]
    assert batch.drawing
    batch.drop([image])
    while batch.partials:
        batch.advance()
    same(finish(tiny_model, [text], params)[0], expected)


def test_parts_of_a_text_are_the_text_in_every_family(models, family):
    """Random tokens of every family's tokenizer, one by one and a few at once."""
    model, rng = models[family], random.Random(0)
    legal = model.legal_text().nonzero().flatten().tolist()
    for _ in range(30):
        ids = [rng.choice(legal) for _ in range(rng.randint(0, 12))]
        wording, said = Wording(model), ""
        for start in range(0, len(ids), step := rng.randint(1, 3)):
            said += wording.more(ids[start : start + step])
        said += wording.end()
        plain = [i for i in ids if i not in (model.eos_id, model.image_spec.begin_id)]
        text = model.decode_text(plain).strip() if plain else ""
        assert said == text or ("\ufffd" in text and said.endswith(text[text.rindex("\ufffd") :]))


def test_a_character_in_pieces_is_said_when_it_is_whole():
    class Bytes:
        image_spec, eos_id = type("spec", (), {"begin_id": -1}), -2

        @staticmethod
        def decode_text(ids):
            return bytes(ids).decode(errors="replace")

    wording = Wording(Bytes())
    said = [wording.more([byte]) for byte in "a é ☃ ".encode()]
    assert said == ["a", "", "", " é", "", "", "", " ☃", ""]
    assert wording.end() == ""
    cut = Wording(Bytes())
    assert [cut.more([0x61]), cut.more([0xE2]), cut.end()] == ["a", "", "\ufffd"]


@pytest.mark.parametrize("graphs", [True, False])
@torch.no_grad()
def test_who_does_not_draw_writes_on_in_the_passes_of_those_who_do(tiny_model, monkeypatch, graphs):
    params = warm(0.8, 3.0, max_text_tokens=8)
    ends, plain = [tiny_model.eos_id, tiny_model.image_spec.begin_id], type(tiny_model).text_logits
    monkeypatch.setattr(type(tiny_model), "text_logits", lambda self, hidden: plain(self, hidden).index_fill(-1, torch.tensor(ends), -1e4))
    rows = [tiny_model.encode_prompt(Document((Text(PROMPTS[0]),)), form) for form in (AnswerForm.TEXT, AnswerForm.IMAGE)]
    batch, passes = Batch(tiny_model, params, graphs, yields=True), []
    backbone = tiny_model.backbone
    text, image = batch.join([Asked(row, generator(i), 1, 1) for i, row in enumerate(rows)])
    monkeypatch.setattr(tiny_model, "backbone", lambda embeds, *others: passes.append(tuple(embeds.shape[:2])) or backbone(embeds, *others))
    assert batch.advance() == []
    assert [len(piece.ids) for piece in text.pieces] == [1]  # half of the rows draw: their turn
    assert batch.drawing
    del passes[:]
    assert batch.advance() == [text, image]
    assert [len(piece.ids) for piece in text.pieces] == [8]  # it was cut meanwhile
    assert text.truncated
    spec = tiny_model.image_spec
    both, later = [one for one in passes if one[0] == 3], [one for one in passes if one[0] == 2]  # an unconditional branch is a row
    assert both == [(3, 1)] * spec.code_offsets[-1]
    assert later == [(2, 1)] * (len(spec.layout) - spec.code_offsets[-1])
    assert len(image.pieces[0].ids) == spec.num_positions
