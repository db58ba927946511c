"""What a picture is compared with, and whether an answer is the right one."""

from __future__ import annotations

import json
import re

import PIL.Image
import pytest
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import EvaluateConfig, RewardConfig, SamplingParams
from diptych.data.inspect import inspect_records
from diptych.data.records import open_source
from diptych.document import Document, Image, Text, to_json_blocks, to_message
from diptych.evaluation.storyboard import retained_skills, retention_rates
from diptych.models import load_model
from diptych.report.records import records_page
from diptych.rewards import call_rewards, load_reward
from diptych.rewards.base import about, check_columns
from diptych.rewards.captions import compared
from diptych.rewards.exact_match import exact_match, normalised
from diptych.rewards.image_text import image_text

RED = Image(PIL.Image.new("RGB", (8, 8), "red"))


def messages(role: str, *parts: str | Image) -> list[dict]:
    return [to_message(role, Document(tuple(Text(p) if isinstance(p, str) else p for p in parts)))]


def words(found):
    return [[(place, said) for place, said, _ in row] for row in found]


def test_what_a_picture_is_compared_with():
    prompts = [messages("user", "draw", RED, "a cat"), messages("user", "a dog"), messages("user", "a bird"), messages("user", " ")]
    answers = [
        messages("assistant", RED),
        messages("assistant", "plan", RED),
        messages("assistant", "given", RED),
        messages("assistant", RED),
    ]
    forms = ["image", "text_image", "image", "image"]
    assert words(compared(prompts, answers, answer_form=forms)) == [[(0, "draw a cat")], [(1, "plan")], [(1, "given")], []]
    asked = [[(0, "draw a cat")], [(1, "a dog")], [(1, "a bird")], []]
    assert words(compared(prompts, answers, "prompt", answer_form=forms)) == asked
    captions = ["the cat", None, "", ["", "x", "y"]]  # what says nothing falls back to the prompt
    told = [[(0, "the cat")], [(1, "a dog")], [(1, "a bird")], [(0, "x")]]
    assert words(compared(prompts, answers, "prompt", answer_form=forms, caption=captions)) == told
    assert words(compared(prompts, answers, caption=captions)) == [[], [(1, "plan")], [(1, "given")], []]  # free answers: as ever
    assert words(compared(prompts[:2], answers[:2], "prompt", caption=[float("nan"), 3])) == asked[:2]
    assert compared(prompts[:1], [messages("assistant")], answer_form=["image"]) == [[]]
    with pytest.raises(ValueError, match="against is 'plan'; allowed are text and prompt"):
        compared(prompts, answers, "plan")


def test_image_text_sees_the_caption_of_a_bare_picture():
    source = open_source("storyboard:text_to_image", split="validation")
    records = [source[i] for i in range(24)]
    right = call_rewards(
        [(RewardConfig(name="image_text"), image_text)], [r.prompt for r in records], [r.answer for r in records],
        {"caption": [r.columns["caption"] for r in records], "answer_form": ["image"] * 24},
    )  # fmt: skip
    wrong = call_rewards(
        [(RewardConfig(name="image_text", options={"against": "prompt"}), image_text)], [r.prompt for r in records],
        [r.answer for r in records], {"caption": [r.columns["caption"] for r in records[1:] + records[:1]], "answer_form": ["image"] * 24},
    )  # fmt: skip
    assert right.applies.all()
    assert right.steps.mean() > 0.8
    assert wrong.steps.mean() < 0.4


def test_exact_match_by_hand():
    said = [messages("assistant", *parts) for parts in (("The red ball.",), ("red",), ("a", "b"), ("red", RED), ("1,5",), ("x",), ("no",))]
    solution = ["red ball", "blue", "A-b!", "red", "15", None, ["yes", "No."]]
    assert exact_match(said, solution) == [1.0, 0.0, 1.0, 0.0, 0.0, None, 1.0]
    assert normalised("  The   quick,\n(brown) fox an ") == "quick brown fox"


