"""Design promise 3: a reward cannot lie. What it does not know is masked out, what it loses is counted."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.config import RewardConfig
from diptych.data.records import open_source
from diptych.document import Document, Image, Text, to_message
from diptych.evaluation.storyboard import Judged, reward_columns
from diptych.rewards import BUILT_IN, RewardBatch, RewardError, call_rewards, load_reward
from diptych.rewards.base import merge
from diptych.rewards.format import format as format_reward
from diptych.rewards.image_text import image_text
from diptych.rewards.protocol import Context, Progress
from diptych.training.credit import document_rewards
from diptych.worlds.storyboard.oracle import judge
from diptych.worlds.storyboard.tasks import task_stream

NAN, INF = float("nan"), float("inf")
WHITE = PIL.Image.fromarray(np.full((4, 4, 3), 255, dtype=np.uint8))
PROMPTS = [Document((Text("draw"), Image(WHITE))), Document((Text("tell"),))]
COMPLETIONS = [Document((Text("a"), Image(WHITE), Text("b"))), Document((Text("c"),))]  # 3 steps and 1


def call(returned, config: RewardConfig | None = None) -> RewardBatch:
    """The two documents above under a reward that returns (or raises) this."""

    def reward(**_):
        if isinstance(returned, Exception):
            raise returned
        return returned

    return call_rewards([(config or RewardConfig(name="mine"), reward)], PROMPTS, COMPLETIONS, {})


def test_protocol():
    """TRL's: prompts and completions as lists of messages, each column of the data set under its name."""
    seen = {}

    def reward(prompts, completions, num_images, truncated):
        seen.update(prompts=prompts, completions=completions, num_images=num_images, truncated=truncated)
        return [1.0, 2.0]

    columns = {"num_images": [1, 0], "truncated": [False, True]}
    result = call_rewards([(RewardConfig(name="mine"), reward)], PROMPTS, COMPLETIONS, columns)
    image = {"type": "image", "image": WHITE}
    assert seen["prompts"] == [
        [{"role": "user", "content": [{"type": "text", "text": "draw"}, image]}],
        [{"role": "user", "content": [{"type": "text", "text": "tell"}]}],
    ]
    assert seen["completions"] == [
        [{"role": "assistant", "content": [{"type": "text", "text": "a"}, image, {"type": "text", "text": "b"}]}],
        [{"role": "assistant", "content": [{"type": "text", "text": "c"}]}],
    ]
    assert (seen["num_images"], seen["truncated"]) == ([1, 0], [False, True])
    assert result.documents.tolist() == [[1, 2]]
    assert result.documents_apply.tolist() == [[True, True]]
    assert result.missing == {"mine": 0.0}
    assert result.errors == {}


# Functions as TRL's documentation has them, written without Diptych in mind.


def thinks(completions, **kwargs):
    return [1.0 if re.match(r"^<think>.*</think>", messages[0]["content"], re.DOTALL) else 0.0 for messages in completions]


def is_accurate(completions, solution, log_extra=None, log_metric=None, **kwargs):
    found = [messages[0]["content"].split()[-1] for messages in completions]
    if log_extra:
        log_extra("extracted", found)
    right = [float(a == b) for a, b in zip(found, solution, strict=True)]
    if log_metric:
        log_metric("accuracy", sum(right) / len(right))
    return right


def is_short(completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]


def grows(prompts, completions, trainer_state, **kwargs):
    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]


def test_functions_written_for_trl_run_unchanged():
    names = ("thinks", "is_accurate", "is_short", "grows")
    configs = [RewardConfig(name=name, content="text") for name in names]
    completions = [Document((Text("<think>\nhm </think> so"), Image(WHITE), Text("it is 3"))), Document((Text("it is 4"),))]
    columns = {"solution": ["3", "3"], "truncated": [False, False]}
    context = Context(Progress(3, 12), [[5, 6, -1, -1, 7], [5]])
    functions = [(config, globals()[config.name]) for config in configs]
    result = call_rewards(functions, PROMPTS, completions, columns, context)
    assert result.documents.tolist() == [[1, 0], [1, 0], [-5, -1], [0.25, 0.25]]
    assert set(result.missing.values()) == {0}
    assert result.metrics == {"is_accurate/accuracy": [0.5]}
    assert result.extras == {"is_accurate/extracted": ["3", "4"]}
    outside = call_rewards(functions[2:3], PROMPTS, completions, columns)  # no training, no ids
    assert "completion_ids" in outside.errors["is_short"]


