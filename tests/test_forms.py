"""Forms of an answer: what is prescribed is in the sequence and never a choice, for the sampler, the scorer and supervised learning."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from family_data import answer, eager, params, picture, prompts
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import GRPOConfig, SamplingParams, TextSampling, WarmupConfig, build, load_config, recipe_path
from diptych.data.conversation import NotARecord, answer_places
from diptych.data.records import open_source
from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel, load_model
from diptych.rewards import RewardBatch
from diptych.sampling.engine import sample
from diptych.sampling.logprobs import score
from diptych.sampling.rollout import Rollout
from diptych.tokens import AnswerForm, Modality, TokenBatch, TokenRow, collate
from diptych.training.credit import of_choices
from diptych.training.grpo import grpo
from diptych.training.supervised import example_row, negative_log_likelihood
from diptych.training.warmup import warmup

FREE, IMAGE, TEXT, TEXT_IMAGE = AnswerForm
PLAN = Text("a red cat.")
# Every form without a beginning and with one, and what the answer must be
ASKED: list[tuple[AnswerForm | None, Document, tuple[type, ...] | None]] = [
    (None, Document(()), None),
    (IMAGE, Document(()), (Image,)),
    (TEXT, Document(()), (Text,)),
    (TEXT_IMAGE, Document(()), (Text, Image)),
    (FREE, Document((PLAN,)), None),
    (FREE, Document((PLAN, Image(picture(7)))), None),
    (IMAGE, Document((PLAN,)), (Text, Image)),
    (IMAGE, Document((Image(picture(8)),)), (Image, Image)),
    (TEXT, Document((PLAN, Image(picture(9)))), (Text, Image, Text)),
    (TEXT_IMAGE, Document((PLAN,)), (Text, Image)),
]


@pytest.fixture
def model(models, family) -> Iterator[UnifiedModel]:
    with eager(models[family]) as model:
        yield model


def rows_of(model: UnifiedModel) -> list[TokenRow]:
    return [model.encode_prompt(prompts()[i % 3], form, given) for i, (form, given, _) in enumerate(ASKED)]


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def roll(model: UnifiedModel, rows: list[TokenRow], settings: SamplingParams, **more) -> list[Rollout]:
    return sample(model, rows, settings, generator=generators(len(rows)), **more)


def gaps(model: UnifiedModel, rollouts: list[Rollout], settings: SamplingParams) -> torch.Tensor:
    batch = collate([r.row for r in rollouts])
    sampled = torch.nn.utils.rnn.pad_sequence([r.rollout_logprobs for r in rollouts], batch_first=True)
    return (score(model, batch, settings).logprobs - sampled).abs()


# --- every family ------------------------------------------------------------------------------------------------------


SCALES = {"plain": params(1.0), "guided": params(2.0), "three-way": params(2.0, image_guidance_scale=1.5)}


@pytest.mark.parametrize("settings", SCALES.values(), ids=SCALES)
def test_all_forms_in_one_batch_are_scored_as_they_were_sampled(model, settings):
    rows = rows_of(model)
    rollouts = roll(model, rows, settings, num_generations=2)
    assert gaps(model, rollouts, settings).max() <= 1e-4
    spec, end = model.image_spec, model.answer_end_ids
    for number, rollout in enumerate(rollouts):
        form, given, wanted = ASKED[number // 2]
        kinds, row = tuple(type(segment) for segment in rollout.document), rollout.row
        assert row.form == form
        if wanted is not None:  # a text may be empty; then its step is not there, and an empty answer is one empty text
            without = tuple(kind for at, kind in enumerate(wanted) if at < len(given) or kind is Image) or (Text,)
            assert kinds in (wanted, without)
        assert len(rollout.document.images) <= 3
        assert rollout.prompt_length == model.encode_prompt(prompts()[(number // 2) % 3], form).prompt_length
        assert not row.completion_mask[: len(rows[number // 2])].any()  # neither the beginning nor what begins a picture
        if form in (IMAGE, TEXT_IMAGE):
            assert row.text_ids[-len(end) :].tolist() == end
            assert not row.completion_mask[-len(end) :].any()
            assert int((row.completion_mask & (row.modality == Modality.IMAGE)).sum()) == spec.num_positions
        assert set(row.step_ids[row.completion_mask].tolist()) <= set(range(rollout.num_steps))


def test_a_document_does_not_depend_on_what_else_is_in_the_batch(model):
    settings, rows = params(2.0), rows_of(model)
    together = roll(model, rows, settings)
    for number, rollout in enumerate(together):
        (alone,) = sample(model, [rows[number]], settings, generator=[generators(len(rows))[number]])
        for name in ("text_ids", "codes", "step_ids", "completion_mask"):
            assert torch.equal(getattr(alone.row, name), getattr(rollout.row, name)), (number, name)


def test_a_sampled_picture_is_the_example_that_teaches_it(model):
    settings = params(2.0)
    for given in (Document(()), Document((PLAN,)), Document((Image(picture(8)),))):
        (rollout,) = roll(model, [model.encode_prompt(prompts()[1], IMAGE, given)], settings)
        drawn = Document((Image(codes=rollout.document.images[-1].codes),))
        taught = model.encode_example(prompts()[1], drawn, form=IMAGE, given=given)
        for name in ("text_ids", "codes", "modality", "step_ids", "completion_mask"):
            assert torch.equal(getattr(taught, name), getattr(rollout.row, name)), name


def test_a_given_beginning_leaves_the_rest_of_the_answer_what_it_was(model):
    """The same tokens and, at what is still chosen, the same log-probabilities, guided or not."""
    whole, settings = answer(), params(2.0, image_guidance_scale=1.5)
    rows = [model.encode_example(prompts()[1], whole)]
    for count in (1, 2, 3):
        given, rest = Document(whole.segments[:count]), Document(whole.segments[count:])
        rows.append(model.encode_example(prompts()[1], rest, given=given))
    everything, *parts = score(model, collate(rows), settings).logprobs
    for count, row, part in zip((1, 2, 3), rows[1:], parts, strict=True):
        assert torch.equal(row.text_ids, rows[0].text_ids)
        assert torch.equal(row.step_ids, rows[0].step_ids)
        chosen = rows[0].completion_mask & (row.step_ids >= count)
        # the choice to draw that ends a given text was made by whoever gave the picture, not the text
        begins = (row.text_ids == model.image_spec.begin_id) & (row.modality == Modality.TEXT) & (row.step_ids == count - 1)
        assert torch.equal(row.completion_mask | begins, chosen | begins)
        torch.testing.assert_close(part[: len(row)][chosen], everything[: len(row)][chosen], atol=1e-5, rtol=0)


def test_what_is_forced_gets_no_gradient(model):
    """Moving the logits of what is forced moves no loss. With the fault put in, a begin token that counts as chosen, it does."""

    def slope(batch: TokenBatch) -> float:
        step, head = 1e-2, next(m for name, m in model.named_modules() if name.endswith("lm_head"))
        losses = []
        for push in (0.0, step):
            hook = head.register_forward_hook(lambda _, inputs, logits, push=push: logits.index_fill(-1, begin, 0.0) + push * at_begin)
            with torch.no_grad():
                losses.append(float(sum(negative_log_likelihood(model, batch))))
            hook.remove()
        return abs(losses[1] - losses[0])

    begin = torch.tensor([model.image_spec.begin_id])
    at_begin = torch.zeros(model.vocab_size).index_fill(0, begin, 100.0)
    row = model.encode_example(prompts()[0], Document((Image(picture(3)),)), form=IMAGE)
    assert slope(collate([row])) == 0
    fault = dataclasses.replace(row, completion_mask=row.completion_mask | (row.text_ids == begin) & (row.step_ids >= 0))
    assert slope(collate([fault])) > 1e-3


def test_texts_begin_pictures_at_their_greatest_length(models, family):
    model = models[family]
    settings = params(2.0).model_copy(update={"max_text_tokens": 2, "text": TextSampling(temperature=50.0)})
    rows = [model.encode_prompt(prompt, TEXT_IMAGE) for prompt in prompts() for _ in range(4)]
    rollouts = roll(model, rows, settings)
    assert gaps(model, rollouts, settings).max() <= 1e-4
    begin = model.image_spec.begin_id
    cut = [r for r in rollouts if r.truncated]
    assert cut
    for rollout in cut:
        place = int(((rollout.row.text_ids == begin) & (rollout.row.step_ids >= 0)).nonzero()[0])
        assert place == rollout.prompt_length + 2
        assert not rollout.row.completion_mask[place]
        assert len(rollout.document.images) == 1


# --- the small model, by hand ------------------------------------------------------------------------------------------


def test_to_end_a_plan_is_to_begin_its_picture(tiny_model, request):
    """p(begin) under `text_image` is p(begin) + p(end) of the plain model among legal tokens, worked out one token at a time."""
    settings = SamplingParams(text=TextSampling(temperature=0.8), max_text_tokens=6)
    prompt = tiny_model.encode_prompt(Document((Text("draw this . a big tree"),)), TEXT_IMAGE)
    begin, end, chosen_begins = tiny_model.image_spec.begin_id, tiny_model.eos_id, 0
    moved = torch.zeros(tiny_model.vocab_size)
    moved[[begin, end]] = torch.tensor([-8.0, 23.0])  # nats: this model would begin at once, and never end by itself
    hook = tiny_model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + moved)
    request.addfinalizer(hook.remove)
    rollouts = sample(tiny_model, [prompt], settings, num_generations=12, generator=torch.Generator().manual_seed(3))
    assert gaps(tiny_model, rollouts, settings).max() <= 1e-4
    shares = []  # of the end in what was joined
    for rollout in rollouts:
        for t in range(rollout.prompt_length, len(rollout.row)):
            if not rollout.row.completion_mask[t] or rollout.row.modality[t] != Modality.TEXT:
                continue
            before = collate([rollout.row[:t]])
            hidden = tiny_model.backbone(tiny_model.embed(before), before.position_ids, before.attention_mask)[:, -1]
            logits = tiny_model.text_logits(hidden)[0].double()
            logits[tiny_model.forbidden_text_ids()] = -torch.inf
            weight = logits.exp()
            shares.append(float(weight[end] / (weight[begin] + weight[end])))
            weight[begin], weight[end] = weight[begin] + weight[end], 0
            tempered = weight ** (1 / 0.8)
            token = int(rollout.row.text_ids[t])
            expected = (tempered[token] / tempered.sum()).log()
            torch.testing.assert_close(rollout.rollout_logprobs[t, 0].double(), expected, atol=1e-4, rtol=0)
            chosen_begins += token == begin
    assert chosen_begins >= 4
    assert max(shares) > 0.1
    assert min(shares) < 0.9
    assert not any(int(i) == end for r in rollouts for i in r.row.text_ids[r.prompt_length : -1])


def test_a_text_goes_on_where_a_given_one_ends(tiny_model):
    given, settings = Document((Text("the ball grows"),)), SamplingParams(text=TextSampling(temperature=3.0), max_text_tokens=20)
    row = tiny_model.encode_prompt(Document((Text("tell the story ."),)), FREE, given)
    rollouts = sample(tiny_model, [row], settings, num_generations=24, generator=torch.Generator().manual_seed(0))
    assert any(len(rollout.document) > 1 for rollout in rollouts)
    for rollout in rollouts:
        first = rollout.document.segments[0]
        assert first.text.startswith("the ball grows")
        assert rollout.row.step_ids[rollout.prompt_length] == 0
    longer = [r for r in rollouts if r.document.segments[0].text != "the ball grows"]
    assert longer
    taught = tiny_model.encode_example(
        Document((Text("tell the story ."),)), Document((Text("at night ."), Image(codes=torch.zeros(9, 3).long()))), given=given
    )
    ids, steps = taught.text_ids.tolist(), taught.step_ids.tolist()
    place = taught.prompt_length
    assert tiny_model.decode_text(ids[place : place + 6]) == "the ball grows at night ."
    assert steps[place : place + 7] == [0] * 7  # the begin token too
    assert taught.completion_mask[place : place + 7].tolist() == [False] * 3 + [True] * 4


def test_answers_that_are_not_of_the_form_are_refused(tiny_model):
    prompt, image = Document((Text("draw"),)), Image(codes=torch.zeros(9, 3).long())
    for form, told, held in (
        (IMAGE, (Text("a"), image), "text, picture"),
        (IMAGE, (image, image), "picture, picture"),
        (TEXT, (Text("a"), image), "text, picture"),
        (TEXT_IMAGE, (image,), "picture"),
        (TEXT_IMAGE, (Text("a"),), "text"),
        (IMAGE, (), "nothing"),
    ):
        with pytest.raises(ValueError, match=f"^its answer holds {held}, and an answer of form {form} is "):
            tiny_model.encode_example(prompt, Document(told), form=form)
    tiny_model.encode_example(prompt, Document((Text("a"), image)), form=FREE)
    tiny_model.encode_example(prompt, Document((image,)), form=TEXT_IMAGE, given=Document((Text("a"),)))  # the plan was given whole


def test_settings_that_ask_for_another_form_than_the_prompt_are_refused(tiny_model):
    row = tiny_model.encode_prompt(Document((Text("draw"),)))
    with pytest.raises(ValueError, match=r"^the settings ask for form image, and a prompt was encoded for none"):
        sample(tiny_model, [row], SamplingParams(form=IMAGE), generator=torch.Generator())
    long = tiny_model.encode_prompt(Document((Text("ball " * 500),)), IMAGE)
    with pytest.raises(ValueError, match="exceed the model's context"):
        sample(tiny_model, [long], SamplingParams(max_images=0, max_text_tokens=1), generator=torch.Generator())


def test_graphs_and_plain_steps_sample_the_same(tiny_model):
    rows = [tiny_model.encode_prompt(Document((Text("draw"),)), form) for form in (None, IMAGE, TEXT, TEXT_IMAGE) for _ in range(3)]
    settings = SamplingParams(max_text_tokens=5, max_images=2)
    for a, b in zip(roll(tiny_model, rows, settings, graphs=False), roll(tiny_model, rows, settings, graphs=True), strict=True):
        assert torch.equal(a.row.text_ids, b.row.text_ids)
        assert torch.equal(a.row.codes, b.row.codes)


# --- rewards and records -----------------------------------------------------------------------------------------------


def test_rewards_say_nothing_of_a_given_beginning(tiny_model):
    """Also where the answer ends at once, which is a choice of the given picture's step; a given text counts where it went on."""
    given = Document((Text("the ball grows ."), Image(codes=torch.zeros(9, 3).long())))
    asked = ((None, Document(())), (IMAGE, given), (FREE, given), (FREE, Document((Text("zebra grows"),))))
    rows = [tiny_model.encode_prompt(Document((Text("tell"),)), form, beginning) for form, beginning in asked]
    ends = torch.zeros(tiny_model.vocab_size).index_fill(0, torch.tensor([tiny_model.eos_id]), 17.0)  # nats: here it likes to go on
    hook = tiny_model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + ends)
    rollouts = roll(tiny_model, rows, SamplingParams(max_text_tokens=4, max_images=3), num_generations=24)
    hook.remove()
    longest, count = max(r.num_steps for r in rollouts), len(rollouts)
    applies = torch.stack([torch.arange(longest) < r.num_steps for r in rollouts])[None]
    values = torch.ones(applies.shape)
    values[0, :, 0] = torch.nan  # what the first steps owe is missing
    nothing = torch.zeros(1, count, dtype=torch.bool)
    found = of_choices(RewardBatch(values, applies, torch.zeros(1, count), nothing, {"r": 0.5}, {}), rollouts)
    left = found.applies[0]
    assert [int(row.sum()) for row in left[:24]] == [r.num_steps for r in rollouts[:24]]
    assert all(row.tolist()[:3] == [False, False, True] for row in left[24:48])
    assert any(r.num_steps == 2 for r in rollouts[48:72])  # ended at once
    assert not left[48:72, :2].any()
    for row, rollout in zip(left[72:], rollouts[72:], strict=True):
        first = rollout.document.segments[0].text
        assert first.startswith("zebra grows")  # the words, though this model knows no zebra
        assert bool(row[0]) == (first != "zebra grows")
    lost = int((found.applies & found.steps.isnan()).sum())
    assert found.missing == {"r": pytest.approx(lost / int(left.sum()))}


