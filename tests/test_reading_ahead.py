"""Batches that are read ahead are those that are read in turn."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from test_data_index import written
from test_training import grpo_config, tiny_folder, warmup_config, weights  # noqa: F401 - fixtures

from diptych.config import MixtureSource
from diptych.data import Mixture, Record, rows
from diptych.data.background import IN_TURN, Reader
from diptych.data.conversation import NotARecord
from diptych.data.records import open_source
from diptych.document import Image, Text
from diptych.models import UnifiedModel
from diptych.models.codes import CodeCache, Deferred, defer_codes
from diptych.runs import read_jsonl
from diptych.training.grpo import grpo
from diptych.training.preemption import Preempted
from diptych.training.supervised import encode_batch
from diptych.training.warmup import warmup


def left_out(mixture: Mixture) -> list[dict[int, str]]:
    return [{at: problem.detail for at, problem in skipped.items()} for skipped in mixture.skipped]


def choosy(record: Record) -> str:
    if int(record.id[1:]) % 7 == 3:
        raise ValueError("too hard")
    return record.id


def two_parts(step: int) -> Callable[[int, Record], Callable[[], Any]]:
    """Refuses some records in the first part, others in the second, and some at odd places only."""

    def prepare(place: int, record: Record) -> Callable[[], Any]:
        if int(record.id[1:]) % 11 == 5 and place % 2:
            raise ValueError(f"not at place {place}")

        def finish() -> Any:
            assert threading.current_thread() is threading.main_thread()
            return step, place, choosy(record), np.asarray(record.answer.images[0].pixels).sum()

        return finish

    return prepare


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_are_those_that_are_read_in_turn(tmp_path, caplog, workers, ahead):
    name = str(written(tmp_path / "data", 60))
    sources = [MixtureSource(name=name), MixtureSource(name="storyboard:interleaved", weight=0.2)]

    def all_of(reader: Reader, first: int = 0) -> list[Any]:
        caplog.clear()
        mixture = Mixture(sources[:1], 0, max_skipped=0.5)
        with reader:
            batches = [reader.made(mixture, step, 6, two_parts, last=8) for step in range(first, 8)]
        return [batches, left_out(mixture), [record.message for record in caplog.records]]

    expected = all_of(Reader())
    assert len(expected[1][0]) == len(expected[2]) == 6
    assert all_of(Reader(workers, ahead)) == expected
    assert all_of(Reader(workers, ahead), 5) == all_of(Reader(), 5)  # as a run that is resumed
    endless = Mixture(sources, 0)
    plain = [[r.prompt.text for r in endless.batch(step, 5)] for step in range(4)]
    with Reader(workers, ahead) as reader:
        words = [reader.made(endless, step, 5, lambda _: lambda _, record: lambda: record.prompt.text, last=4) for step in range(4)]
    assert words == plain


@pytest.mark.parametrize("error", [ValueError, KeyError, NotARecord])
def test_errors_come_up_at_their_step(tmp_path, error):
    mixture = Mixture([MixtureSource(name=str(written(tmp_path / "data", 60)))], 0)
    bad = mixture.batch(3, 4)[2].id
    first = next(step for step in range(8) if bad in [record.id for record in mixture.batch(step, 4)])
    assert first > 0

    def prepare(_: int) -> Callable[[int, Record], Callable[[], str]]:
        def make(_: int, record: Record) -> Callable[[], str]:
            if record.id == bad:
                raise error("cannot be used")
            return lambda: record.id

        return make

    told = []
    for reader in (Reader(), Reader(3, 4)):
        again = Mixture([MixtureSource(name=str(tmp_path / "data" / "d.jsonl"))], 0)
        done: list[int] = []

        def train(reader: Reader = reader, again: Mixture = again, done: list[int] = done) -> None:
            with reader:
                done.extend(step for step in range(8) if reader.made(again, step, 4, prepare, last=8))

        with pytest.raises(error if error is KeyError else ValueError) as caught:
            train()
        told.append((len(done), str(caught.value)))
    assert told == [(first, told[0][1])] * 2
    assert "cannot be used" in told[0][1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_a_picture_that_vanishes_while_it_is_trained_on_is_named(tmp_path):
    name = str(written(tmp_path / "data", 30))
    mixture = Mixture([MixtureSource(name=name)], 0)
    for path in (tmp_path / "data").glob("*.png"):
        path.unlink()
    with Reader(2, 2) as reader, pytest.raises(ValueError, match=r"1 of the 30 rows .*png does not exist"):
        reader.made(mixture, 0, 4, two_parts, last=5)


def test_threads_are_ahead_and_end(tmp_path):
    mixture = Mixture([MixtureSource(name=str(written(tmp_path / "data", 30)))], 0)
    begun: list[int] = []
    hold = threading.Event()

    def prepare(step: int) -> Callable[[int, Record], Callable[[], int]]:
        def make(place: int, _: Record) -> Callable[[], int]:
            begun.append(step)
            if step == 4:
                hold.wait(20)
            return lambda: step

        return make

    with Reader(2, 3) as reader:
        reader.made(mixture, 0, 4, prepare, last=6)
        deadline = time.monotonic() + 10
        while len(begun) < 16 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sorted(begun) == sorted([0, 1, 2, 3] * 4)  # and not more
        reader.made(mixture, 1, 4, prepare, last=6)
        threading.Timer(0.3, hold.set).start()
    assert begun.count(4) < 4  # those that had not begun never do
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def family_batches(model: UnifiedModel, name: str, reader: Reader, cache_folder: Path | None) -> list[Any]:
    mixture = Mixture([MixtureSource(name=name)], 0)
    model.code_cache = None if cache_folder is None else CodeCache(cache_folder, model)
    try:
        with reader:
            if reader.is_ahead:
                defer_codes(model)
            return [encode_batch(model, mixture, 3, 0.5, 0, step, reader, 4) for step in range(4)]
    finally:
        model.code_cache = None


@pytest.mark.parametrize("cached", [False, True])
def test_every_family_makes_the_same_rows(models, family, tmp_path, monkeypatch, cached):
    """And leaves what is on the device to the thread that trains."""
    model, name = models[family], str(written(tmp_path / "data", 12, text="the red ball ." if family == "storyboard" else "a story"))
    expected = family_batches(model, name, Reader(), None)
    device: list[bool] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            device.append(threading.current_thread() is threading.main_thread())
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(type(model), "encode_images", watched(type(model).encode_images))
    for module in model.modules():
        for method in ("forward", "encode"):
            if hasattr(module, method) and module is not model:
                monkeypatch.setattr(module, method, watched(getattr(module, method)))
    folder = tmp_path / "codes" if cached else None
    for _ in range(2):  # the second time codes are known
        found = family_batches(model, name, Reader(3, 2), folder)
        for one, other in zip(expected, found, strict=True):
            for field in ("text_ids", "codes", "modality", "step_ids", "completion_mask", "position_ids"):
                assert torch.equal(getattr(one, field), getattr(other, field)), field
            assert [len(pictures) for pictures in one.pixels] == [len(pictures) for pictures in other.pixels]
            for mine, its in zip(one.pixels, other.pixels, strict=True):
                assert all(map(torch.equal, mine, its))
    assert device
    assert all(device)


@pytest.fixture
def stories(tmp_path_factory) -> str:
    """Records of the packaged world in a file, one with a picture that is none."""
    folder = tmp_path_factory.mktemp("stories")
    source, lines = open_source("storyboard:interleaved"), []
    for i in range(40):
        record, number = source[i], 0

        def blocks(document: Any, i: int = i) -> list[dict[str, str]]:
            nonlocal number
            found = []
            for segment in document:
                if isinstance(segment, Text):
                    found.append({"type": "text", "text": segment.text})
                elif isinstance(segment, Image):
                    segment.pixels.save(folder / f"{i}-{number}.png")
                    found.append({"type": "image", "image": f"{i}-{number}.png"})
                    number += 1
            return found

        messages = [{"role": "user", "content": blocks(record.prompt)}, {"role": "assistant", "content": blocks(record.answer)}]
        lines.append(json.dumps({"messages": messages, "id": f"r{i}"}) + "\n")
    (folder / "d.jsonl").write_text("".join(lines))
    return str(folder / "d.jsonl")


def same(one: Path, other: Path, step: int) -> None:
    first, second = (weights(run / f"checkpoints/step_{step}/model") for run in (one, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    timed = {"seconds/rollout", "step_time"}
    lines = [
        [{key: value for key, value in line.items() if key not in timed} for line in read_jsonl(run / "metrics.jsonl")]
        for run in (one, other)
    ]
    assert lines[0] == lines[1]
    assert (one / "skipped.json").is_file() == (other / "skipped.json").is_file()
    if (one / "skipped.json").is_file():
        assert (one / "skipped.json").read_text() == (other / "skipped.json").read_text()


def break_late(monkeypatch, name: str) -> None:
    """Pictures that are no pictures, which only shows when their turn comes."""
    monkeypatch.setattr(rows, "PICTURES_CHECKED", 2)
    for i in (6, 11, 12):
        for path in Path(name).parent.glob(f"{i}-*.png"):
            path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("stage", ["warmup", "grpo"])
def test_training_is_the_same_with_and_without_threads(tiny_folder, tmp_path, stories, monkeypatch, stage):  # noqa: F811
    break_late(monkeypatch, stories)

    def run(out: str, max_steps: int, **changes: Any) -> None:
        common = {"max_steps": max_steps, "max_skipped_records": 0.2, **changes}
        if stage == "warmup":
            warmup(warmup_config(tiny_folder, tmp_path / out, sources=[{"name": stories}], batch_size=8, **common))
        else:
            ptx = {"sources": [{"name": stories}], "coef": 0.1, "batch_size": 4}
            grpo(grpo_config(tiny_folder, tmp_path / out, prompts=[{"name": stories}], ptx=ptx, resample_attempts=1, **common))

    run("in_turn", 4)
    run("ahead", 4, data_workers=3)
    same(tmp_path / "in_turn", tmp_path / "ahead", 4)
    assert (tmp_path / "ahead" / "skipped.json").is_file()
    run("in_turn_resumed", 2)
    run("in_turn_resumed", 4)
    run("ahead_resumed", 2, data_workers=2, prefetch=3)
    run("ahead_resumed", 4, data_workers=1, prefetch=1)
    same(tmp_path / "in_turn_resumed", tmp_path / "ahead_resumed", 4)


def test_a_run_that_stops_leaves_no_threads(tiny_folder, tmp_path, stories):  # noqa: F811
    def stop(error: BaseException) -> Callable[..., None]:
        def progress(step: int, *_: Any) -> None:
            assert [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
            if step == 2:
                raise error

        return progress

    for number, error in enumerate((KeyboardInterrupt(), ValueError("wrong"))):
        config = warmup_config(tiny_folder, tmp_path / f"{number}", sources=[{"name": stories}], data_workers=2, max_steps=50)
        with pytest.raises(type(error)):
            warmup(config, stop(error))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]

    def asks(step: int, *_: Any) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    config = warmup_config(tiny_folder, tmp_path / "asked", sources=[{"name": stories}], data_workers=2, max_steps=50)
    with pytest.raises(Preempted, match="step 2 of 50 is saved"):
        warmup(config, asks)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_codes_are_left_out_only_where_they_are_put_in(tiny_model):
    """A model whose codes are deferred gives codes as ever in any thread that makes whole rows."""
    image = Image(PIL.Image.new("RGB", (16, 16), (200, 30, 30)))
    expected = tiny_model.image_codes(image)
    try:
        defer_codes(tiny_model)
        assert isinstance(tiny_model.code_cache, Deferred)
        assert torch.equal(tiny_model.image_codes(image), expected)
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(tiny_model.image_codes(image)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], expected)
    finally:
        tiny_model.code_cache = None
    assert not IN_TURN.is_ahead
