"""`image_likelihood` against a loop of full forwards; what it sees, what it says nothing of, what it misses; every family."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest
import torch
from family_data import SIZE

from diptych.config import ImageSampling, RewardConfig, SamplingParams
from diptych.document import Document, Image, Text, to_message
from diptych.models import load_model
from diptych.rewards import call_rewards, load_reward
from diptych.rewards.image_likelihood import ImageLikelihood
from diptych.runtime import generator
from diptych.sampling.engine import sample
from diptych.tokens import AnswerForm, TokenRow, collate
from diptych.worlds.storyboard.conversations import NEXT_PICTURE

PICTURE = Image(PIL.Image.fromarray(np.full((96, 96, 3), (10, 60, 200), dtype=np.uint8)))
PROMPT = Document((PICTURE, Text("the ball grows .")))


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_pretrained(folder)
    return str(folder)


def drawn(folder: str, seed: int) -> Image:
    """A picture with random codes, and its pixels."""
    model = load_model(folder)
    spec = model.image_spec
    codes = torch.randint(0, spec.codebook_size, (spec.num_positions, spec.depth), generator=generator(seed))
    return Image(model.to_pictures(codes[None])[0], codes)


def values(reward: ImageLikelihood, *pairs: tuple[Document, Document], codes: bool = True) -> list[list[float | None]]:
    prompts, answers = [[to_message("user", prompt)] for prompt, _ in pairs], [answer for _, answer in pairs]
    completions = [[to_message("assistant", answer)] for answer in answers]
    return reward(prompts=prompts, completions=completions, completion_documents=answers if codes else None)


@torch.no_grad()
def by_loop(folder: str, asked: Document, codes: torch.Tensor, guidance: float = 1.0) -> list[float]:
    """log p of every code by a full forward for each position, without the scorer and without its layouts."""
    model = load_model(folder)
    spec, depth = model.image_spec, model.image_spec.depth
    image = spec.row(codes, chosen=True, step=0, begin_step=0)
    prompt = model.encode_prompt(asked, AnswerForm.IMAGE)
    prompt = prompt[: prompt.prompt_length]
    starts = [prompt] if guidance == 1 else [prompt, TokenRow.text(model.unconditional_prompt(len(prompt)), depth)]
    logs = []
    for position, offset in enumerate(spec.code_offsets):
        hidden = []
        for start in starts:
            batch = collate([TokenRow.concat([start, image[: offset + 1]])])
            length = batch.text_ids.shape[1]
            hidden.append(model.backbone(model.embed(batch), torch.arange(length)[None], torch.ones(1, length, dtype=torch.bool))[0, -1])
        for d in range(depth):
            logits = [model.image_step(state[None], codes[position : position + 1, :d])[0].double() for state in hidden]
            mixed = logits[0] if guidance == 1 else logits[1] + guidance * (logits[0] - logits[1])
            logs.append(float(torch.log_softmax(mixed, -1)[codes[position, d]]))
    return logs


@pytest.mark.parametrize(
    ("memory", "per_code", "guidance"), [(1, False, 1.0), (1, True, 1.0), (0, True, 1.0), (2, True, 1.0), (1, True, 1.7)]
)
def test_against_a_loop(tiny, memory, per_code, guidance):
    """Three pictures: after the prompt's, after the first of the answer, and (no text before it) not judged."""
    first, second, third = (drawn(tiny, seed) for seed in range(3))
    answer = Document((Text("a ball ."), first, Text("at night ."), second, third, Text("the end .")))
    reward = ImageLikelihood(model=tiny, instruction="draw it .", memory=memory, per_code=per_code, guidance_scale=guidance)
    (found,) = values(reward, (PROMPT, answer))
    assert [v is None for v in found] == [True, False, True, False, True, True]
    before = {1: [PICTURE], 3: [PICTURE, first]}
    for place, text in ((1, "a ball ."), (3, "at night .")):
        shown = before[place][len(before[place]) - min(memory, len(before[place])) :]
        logs = by_loop(tiny, Document((*shown, Text(f"{text} draw it ."))), answer.segments[place].codes, guidance)
        wanted = math.exp(sum(logs) / (len(logs) if per_code else 1))
        assert found[place] == pytest.approx(wanted, rel=2e-3 if not per_code else 1e-4)


def test_the_picture_before_is_the_one_that_was_drawn(tiny):
    """Changing the first drawn picture changes the value of the second, and the prompt's picture does not; without memory nothing does."""
    first, other, second = (drawn(tiny, seed) for seed in (0, 1, 2))
    dark = Image(PIL.Image.fromarray(np.zeros((96, 96, 3), dtype=np.uint8)))
    answers = [Document((Text("a ball ."), one, Text("at night ."), second)) for one in (first, other)]
    pairs = [(PROMPT, answers[0]), (PROMPT, answers[1]), (Document((dark, *PROMPT.segments[1:])), answers[0])]
    seen = [line[3] for line in values(ImageLikelihood(model=tiny, per_code=True), *pairs)]
    assert abs(seen[0] - seen[1]) > 1e-6
    assert seen[2] == pytest.approx(seen[0], rel=1e-5)
    blind = [line[3] for line in values(ImageLikelihood(model=tiny, per_code=True, memory=0), *pairs)]
    assert blind == pytest.approx([blind[0]] * 3, rel=1e-5)


