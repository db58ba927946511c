"""Run folders: nothing is ever half-written, and what is damaged is named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diptych.config import WarmupConfig, build
from diptych.runs import RunFolder, atomic_folder, atomic_text, is_disk_full
from diptych.runtime import pick_device

SETTINGS = {"output_dir": "x", "max_steps": 9, "optim": {"lr": 1e-3}, "sources": [{"name": "storyboard:interleaved", "weight": 1.0}]}


class FakeModel:
    """Weights are one number; `error` is raised in the middle of writing them."""

    def __init__(self, number: int, error: BaseException | None = None) -> None:
        self.number, self.error = number, error

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(str(self.number))
        if self.error is not None:
            raise self.error


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def config(**changes) -> WarmupConfig:
    return build(WarmupConfig, {**SETTINGS, **changes})


@pytest.fixture
def run(tmp_path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run", config()) as opened:
        yield opened


def opened(path: Path, config: WarmupConfig) -> WarmupConfig:
    """The settings with which a run is resumed that was opened and left."""
    with RunFolder(path, config) as run:
        return run.config


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_run_is_made_of_is_written(run):
    for told in ("né", "another"):
        run.describe("rewards.json", [{"about": told}])
        assert json.loads((run.path / "rewards.json").read_text()) == [{"about": told}]


# --- atomic writing ----------------------------------------------------------------------------------------------------


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "folder"
    with atomic_folder(target) as folder:
        (folder / "file").write_text("new")
        assert not target.exists()
    assert names(tmp_path / "deep") == ["folder"]
    assert (target / "file").read_text() == "new"
    with atomic_folder(target) as folder:
        (folder / "other").write_text("newer")
        assert names(target) == ["file"]
    assert names(tmp_path / "deep") == ["folder"]
    assert names(target) == ["other"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), full_disk()])
def test_an_error_leaves_nothing_behind_and_keeps_the_old_folder(tmp_path, error):
    with atomic_folder(tmp_path / "kept") as folder:
        (folder / "file").write_text("old")
    for target in ("new", "kept"):
        with pytest.raises(BaseException) as caught, atomic_folder(tmp_path / target) as folder:  # noqa: PT011, PT012
            (folder / "file").write_text("half")
            raise error
        assert isinstance(caught.value, ValueError if isinstance(error, OSError) else type(error))
    assert names(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "file").read_text() == "old"


def test_a_disk_that_fills_up_while_flushing_is_told(tmp_path, monkeypatch):
    def fsync(_: int) -> None:
        raise full_disk()

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ValueError, match=r"no space left while writing .*new \(\d+ MiB free\)"), atomic_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("all")
    assert names(tmp_path) == []


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "notes" / "a.txt"
    atomic_text(path, "old")
    write = Path.write_text

    def half(self: Path, text: str) -> int:
        write(self, text[:2])
        raise full_disk()

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ValueError, match=r"no space left while writing .*a.txt; the old file, if any, is intact"):
        atomic_text(path, "new words")
    monkeypatch.undo()
    assert names(path.parent) == ["a.txt"]
    assert path.read_text() == "old"
    atomic_text(path, "new words")
    assert path.read_text() == "new words"


def test_a_full_disk_is_recognised_behind_other_errors():
    assert is_disk_full(full_disk())
    assert is_disk_full(RuntimeError("write failed: No space left on device"))
    assert is_disk_full(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5922880 vs 5922772"))  # torch.save's
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(None)
    wrapped = RuntimeError("enforce fail at inline_container")
    wrapped.__cause__ = full_disk()
    assert is_disk_full(wrapped)


# --- checkpoints -------------------------------------------------------------------------------------------------------


def test_checkpoints_are_read_back_and_the_newest_two_are_kept(run):
    assert run.steps() == []
    for step in (1, 2, 10):
        run.save(step, FakeModel(step), {"step": step, "values": torch.arange(3)})
    assert run.steps() == [2, 10]  # by number, not by letter
    assert names(run.checkpoints) == ["step_10", "step_2"]
    folder, state = run.load(10)
    assert (folder / "weights").read_text() == "10"
    assert state["step"] == 10
    assert state["values"].tolist() == [0, 1, 2]
    run.save(11, FakeModel(11), {}, keep=3)
    assert run.steps() == [2, 10, 11]
    run.save(12, FakeModel(12), {}, keep=1)
    assert run.steps() == [12]


def test_a_full_disk_keeps_the_earlier_checkpoints(run, monkeypatch):
    run.save(1, FakeModel(1), {"step": 1})
    run.save(2, FakeModel(2), {"step": 2})
    message = r"no space left while writing .*step_3 \(\d+ MiB free\)\. Nothing was half-written and earlier checkpoints are intact"
    with pytest.raises(ValueError, match=message):
        run.save(3, FakeModel(3, full_disk()), {})

    def save(state, path: Path) -> None:
        path.write_text("half")
        raise full_disk()

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(ValueError, match=message):
        run.save(3, FakeModel(3), {})
    monkeypatch.undo()
    assert names(run.checkpoints) == ["step_1", "step_2"]
    for step in (1, 2):
        folder, state = run.load(step)
        assert ((folder / "weights").read_text(), state) == (str(step), {"step": step})
    run.save(3, FakeModel(3), {"step": 3})
    assert run.steps() == [2, 3]


def test_what_a_killed_process_left_is_no_checkpoint(run):
    run.save(4, FakeModel(4), {})
    for name in (".tmp-step_5-123", "step_5.partial", "step_"):
        (run.checkpoints / name).mkdir()
    (run.checkpoints / "step_6").write_text("a file")
    assert run.steps() == [4]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_trainer_state_is_named(run, damage):
    run.save(3, FakeModel(3), {"values": torch.arange(1000)})
    file = run.checkpoints / "step_3" / "trainer.pt"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "garbage":
        file.write_bytes(b"garbage")
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"checkpoint .*step_3 is damaged \(.*\)\. Delete it to resume from the one before\."):
        run.load(3)


class Stranger:
    """A class that pickle would have to run code for."""


def test_trainer_state_runs_no_code(run):
    run.save(3, FakeModel(3), {"value": Stranger()})
    with pytest.raises(ValueError, match="is damaged"):
        run.load(3)


# --- settings ----------------------------------------------------------------------------------------------------------


def test_the_same_settings_open_a_run_again_and_others_are_refused(tmp_path):
    opened(tmp_path / "run", config())
    before = (tmp_path / "run" / "config.yaml").read_text()
    opened(tmp_path / "run", config())
    with pytest.raises(ValueError, match=r"holds a run with other settings \(different: seed, optim\.lr\)\. Choose another output_dir"):
        opened(tmp_path / "run", config(seed=1, optim={"lr": 2e-3}))
    assert (tmp_path / "run" / "config.yaml").read_text() == before


# --- logs --------------------------------------------------------------------------------------------------------------


def test_metrics_are_read_back(run):
    assert run.metrics() == []
    run.log(1, {"loss": 0.5})
    run.log(2, {"loss": 0.25, "reward": 1.0})
    assert run.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "reward": 1.0}]


def test_an_unfinished_last_line_is_ignored_and_written_over(run):
    for step in (1, 2, 3):
        run.log(step, {"loss": 1.0 / step})
    file = run.path / "metrics.jsonl"
    whole = file.read_text()
    for length in range(len(whole) - 25, len(whole) - 1):  # the process was killed within the third line
        file.write_text(whole[:length])
        assert [line["step"] for line in run.metrics()] == [1, 2]
    run.truncate_logs(2)
    run.log(3, {"loss": 7.0})
    assert [(line["step"], line["loss"]) for line in run.metrics()] == [(1, 1.0), (2, 0.5), (3, 7.0)]


def test_truncated_logs_forget_what_came_after_the_step(run):
    for step in (2, 4, 10):
        run.log(step, {"loss": float(step)})
        run.save_samples(step, [{"text": "ä", "reward": step}, {"text": "b"}])
    (run.path / "samples" / "notes.txt").write_text("mine")
    run.truncate_logs(4)
    assert [line["step"] for line in run.metrics()] == [2, 4]
    assert names(run.path / "samples") == ["notes.txt", "step_2.jsonl", "step_4.jsonl"]
    lines = (run.path / "samples" / "step_4.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "ä", "reward": 4}, {"text": "b"}]
    run.truncate_logs(4)
    assert [line["step"] for line in run.metrics()] == [2, 4]


def test_a_run_without_logs_can_be_truncated(run):
    run.truncate_logs(0)
    assert run.metrics() == []


def test_checkpoints_are_readable_by_whom_the_umask_lets(tmp_path):
    """safetensors writes files that only their owner can read."""
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "saved") as folder:
            (folder / "weights").write_text("x")
            (folder / "weights").chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "saved/weights").stat().st_mode & 0o777 == 0o640


def test_a_gpu_is_named_by_its_number(monkeypatch):
    """Rewards run in a thread, whose current GPU is the first, whatever that of the process is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(pick_device()) == "cpu"
    with pytest.raises(ValueError, match="'cuda:1' was asked for, but no CUDA device is available"):
        pick_device("cuda:1")