def test_exact_match_of_letters_signs_and_numbers():
    """A solution that is nothing but an article or a sign must not be what every empty answer is."""
    for wrong in ("", "the", "...", "<answer></answer>", "b"):
        assert exact_match([messages("assistant", wrong)], ["A"]) == [0.0], wrong
    assert exact_match([messages("assistant", "A."), messages("assistant", " a ")], ["A", "A"]) == [1.0, 1.0]
    pairs = [("-5", "5"), ("5", "-5"), ("+", "-"), ("", "+"), ("1.5", "15"), ("3", "2")]
    assert [exact_match([messages("assistant", said)], [right])[0] for said, right in pairs] == [0.0] * 6
    assert exact_match([messages("assistant", "2")] * 4, [2, [2, 3], 2.0, float("nan")]) == [1.0, 1.0, 1.0, None]
    with pytest.raises(ValueError, match=r"a solution is {'x': 1}; it is a text, a number, or a list of these"):
        exact_match([messages("assistant", "2")], [{"x": 1}])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("exact_match", {"pattern": "("}, r"pattern '\(' is no regular expression"),
        ("exact_match", {"pattern": "abc"}, "pattern 'abc' has no group"),
        ("image_text", {"against": "plan"}, "against is 'plan'; allowed are text and prompt"),
    ],
)
def test_wrong_options_are_found_before_anything_is_sampled(name, options, said):
    with pytest.raises(ValueError, match=said):
        about(RewardConfig(name=name, options=options), load_reward(name))


def test_exact_match_finds_the_answer_in_a_longer_text():
    said = [messages("assistant", text) for text in ("<think>no\nred</think><answer>\nBlue</answer>", "blue", "<answer></answer>")]
    assert exact_match(said, ["blue"] * 3, pattern="<answer>(.*?)</answer>") == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="has no group"):
        exact_match(said, ["blue"] * 3, pattern="answer")


def test_a_source_without_solutions_is_named_before_anything_is_sampled():
    pair = [(RewardConfig(name="exact_match"), load_reward("exact_match"))]
    with pytest.raises(ValueError, match="reward 'exact_match' needs 'solution'"):
        check_columns(pair, open_source("storyboard:text_to_image").columns)
    check_columns(pair, open_source("storyboard:understanding").columns)


def test_a_reward_can_be_tried_for_a_form(tmp_path):
    """A bare picture has no text before it: for a free answer nothing is said of it, for form `image` the request is its caption."""
    record = open_source("storyboard:text_to_image", split="validation")[0]
    (tmp_path / "answer.json").write_text(json.dumps(to_json_blocks(record.answer)))
    command = ["rewards", "try", "image_text", "--document", str(tmp_path / "answer.json"), "--prompt", record.columns["caption"]]
    free, image = (CliRunner().invoke(app, [*command, *form]) for form in ([], ["--form", "image"]))
    assert free.exception is None
    assert image.exception is None
    assert "step 1 (picture): -" in free.output
    assert float(re.search(r"step 1 \(picture\): ([0-9.]+)", image.output)[1]) > 0.5


def test_retained_skills_do_not_depend_on_the_form_of_a_training():
    """The demo and the ablations hand on the training's own sampling, which may ask for one form."""
    model, config = load_model("storyboard"), EvaluateConfig(num_retention=12)
    found = [retention_rates(retained_skills(model, SamplingParams(form=form), config)) for form in ("free", "image", "text")]
    assert found[0] == found[1] == found[2]
    assert found[0]["understanding"]["accuracy"] > 0.9


def test_inspection_sees_given_beginnings(tmp_path):
    RED.pixels.save(tmp_path / "a.png")
    image = {"type": "image", "image": "a.png"}
    begin = {"role": "assistant", "content": [{"type": "text", "text": "one two"}, image], "prefix": True}
    line = {"messages": [{"role": "user", "content": "tell"}, begin, {"role": "assistant", "content": [image]}], "answer_form": "image"}
    (tmp_path / "r.jsonl").write_text(json.dumps(line) + "\n")
    found = inspect_records(tmp_path / "r.jsonl", load_model("storyboard"))
    assert (found.num_images, found.num_words, found.problems.by_cause()) == ([2], [3], {})
    page = records_page(found)
    assert "the given beginning of the answer" in page
    assert "form of the answer: image" in page
    assert page.count("<img") == 2