def test_a_batch_is_its_pictures(tiny):
    pairs = [
        (PROMPT, Document((Text("a ball ."), drawn(tiny, 0), Text("at night ."), drawn(tiny, 1)))),
        (Document((Text("tell"),)), Document((Text("a box"), drawn(tiny, 2)))),
        (PROMPT, Document((Text("nothing"),))),
    ]
    together = values(ImageLikelihood(model=tiny, per_code=True, batch_size=2), *pairs)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = values(ImageLikelihood(model=tiny, per_code=True), pair)
        assert [v is None for v in alone] == [v is None for v in found]
        assert [v for v in alone if v is not None] == pytest.approx([v for v in found if v is not None], rel=1e-4)
    assert together[2] == [None]


def test_training_passes_the_codes_that_were_sampled(tiny):
    """Through `call_rewards`, as GRPO calls it. Codes of another picture behind the same pixels have another value."""
    config = RewardConfig(name="image_likelihood", options={"model": tiny, "per_code": True})
    function = load_reward("image_likelihood")
    picture, other = drawn(tiny, 0), drawn(tiny, 1)
    answers = [Document((Text("a ball ."), Image(picture.pixels, codes))) for codes in (picture.codes, other.codes)]
    batch = call_rewards([(config, function)], [PROMPT] * 2, answers, {})
    assert batch.missing == {"image_likelihood": 0}
    assert batch.applies[0].tolist() == [[False, True]] * 2
    assert abs(float(batch.steps[0, 0, 1] - batch.steps[0, 1, 1])) > 1e-6
    logs = by_loop(tiny, Document((PICTURE, Text(f"a ball . {NEXT_PICTURE}"))), picture.codes)
    assert float(batch.steps[0, 0, 1]) == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)


def test_documents_are_given_to_functions_that_name_them():
    seen = {}

    def names(completions, completion_documents, **_):
        seen["named"] = completion_documents
        return [0.0]

    def takes_anything(completions, **rest):
        seen["rest"] = set(rest)
        return [0.0]

    answer = Document((Text("a"), Image(PICTURE.pixels, torch.ones(9, 2, dtype=torch.long))))
    call_rewards([(RewardConfig(name=f.__name__), f) for f in (names, takes_anything)], [PROMPT], [answer], {})
    assert seen["named"][0] is answer
    assert "completion_documents" not in seen["rest"]


def test_pictures_that_cannot_be_judged_are_missing(tiny):
    good, no_codes = drawn(tiny, 0), Image(drawn(tiny, 1).pixels)
    other = Image(good.pixels, torch.zeros(4, 2, dtype=torch.long))
    answers = [
        Document((Text("a ball ."), no_codes, Text("at night ."), good)),
        Document((Text("a ball ."), other)),
        Document((Text("ball " * 600), good)),
    ]
    config = RewardConfig(name="image_likelihood", options={"model": tiny})
    batch = call_rewards([(config, load_reward("image_likelihood"))], [PROMPT] * 3, answers, {})
    assert batch.missing == {"image_likelihood": pytest.approx(3 / 4)}
    assert batch.faults == {f"image_likelihood/{cause}": 1 for cause in ("no_codes", "other_codes", "too_long")}
    assert 0 <= float(batch.steps[0, 0, 3]) <= 1
    encoded = values(ImageLikelihood(model=tiny, from_pixels=True, per_code=True), (PROMPT, answers[0]), codes=False)
    model = load_model(tiny)
    logs = by_loop(tiny, Document((PICTURE, Text(f"a ball . {NEXT_PICTURE}"))), model.image_codes(no_codes))
    assert encoded[0][1] == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)


def test_every_family_can_judge(folders, models, family):
    """What the family sampled, in its own prompt for drawing: the value of the plain likelihood is that of the sampler at temperature 1."""
    model = models[family]
    asked = Document((Text("a ball"),))
    params = SamplingParams(image=ImageSampling(guidance_scale=1.0), form=AnswerForm.IMAGE, max_images=1)
    rollout = sample(model, [model.encode_prompt(asked, AnswerForm.IMAGE)], params, generator=generator(0))[0]
    answer = Document((Text("a ball"), *rollout.document.segments))
    reward = ImageLikelihood(model=str(folders[family]), instruction="", memory=0, per_code=True, image_size=SIZE.get(family))
    (found,) = values(reward, (Document((Text("tell"),)), answer))
    chosen = rollout.rollout_logprobs[rollout.row.completion_mask]
    count = model.image_spec.num_positions * model.image_spec.depth
    assert found == [None, pytest.approx(math.exp(float(chosen.sum()) / count), rel=1e-3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model": "nowhere/at/all"}, "no model at 'nowhere/at/all'"), ({"memory": -1}, "memory"), ({"per_token": True}, "per_token")],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        call_rewards([(RewardConfig(name="image_likelihood", options=options), load_reward("image_likelihood"))], [PROMPT], [PROMPT], {})
