"""`text_likelihood` against a loop of full forwards; what it says nothing of; what it misses; every family."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.config import RewardConfig
from diptych.document import Document, Image, Text, to_message
from diptych.models import load_model
from diptych.rewards import call_rewards, load_reward
from diptych.rewards.text_likelihood import TextLikelihood
from diptych.tokens import collate
from diptych.worlds.storyboard.tasks import task_stream

PICTURE = Image(PIL.Image.fromarray(np.full((96, 96, 3), (10, 60, 200), dtype=np.uint8)))
PROMPT = Document((PICTURE, Text("the ball grows .")))
ANSWER = Document((Text("a big ball ."), PICTURE, Text("  "), PICTURE, Text("at night , the tree leaves ."), PICTURE))
OTHER = Document((Text("the end"),))


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.save_pretrained(folder)
    return str(folder)


def values(reward: TextLikelihood, *pairs: tuple[Document, Document]) -> list[list[float | None]]:
    prompts = [[to_message("user", prompt)] for prompt, _ in pairs]
    return reward(prompts=prompts, completions=[[to_message("assistant", answer)] for _, answer in pairs])


@torch.no_grad()
def by_loop(folder: str, prompt: Document, texts: list[str], per_token: bool) -> list[float]:
    """A full forward for each token, and no scorer. Texts behind the first begin with a space."""
    model = load_model(folder)
    row = model.encode_prompt(prompt)
    answer = Document(tuple(Text(text if k == 0 else f" {text}") for k, text in enumerate(texts)))
    ids = [model.answer_text_ids(answer, k) for k in range(len(texts))]
    whole = [*(token for text in ids for token in text), model.eos_id]
    row = type(row).concat([row, type(row).text(whole, model.image_spec.depth, chosen=True, step=0)])
    begin = len(row) - len(whole)
    logs = []
    for t in range(begin, len(row)):
        batch = collate([row[0:t]])
        hidden = model.backbone(model.embed(batch), torch.arange(t)[None], torch.ones(1, t, dtype=torch.bool))[:, -1]
        logs.append(math.log(torch.softmax(model.text_logits(hidden)[0].double(), -1)[int(row.text_ids[t])]))
    found, at = [], 0
    for text in ids:
        counted = logs[at : at + len(text) + 1]  # its tokens, and the choice after it
        found.append(math.exp(sum(counted) / (len(counted) if per_token else 1)))
        at += len(text)
    return found


@pytest.mark.parametrize("per_token", [False, True])
def test_against_a_loop(tiny, per_token):
    reward = TextLikelihood(model=tiny, instruction="draw .", per_token=per_token)
    (found, alone) = values(reward, (PROMPT, ANSWER), (PROMPT, OTHER))
    texts = ["a big ball .", "at night , the tree leaves ."]
    asked = Document((Text("draw ."), *PROMPT.segments))
    assert [found[0], found[4]] == pytest.approx(by_loop(tiny, asked, texts, per_token), rel=1e-4)
    assert [found[i] for i in (1, 2, 3, 5)] == [None] * 4  # pictures, and a text of spaces
    assert alone == pytest.approx(by_loop(tiny, asked, ["the end"], per_token), rel=1e-4)


def test_a_batch_is_its_documents(tiny):
    pairs = [
        (PROMPT, ANSWER),
        (Document((Text("tell"),)), OTHER),
        (PROMPT, Document((PICTURE,))),
        (PROMPT, Document((Text("a box"), PICTURE))),
    ]
    together = values(TextLikelihood(model=tiny, batch_size=2), *pairs)
    for pair, found in zip(pairs, together, strict=True):
        (alone,) = values(TextLikelihood(model=tiny), pair)
        assert [v is None for v in alone] == [v is None for v in found]
        assert [v for v in alone if v is not None] == pytest.approx([v for v in found if v is not None], rel=1e-4)
    assert together[2] == [None]


def test_what_does_not_fit_is_missing_and_nothing_else(tiny):
    long = Document((Text("ball " * 600), PICTURE, Text("a box")))
    batch = call_rewards(
        [(RewardConfig(name="text_likelihood", options={"model": tiny}), load_reward("text_likelihood"))], [PROMPT] * 2, [long, OTHER], {}
    )
    assert batch.missing == {"text_likelihood": pytest.approx(2 / 3)}
    assert batch.faults == {"text_likelihood/too_long": 2}
    assert "the model's context" in batch.errors["text_likelihood"]
    assert batch.steps[0, 0, [0, 2]].isnan().all()
    assert not batch.applies[0, 0, 1]
    assert 0 <= float(batch.steps[0, 1, 0]) <= 1


def test_the_packaged_model_knows_right_texts():
    """A right text, a text with one wrong word, one that stops early, and a document without its conclusion."""
    task = next(t for t in task_stream(0, "test") if t.family == "reasoning" and t.truth.num_steps == 2)
    right = list(task.truth.document())
    first = right[0].text
    event, scene = first.split(" . ", 1)
    colour = next(c for c in ("red", "blue", "green", "yellow", "purple", "orange") if c in scene)
    wrong = f"{event} . {scene.replace(colour, 'red' if colour != 'red' else 'blue', 1)}"
    answers = [right, [Text(wrong), *right[1:]], [Text(f"{event} ."), *right[1:]], right[:-1]]
    found = values(TextLikelihood(), *((task.prompt, Document(tuple(segments))) for segments in answers))
    assert min(v for v in found[0] if v is not None) > 0.95
    assert found[1][0] < 0.05
    assert found[2][0] < 0.05
    assert found[3][2] < 0.05  # the last text is where the document ends too early
    assert found[3][0] == pytest.approx(found[0][0], abs=1e-4)


def test_every_family_can_judge(folders, family):
    """In the family's own template, with its own tokens; without an instruction."""
    folder, asked = str(folders[family]), Document((Text("tell of a ball"),))
    (found,) = values(TextLikelihood(model=folder, instruction="", per_token=True), (asked, Document((Text("a ball"), Text("a box")))))
    assert found == pytest.approx(by_loop(folder, asked, ["a ball", "a box"], per_token=True), rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere/at/all"}, "no model at 'nowhere/at/all'"),
        ({"instructions": "say"}, "instructions"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        call_rewards([(RewardConfig(name="text_likelihood", options=options), load_reward("text_likelihood"))], [PROMPT], [OTHER], {})