def test_records_say_their_form_and_how_their_answer_begins(tmp_path):
    picture(1).save(tmp_path / "a.png")
    asked, image = {"role": "user", "content": "tell"}, {"type": "image", "image": "a.png"}
    begin = {"role": "assistant", "content": [{"type": "text", "text": "one."}, image], "prefix": True}
    told = {"role": "assistant", "content": "two."}
    lines = [{"messages": [asked, begin]}, {"messages": [asked, begin, told], "answer_form": "text"}, {"prompt": "p"}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_source(str(tmp_path / "r.jsonl"))
    source.form = TEXT_IMAGE
    first, second = source[0], source[1]
    assert (first.form, first.answer, len(first.given), first.prompt.text) == (TEXT_IMAGE, None, 2, "tell")
    assert (second.form, second.answer.text, second.columns["num_images"]) == (TEXT, "two.", 1)
    assert "answer_form" not in source.columns
    stood_in = [record for _, record in source.conversations()]
    assert [(r.form, len(r.given)) for r in stood_in] == [(TEXT_IMAGE, 2), (TEXT, 2)]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "user", "content": "a", "prefix": True}], "at a user message"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "prefix": "yes"}], "is 'yes'"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "prefix": True, "loss": False}], "beside no `loss`"),
        ([{"role": "assistant", "content": "b", "prefix": True}, {"role": "user", "content": "a"}], "behind nothing"),
        ([{"role": "user", "content": "a"}, *[{"role": "assistant", "content": "b", "prefix": True}] * 2], "behind user"),
    ],
)
def test_beginnings_that_are_none_are_refused(messages, said):
    with pytest.raises(NotARecord, match=said):
        answer_places(messages)