def test_a_text_reward_sees_a_mark_for_each_picture():
    seen = []

    def reward(prompts, completions):
        seen.extend([prompts, completions])
        return [0.0, 0.0]

    call_rewards([(RewardConfig(name="mine", content="text"), reward)], PROMPTS, COMPLETIONS, {})
    assert [messages[0]["content"] for messages in seen[0]] == ["draw <image>", "tell"]
    assert [messages[0]["content"] for messages in seen[1]] == ["a <image> b", "c"]


def test_logged_values_are_checked_and_merged():
    def logs(completions, log_metric, log_extra, **_):
        log_metric("x", len(completions))
        log_extra("y", [len(messages[0]["content"]) for messages in completions])
        return [0.0] * len(completions)

    def wrong(log_extra, **_):
        log_extra("y", [1, 2, 3])

    def taken(log_metric, **_):
        log_metric("mean", 1)

    batches = [call_rewards([(RewardConfig(name="a"), logs)], PROMPTS[:n], COMPLETIONS[:n], {}) for n in (2, 1)]
    merged = merge(batches)
    assert merged.metrics == {"a/x": [2.0, 1.0]}
    assert merged.extras == {"a/y": [3, 1, 3]}
    for function, message in ((wrong, "got 3 values for 2 documents"), (taken, "every reward logs mean, std, missing itself")):
        result = call_rewards([(RewardConfig(name="a"), function)], PROMPTS, COMPLETIONS, {})
        assert result.missing == {"a": 1.0}
        assert message in result.errors["a"]


def test_values_of_documents_and_steps_stand_in_their_places():
    rewards = [
        (RewardConfig(name="whole"), lambda **_: [1.0, None]),
        (RewardConfig(name="steps"), lambda **_: [[1.0, None, 3.0], [4.0]]),
        (RewardConfig(name="either"), lambda **_: [[None, 5.0, None], 6.0]),
    ]
    result = call_rewards(rewards, PROMPTS, COMPLETIONS, {})
    assert result.steps.shape == result.applies.shape == (3, 2, 3)
    assert result.documents.tolist() == [[1, 0], [0, 0], [0, 6]]
    assert result.documents_apply.tolist() == [[True, False], [False, False], [False, True]]
    assert result.applies.tolist() == [
        [[False] * 3, [False] * 3],
        [[True, False, True], [True, False, False]],
        [[False, True, False], [False] * 3],
    ]
    assert result.steps[result.applies].tolist() == [1, 3, 4, 5]
    assert result.missing == {"whole": 0, "steps": 0, "either": 0}


def test_none_is_not_applicable_and_not_missing():
    result = call([None, [None]])
    assert not result.applies.any()
    assert not result.documents_apply.any()
    assert result.missing == {"mine": 0.0}


@pytest.mark.parametrize("bad", [NAN, INF, -INF, "nan", "much", object()])
def test_what_is_not_finite_is_missing_and_never_zero(bad):
    whole = call([bad, 2.0])
    assert math.isnan(whole.documents[0, 0])
    assert float(whole.documents[0, 1]) == 2
    assert whole.documents_apply.all()
    assert whole.missing == {"mine": 1 / 2}
    steps = call([[1.0, bad, None], [bad]])
    assert steps.steps.isnan()[0].tolist() == [[False, True, False], [True, False, False]]
    assert steps.applies[0].tolist() == [[True, True, False], [True, False, False]]
    assert steps.missing == {"mine": pytest.approx(2 / 3)}  # two of the three values it owed


def test_a_reward_that_raises_is_missing_everywhere_and_spares_the_others(caplog):
    def broken(**_):
        raise RuntimeError("the server is down")

    rewards = [(RewardConfig(name="broken"), broken), (RewardConfig(name="fine"), lambda **_: [1.0, 2.0])]
    result = call_rewards(rewards, PROMPTS, COMPLETIONS, {})
    assert result.documents[0].isnan().all()
    assert result.documents_apply.all()
    assert result.steps[0].isnan().tolist() == result.applies[0].tolist() == [[True, True, True], [True, False, False]]
    assert result.documents[1].tolist() == [1, 2]
    assert not result.applies[1].any()
    assert result.missing == {"broken": 1.0, "fine": 0.0}
    assert result.errors == {"broken": "RuntimeError: the server is down"}
    assert "reward broken failed: RuntimeError: the server is down" in caplog.text


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 values for 2 documents; one per document is needed"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2 documents"),
        ([], "returned 0 values"),
        (1.0, "returned float; a list with one entry per document is needed"),
        (None, "returned NoneType; a list"),
        ([[1.0, 2.0], [1.0]], "returned 2 step values for a document of 3 steps"),
        ([1.0, [1.0, 2.0]], "returned 2 step values for a document of 1 steps"),
        ([[], 1.0], "returned 0 step values for a document of 3 steps"),
    ],
)
def test_wrong_numbers_of_values_raise(returned, message):
    with pytest.raises(RewardError, match=f"reward 'mine' {message}"):
        call(returned)


