"""Rewards as people write them: columns that some records lack, coroutines in a notebook, numbers of any kind, and silence."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import grpo_config, tiny_folder  # noqa: F401 - a fixture

from diptych.config import RewardConfig
from diptych.document import Document, Text
from diptych.rewards import RewardError, base, call_rewards
from diptych.rewards.base import check_columns
from diptych.rewards.format import format
from diptych.runs import read_jsonl
from diptych.runtime import run_async
from diptych.training.grpo import grpo
from diptych.training.step_report import Silence

MINE = RewardConfig(name="mine")
STORY = Document((Text("a"), Text("b")))


def called(reward: Any, count: int = 2, **columns: Any) -> Any:
    return call_rewards([(MINE, reward)], [STORY] * count, [STORY] * count, columns)


# --- columns -------------------------------------------------------------------------------------------------------------


def prompts(path: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": "tell"}], **row}) + "\n" for row in rows))
    return {"name": str(path)}


def test_a_column_of_some_records_is_none_in_the_others(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some_reward.py").write_text(
        "seen = []\n\ndef right(completions, answer, level, **columns):\n    seen.append((answer, level, sorted(columns)))\n"
        "    return [None if a is None else float(i) for i, a in enumerate(answer)]\n\n"
        "def other(completions, **_):\n    return [float(i) for i in range(len(completions))]\n"
    )
    sources = [prompts(tmp_path / "a.jsonl", [{"answer": "2"}] * 3), prompts(tmp_path / "b.jsonl", [{}] * 3 + [{"level": 1}])]
    config = grpo_config(
        tiny_folder, tmp_path / "run", prompts=sources, rewards=[{"name": "some_reward:right"}, {"name": "some_reward:other"}], max_steps=8,
        num_minibatches=1, prompts_per_step=1,
    )  # fmt: skip
    grpo(config)
    import some_reward  # type: ignore[import-not-found]

    answers, levels = ({str(call[part]) for call in some_reward.seen} for part in (0, 1))
    assert answers == {str(["2"] * 4), str([None] * 4)}  # batches of which no record has one, too
    assert str([None] * 4) in levels
    assert {"id", "license", "num_images", "source", "truncated"} <= set(some_reward.seen[0][2])
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 8
    assert all(line["rewards/some_reward:right/missing"] == 0 for line in lines)


@pytest.mark.parametrize(
    ("options", "columns", "told"),
    [
        ({}, ["num_images"], r"reward 'mine' needs 'answer', and no source of prompts has such a column; they have num_images"),
        ({}, [], r"they have none\. Add it to the data, or give the parameter a default"),
        ({}, ["answer", "prompts"], r"the data set has a column 'prompts', which is what every reward is given under that name"),
        ({"bound": 1}, ["answer", "bound"], r"reward 'mine' has an option 'bound', and the data set a column of that name"),
        ({}, ["answer"], ""),
        ({"answer": 3}, [], ""),
    ],
)
def test_columns_are_checked_before_anything_is_sampled(options, columns, told):
    def mine(completions, answer, bound=2, truncated=None, *rest, **_):
        return [0.0]

    config = RewardConfig(name="mine", options=options)
    if told:
        with pytest.raises(ValueError, match=told):
            check_columns([(config, mine)], columns)
    else:
        check_columns([(config, mine)], columns)


def test_format_without_a_number_that_is_asked_for():
    picture = {"type": "image", "image": None}
    completion = [{"content": [{"type": "text", "text": "a"}, picture, picture]}]
    assert format([completion] * 3, num_images=[None, 2, 10**400]) == [0.5, 0.5, 0.0]


# --- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (10**400, math.nan), (-(10**400), math.nan), (1e300, math.nan), (True, 1.0), (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5), (np.int64(3), 3.0), (torch.tensor(0.5), 0.5), ("0.5", 0.5), ("much", math.nan), (object(), math.nan),
        (1j, math.nan), ({}, math.nan), (math.inf, math.nan), (Decimal("sNaN"), math.nan),
    ],
)  # fmt: skip
def test_what_is_no_number_is_missing_and_stops_nobody(value, read):
    found = called(lambda completions, **_: [value, 0.25])
    assert found.documents[0].tolist() == pytest.approx([read, 0.25], nan_ok=True)
    steps = called(lambda completions, **_: [[value, None], [None, 0.25]])
    assert steps.steps[0, 0, 0].item() == pytest.approx(read, nan_ok=True)
    assert steps.applies[0].tolist() == [[True, False], [False, True]]


# --- coroutines ----------------------------------------------------------------------------------------------------------


async def slowly(completions, **_):
    await asyncio.sleep(0)
    return [float(i) for i in range(len(completions))]


def test_coroutines_run_in_a_notebook_a_thread_and_another_coroutine(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    assert called(slowly).documents.tolist() == [[0, 1]]

    async def cell() -> Any:
        inner = called(slowly)
        threaded = await asyncio.to_thread(called, slowly)
        return inner, threaded, await slowly([1, 2, 3])

    inner, threaded, direct = asyncio.run(cell())
    assert inner.documents.tolist() == threaded.documents.tolist() == [[0, 1]]
    assert (inner.missing, direct) == ({"mine": 0.0}, [0, 1, 2])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebook_reward.py").write_text("async def r(completions, **_):\n    return [float(len(str(c))) for c in completions]\n")
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=1, rewards=[{"name": "notebook_reward:r"}])

    async def training() -> None:
        grpo(config)

    asyncio.run(training())
    (line,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert line["rewards/notebook_reward:r/missing"] == 0


def test_a_coroutine_that_fails_in_a_notebook_is_a_reward_that_fails():
    async def broken(completions, **_):
        raise ConnectionError("gone")

    async def cell() -> Any:
        with pytest.raises(KeyError):
            run_async(raising())
        return called(broken)

    async def raising() -> None:
        raise KeyError("x")

    found = asyncio.run(cell())
    assert (found.missing, found.errors) == ({"mine": 1.0}, {"mine": "ConnectionError: gone"})


class Stateful:
    """Keeps what belongs to an event loop from one call to the next."""

    def __init__(self) -> None:
        self.slots = asyncio.Semaphore(1)

    async def __call__(self, completions, **_):
        async def one(value: int) -> float:
            async with self.slots:
                await asyncio.sleep(0.001)
                return float(value)

        return await asyncio.gather(*(one(i) for i in range(len(completions))))


def test_what_a_coroutine_keeps_is_good_for_the_next_call():
    config = RewardConfig(name="stateful")
    base._made.clear()
    for _ in range(3):
        found = call_rewards([(config, Stateful)], [STORY] * 3, [STORY] * 3, {})
        assert (found.missing, found.documents.tolist()) == ({"stateful": 0.0}, [[0, 1, 2]])


def test_a_coroutine_that_calls_another_reward_does_not_wait_for_itself():
    async def outer(completions, **_):
        inner = called(slowly)
        return inner.documents[0].tolist()

    assert called(outer).documents.tolist() == [[0, 1]]
    assert called(outer).documents.tolist() == [[0, 1]]


def test_coroutines_run_in_a_process_that_was_forked():
    assert called(slowly).documents.tolist() == [[0, 1]]
    child = os.fork()
    if not child:
        os._exit(0 if run_async(slowly([1, 2, 3])) == [0, 1, 2] else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("error", [asyncio.CancelledError, SystemExit])
def test_whatever_a_reward_raises_is_missing(error):
    async def cancelled(completions, **_):
        raise error()

    def plainly(completions, **_):
        raise error()

    for reward in (cancelled, plainly) if error is not SystemExit else (plainly,):
        assert called(reward).missing == {"mine": 1.0}


@pytest.mark.parametrize("returned", [{0: 1.0, 1: 1.0}, {0.5, 1.0}, "11", b"11", None, 3])
def test_what_is_no_list_is_refused(returned):
    with pytest.raises(RewardError, match=r"returned \w+; a list with one entry per document is needed"):
        called(lambda completions, **_: returned)


# --- silence -------------------------------------------------------------------------------------------------------------


def test_a_reward_that_says_nothing_is_told_and_stops_a_run_that_learns_nothing(tiny_folder, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mute.py").write_text(
        "def none(completions, **_):\n    return [None] * len(completions)\n\n"
        "def steps(completions, **_):\n    return [[None] * len(c[-1]['content']) for c in completions]\n"
    )
    mute = [{"name": "mute:none"}, {"name": "mute:steps"}, {"name": "format", "weight": 0}]
    settings = {"num_minibatches": 1, "max_steps": 30, "prompts_per_step": 1, "text": {}, "image": {}}
    with caplog.at_level(logging.WARNING), pytest.raises(RewardError, match=r"no reward that trains \(mute:none, mute:steps\) has"):
        grpo(grpo_config(tiny_folder, tmp_path / "run", rewards=mute, **settings))
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == Silence.LONG - 1
    told = [record.getMessage() for record in caplog.records if "says nothing" in record.getMessage()]
    assert len(told) == 4  # both, after 1 and 10 steps
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        rewards = [mute[0], {"name": "toy_rewards:per_step"}]
        grpo(grpo_config(tiny_folder, tmp_path / "other", rewards=rewards, **settings | {"max_steps": 11}))
    assert sum("reward mute:none says nothing" in record.getMessage() for record in caplog.records) == 2


def test_a_reward_that_speaks_again_is_heard(caplog):
    config = grpo_config(Path("m"), Path("o"), rewards=[{"name": "mine"}])
    silence = Silence(config)
    quiet, loud = called(lambda completions, **_: [None, None]), called(lambda completions, **_: [None, 1.0])
    for batch in [quiet] * 9 + [loud] + [quiet] * 9 + [loud]:
        silence.heard(batch)
    for _ in range(9):
        silence.heard(quiet)
    with pytest.raises(RewardError):
        silence.heard(quiet)