def test_unknown_forms_are_refused(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "p", "answer_form": "movie"}) + "\n")
    with pytest.raises(ValueError, match=r"r.jsonl:1: .*`answer_form` is a string .*; it is one of free, image, text, text_image"):
        open_source(str(tmp_path / "r.jsonl"))
    with pytest.raises(ValueError, match="form"):
        load_config(GRPOConfig, "grpo", ["--sampling.form=movie"])


def test_a_prompt_of_a_record_is_encoded_once_for_both_trainings(tmp_path, tiny_model):
    line = {"prompt": "tell", "completion": "the ball grows .", "answer_form": "text"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    record = open_source(str(tmp_path / "r.jsonl"))[0]
    assert example_row(tiny_model, record).form is TEXT


def test_packaged_model_draws_when_it_is_asked_to():
    model = load_model("storyboard")
    rows = [model.encode_prompt(Document((Text("draw this . on the left a small red ball , at night ."),)), form) for form in AnswerForm]
    documents = [rollout.document for rollout in roll(model, rows, model.default_sampling)]
    assert [len(document.images) for document in documents] == [1, 1, 0, 1]


# --- commands and trainings --------------------------------------------------------------------------------------------


def generated(tmp_path, *arguments: str) -> tuple[Document, str]:
    out = tmp_path / "answer.json"
    result = CliRunner().invoke(app, ["generate", "draw this . a big tree", *arguments, "--out", str(out), "--max-text-tokens", "4"])
    assert result.exception is None, result.exception
    return Document.from_blocks(json.loads(out.read_text())), result.output


def test_generate_takes_a_form_and_a_beginning(folders, tmp_path):
    for name in ("janus", "vila_u", "chameleon"):
        asked = ("--model", str(folders[name]), "--temperature", "1")
        assert [type(s) for s in generated(tmp_path, *asked, "--form", "image")[0]] == [Image]
        assert not generated(tmp_path, *asked, "--form", "text")[0].images
        begun, _ = generated(tmp_path, *asked, "--form", "image", "--begin", "a red cat.")
        assert (type(begun.segments[0]), len(begun.images)) == (Text, 1)
        (tmp_path / "begin.json").write_text((tmp_path / "answer.json").read_text())
        more, _ = generated(tmp_path, *asked, "--form", "text_image", "--begin", str(tmp_path / "begin.json"))
        assert len(more.images) == 2
        for content, said in (("[1]", "block 0 is 1; allowed are"), ("5", "holds int; it must hold a list"), ("[]", "or nothing at all")):
            (tmp_path / "begin.json").write_text(content)
            result = CliRunner().invoke(app, ["generate", "a", *asked, "--begin", str(tmp_path / "begin.json")])
            assert said in str(result.exception)
        assert "has an empty text" in str(CliRunner().invoke(app, ["generate", "a", *asked, "--begin", " "]).exception)


def test_generate_says_what_a_model_that_does_not_draw_can_do(tiny_model, tmp_path):
    with torch.no_grad():
        silent = copy.deepcopy(tiny_model)
        silent.lm_head.weight[silent.image_spec.begin_id] = 0
        silent.lm_head.weight[silent.eos_id] = 0
    silent.save_pretrained(tmp_path / "model")
    asked = ("--model", str(tmp_path / "model"), "--temperature", "0")
    document, told = generated(tmp_path, *asked)
    assert not document.images
    assert "chose to draw nothing" in told
    assert "--form image" in told
    assert "chose to draw nothing" not in generated(tmp_path, *asked, "--form", "text")[1]


def test_forms_stand_together_in_one_training(tmp_path):
    """Documents, pictures, words, plans and given beginnings in one batch of GRPO, and the same forms in a warm-up."""
    picture(1).save(tmp_path / "a.png")
    asked = {"role": "user", "content": "tell the story . on the left a small red ball , at night ."}
    begin = {
        "role": "assistant",
        "content": [{"type": "text", "text": "a red ball ."}, {"type": "image", "image": "a.png"}],
        "prefix": True,
    }
    told = {"role": "assistant", "content": "the ball grows ."}
    lines = [{"messages": [asked], "answer_form": form} for form in AnswerForm] + [{"messages": [asked, begin]}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({**line, "num_images": None}) + "\n" for line in lines * 5))
    (tmp_path / "examples.jsonl").write_text(
        "".join(
            json.dumps(line) + "\n"
            for line in [
                {"messages": [asked, {**told, "content": [{"type": "image", "image": "a.png"}]}], "answer_form": "image"},
                {"messages": [asked, told], "answer_form": "text"},
                {"messages": [asked, {**begin, "prefix": False}], "answer_form": "text_image"},
                {"messages": [asked, begin, told]},
            ]
        )
    )
    common = {"max_steps": 1, "optim": {"lr": 1e-5}, "device": "cpu", "sampling": {"max_text_tokens": 6, "max_images": 2}}
    longest = {"max_text_tokens": 90, "max_images": 4}  # of which not all fits behind every prompt
    found: list[dict[str, float]] = []
    sources = [{"name": str(tmp_path / "examples.jsonl")}]
    warm = build(WarmupConfig, {**common, "sampling": longest, "output_dir": str(tmp_path / "warm"), "sources": sources})
    warmup(warm, lambda step, total, metrics: found.append(metrics))
    settings = {
        **common, "output_dir": str(tmp_path / "run"), "num_generations": 2, "prompts_per_step": 8, "eval_steps": 1, "num_eval_prompts": 2,
        "prompts": [{"name": str(tmp_path / "prompts.jsonl")}], "rewards": [{"name": "format"}, {"name": "toy_rewards:per_step"}],
        "advantages": {"credit": "process"},
    }  # fmt: skip
    grpo(build(GRPOConfig, settings), lambda step, total, metrics: found.append(metrics))
    assert max(found[1]["parity/text_max"], found[1]["parity/image_max"]) <= 1e-4