def test_tensors_are_values_too():
    assert call(torch.tensor([1.0, NAN])).documents[0, 0] == 1
    assert call(torch.tensor([1.0, NAN])).missing == {"mine": 1 / 2}
    result = call([torch.tensor([1.0, 2.0, 3.0]), torch.tensor(4.0)])
    assert result.steps[0, 0].tolist() == [1, 2, 3]
    assert float(result.documents[0, 1]) == 4
    for steps in ((1.0, None, 3.0), np.array([1.0, NAN, 3.0])):
        assert call([steps, None]).steps[0, 0, [0, 2]].tolist() == [1, 3]
    assert call(np.array([1.0, 2.0])).documents.tolist() == [[1, 2]]


def test_rescaling_by_hand():
    config = RewardConfig(name="mine", shift=1.0, scale=4.0)
    result = call([[5.0, None, 1.0], -1.0], config)
    assert result.steps[0, 0].tolist() == [1, 0, 0]  # (5 - 1) / 4, not applicable, (1 - 1) / 4
    assert result.applies[0, 0].tolist() == [True, False, True]
    assert float(result.documents[0, 1]) == -0.5  # (-1 - 1) / 4
    assert math.isnan(call([NAN, 0.0], config).documents[0, 0])


def test_rewards_may_be_async():
    async def reward(completions, **_):
        return [float(len(messages[-1]["content"])) for messages in completions]

    async def broken(**_):
        raise TimeoutError("too slow")

    result = call_rewards([(RewardConfig(name="a"), reward), (RewardConfig(name="b"), broken)], PROMPTS, COMPLETIONS, {})
    assert result.documents[0].tolist() == [3, 1]
    assert result.documents[1].isnan().all()
    assert result.errors == {"b": "TimeoutError: too slow"}


def test_rewards_are_loaded_by_name_and_by_path(tmp_path, monkeypatch):
    for name in BUILT_IN:
        assert callable(load_reward(name))
    assert load_reward("format") is load_reward("diptych.rewards.format:format") is format_reward
    (tmp_path / "rewards_of_a_user.py").write_text("def length(completions, **_):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores sys.path afterwards
    assert load_reward("rewards_of_a_user:length")(completions=[0, 0]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fromat",
            "unknown reward 'fromat'; give package.module:function or one of: format, exact_match, image_text, text_critic",
        ),
        ("no.such.module:reward", "cannot load reward 'no.such.module:reward': No module named 'no'"),
        ("diptych.rewards.format:reward", "cannot load reward .* has no attribute 'reward'"),
    ],
)
def test_unknown_rewards_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name)


def content(kinds: str) -> list[dict]:
    """One message; `t` is a text, `e` an empty one, `i` an image."""
    blocks = {
        "t": {"type": "text", "text": "words"},
        "e": {"type": "text", "text": "  "},
        "i": {"type": "image", "image": WHITE},
    }
    return [{"role": "assistant", "content": [blocks[kind] for kind in kinds]}]


def test_image_text_gives_both_pictures_of_a_text_a_value():
    picture = Image(PIL.Image.new("RGB", (96, 96), "red"))
    other = Image(PIL.Image.new("RGB", (96, 96), "blue"))

    def values(*segments):
        return image_text([[to_message("assistant", Document(segments))]])[0]

    said = Text("a red ball")
    found = values(said, picture, other, Text(" "), other, said, other)
    assert [value is None for value in found] == [True, False, False, True, True, True, False]
    assert found[1] == pytest.approx(values(said, picture)[1], abs=1e-6)  # as where texts and pictures alternate
    assert found[2] == pytest.approx(found[6], abs=1e-6)