@pytest.mark.parametrize("recipe", ["text_to_image", "plan_and_draw", "understanding", "all_tasks"])
def test_the_recipes_of_tasks_run(recipe, tmp_path):
    changes = ["--model=storyboard", f"--output_dir={tmp_path / 'run'}", "--max_steps=1", "--prompts_per_step=4", "--num_generations=2"]
    found: list[dict[str, float]] = []
    grpo(load_config(GRPOConfig, recipe, [*changes, "--device=cpu"]), lambda step, total, metrics: found.append(metrics))
    assert max(found[0]["parity/text_max"], found[0]["parity/image_max"]) <= 1e-4
    assert found[0]["reward"] > 0


@pytest.mark.parametrize("recipe", ["janus_text_to_image", "janus_plan_and_draw", "janus_understanding", "janus_all_tasks"])
def test_the_recipes_for_janus_run_at_toy_size(recipe, folders, tmp_path, monkeypatch):
    """With the records that docs/tasks.md shows; the scorers of pictures are a toy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    picture(1).save(tmp_path / "data" / "a.png")
    shown = re.search(r"```json\n(.*?)```", (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(), re.S)
    caption, plan, question = shown[1].splitlines()
    document = json.dumps({"prompt": "tell of a cat", "num_images": 2})
    for name, line in (("captions", caption), ("plans", plan), ("questions", question), ("documents", document)):
        (tmp_path / "data" / f"{name}.jsonl").write_text(f"{line}\n" * 20)
    settings = yaml.safe_load(recipe_path(recipe).read_text())
    settings |= {"model": str(folders["janus"]), "max_steps": 1, "prompts_per_step": 4, "num_generations": 2, "rollout_batch_size": None}
    settings |= {"device": "cpu", "dtype": "float32", "parity_bound": 1e-3}
    settings["lora"] = {"r": 4}
    settings["sampling"]["max_text_tokens"] = 6
    scorers = [reward for reward in settings["rewards"] if reward["name"] in ("hps", "image_reward")]
    for number, reward in enumerate(scorers):
        reward |= {"name": "toy_rewards:per_step", "options": {}, "label": f"scorer {number}"}
    found: list[dict[str, float]] = []
    grpo(build(GRPOConfig, settings), lambda step, total, metrics: found.append(metrics))
    assert max(found[0]["parity/text_max"], found[0]["parity/image_max"]) <= 1e-4
    assert ("rewards/exact_match/mean" in found[0]) == (recipe != "janus_text_to_image" and "plan" not in recipe)