@pytest.mark.parametrize(
    ("kinds", "wanted", "truncated", "value"),
    [
        ("titi", 2, False, 1),
        ("titit", 2, False, 1),  # a closing text is no fault
        ("titi", 2, True, 1 / 2),  # cut off
        ("ti", 2, False, 1 / 2),  # one of two
        ("tititi", 2, False, 2 / 3),  # one too many: 2 of 3
        ("tii", 2, False, 1 / 2),  # the second follows a picture
        ("iti", 2, False, 1 / 2),  # the first follows nothing
        ("eiti", 2, False, 1 / 2),  # an empty text is no text
        ("tieii", 3, True, 1 / 6),  # 1 good of 3, halved
        ("titie", 2, False, 2 / 3),  # an empty step is one more part: 2 of 3
        ("etiti", 2, False, 2 / 3),
        ("teiti", 2, False, 1 / 2),  # the picture behind it has no text, and that is one fault
        ("tiee", 1, False, 1 / 3),
        ("tieti", 2, False, 2 / 3),
        ("te", 0, False, 0),
        ("e", 0, False, 0),
        ("tt", 2, False, 0),
        ("", 2, False, 0),
        ("t", 0, False, 1),
        ("t", 0, True, 1 / 2),
        ("ti", 0, False, 0),  # none was wanted
        ("", 0, False, 1),
    ],
)
def test_format_by_hand(kinds, wanted, truncated, value):
    assert format_reward([content(kinds)], [wanted], [truncated]) == [pytest.approx(value)]


@pytest.mark.parametrize(
    ("kinds", "wanted", "ends", "value"),
    [
        ("titit", 2, True, 1),
        ("titi", 2, True, 2 / 3),  # the closing text is missing
        ("titie", 2, True, 2 / 3),  # an empty text closes nothing
        ("titite", 2, True, 2 / 3),  # nor after another text
        ("titiet", 2, True, 3 / 4),  # an empty step before the closing text
        ("titie", 2, False, 2 / 3),  # nobody asked for it
        ("tit", 2, True, 2 / 3),  # the second picture is
        ("tititit", 2, True, 3 / 4),  # one picture too many
        ("titit", 2, False, 2 / 3),  # a text that nobody asked for
        ("titi", 2, False, 1),
        ("titit", 2, None, 1),
        ("titi", 2, None, 1),
        ("t", 0, True, 1),
        ("", 0, True, 0),
        ("", 0, False, 1),
    ],
)
def test_format_asks_for_a_closing_text_where_the_prompt_does(kinds, wanted, ends, value):
    assert format_reward([content(kinds)], [wanted], None, [ends]) == [pytest.approx(value)]


def test_fault_leaving_out_the_conclusion_pays():
    """Rewards of texts say nothing of a text that is missing. Where the prompt's column asks for one, a wrong conclusion beats none."""
    task = next(t for t in task_stream(0, "train") if t.family == "reasoning")
    right = task.truth.document()
    wrong = Document((*right.segments[:-1], Text("the answer is wrong .")))
    without = Document(right.segments[:-1])
    functions = [(RewardConfig(name=name), load_reward(name)) for name in ("format", "text_critic")]
    columns = {name: [value] * 3 for name, value in task.columns.items()}
    batch = call_rewards(functions, [task.prompt] * 3, [right, wrong, without], columns)
    values, speaks, _ = document_rewards(batch.steps, batch.applies, batch.documents, batch.documents_apply)
    total = (values * speaks).sum(0).tolist()
    assert total[0] > total[1] > total[2], total


def test_prompts_and_judged_answers_tell_format_what_was_asked():
    """GRPO's records and the evaluation give the same columns, those of the tasks."""
    tasks = list(itertools.islice(task_stream(0, "test"), 6))
    judged = [Judged(task, task.truth.document(), judge([task.truth.document()], [task.truth])[0]) for task in tasks]
    assert reward_columns(judged)["ends_with_text"] == [task.family == "reasoning" for task in tasks]
    for kind in ("prompts", "interleaved"):
        records = [open_source(f"storyboard:{kind}")[i] for i in range(6)]
        asked = [record.columns["ends_with_text"] for record in records]
        assert set(asked) == {True, False}
        if kind == "interleaved":
            assert asked == [isinstance(record.answer.segments[-1], Text) for record in records]


def test_format_reads_the_columns_of_each_row():
    completions, wanted = [content("ti"), content("ti"), content("titi")], [1, 2, 2]
    assert format_reward(completions, wanted) == [1, 0.5, 1]
    assert format_reward(completions=completions, num_images=wanted, truncated=[False, False, True], prompts=[]) == [1, 0.5, 0.5]
    columns = {"num_images": [1, 0], "truncated": [False, False], "other": [0, 0]}
    assert call_rewards([(RewardConfig(name="format"), format_reward)], PROMPTS, COMPLETIONS, columns).documents.tolist() == [[1, 1]]
