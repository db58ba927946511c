"""One of several processes makes an index, and what else is found once is remembered too."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

from test_data_index import kept, written  # noqa: F401 - fixtures
from test_training import grpo_config, tiny_folder  # noqa: F401 - fixtures

from diptych.data import index
from diptych.data.records import open_file
from diptych.data.rows import RowFile
from diptych.training import admission, inputs
from diptych.training.grpo import grpo


def open_when_told(pipe: Any, name: str, seconds: float, environment: dict[str, str]) -> None:
    """A process that says over the pipe what it does; its rows take `seconds` to be scanned."""
    os.environ.update(environment)
    scan, look = RowFile._scan, index.Index.is_current

    def slowly(self: RowFile, writer: index.Writer) -> None:
        pipe.send("scans")
        time.sleep(seconds)
        scan(self, writer)

    def looking(self: index.Index) -> bool:
        pipe.send("looks")
        return look(self)

    RowFile._scan, index.Index.is_current = slowly, looking  # type: ignore[method-assign]
    pipe.recv()
    pipe.send(len(open_file(name)))


@contextlib.contextmanager
def opening(name: Path, count: int, seconds: float, **environment: str):
    """Processes that open a file, once they are told to, with their pipes."""
    context = multiprocessing.get_context("fork")
    pairs = []
    for _ in range(count):
        here, there = context.Pipe()
        process = context.Process(target=open_when_told, args=(there, str(name), seconds, environment))
        process.start()
        there.close()
        pairs.append((process, here))
    try:
        yield pairs
    finally:
        for process, here in pairs:
            process.kill()
            process.join()
            here.close()


def said(pipe: Any) -> list[Any]:
    """All that a process says until it is done."""
    told: list[Any] = []
    while not told or isinstance(told[-1], str):
        assert pipe.poll(60)
        told.append(pipe.recv())
    return told


def test_one_of_several_processes_makes_the_index(tmp_path, kept):  # noqa: F811
    name = written(tmp_path / "data", 12)
    with opening(name, 3, 1.0, WORLD_SIZE="3") as processes:
        for _, pipe in processes:
            pipe.send("go")
        told = [said(pipe) for _, pipe in processes]
    assert sorted(told, key=len) == [[12], [12], ["scans", 12]]  # and no other looks for its pictures


def test_a_process_of_another_start_looks_for_pictures(tmp_path, kept):  # noqa: F811
    name = written(tmp_path / "data", 12)
    told = []
    for count, environment in ((1, {"WORLD_SIZE": "2"}), (2, {"WORLD_SIZE": "2"}), (2, {})):
        time.sleep(0.05)  # the system counts a process's start in hundredths of a second
        with opening(name, count, 0.0, **environment) as processes:
            for _, pipe in processes:
                pipe.send("go")
                told.append(said(pipe))
    assert told == [["scans", 12], ["looks", 12], [12], ["looks", 12], ["looks", 12]]


def test_a_process_that_dies_holds_up_nobody(tmp_path, kept):  # noqa: F811
    name = written(tmp_path / "data", 12)
    with opening(name, 1, 600.0) as ((dying, first),), opening(name, 1, 0.0) as ((_, second),):
        first.send("go")
        assert first.recv() == "scans"
        second.send("go")
        assert not second.poll(0.5)  # it waits
        dying.kill()
        assert said(second) == ["scans", 12]


# --- what else is remembered -----------------------------------------------------------------------------------------------


def test_hashes_of_files_are_remembered_and_are_those_that_were(tmp_path, kept, monkeypatch):  # noqa: F811
    from diptych.models.fingerprint import of_file

    name = written(tmp_path / "data", 12)
    found = inputs._of_all(name)
    assert found == of_file(name, 2**20, 2**22)  # what runs have noted so far
    opened: list[Path] = []
    right = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *rest, **more: opened.append(self) or right(self, *rest, **more))
    assert inputs._of_all(name) == found
    assert name not in opened
    name.write_text(name.read_text().replace("r3", "x3"))
    assert inputs._of_all(name) != found
    (file,) = [path for path in (kept.parent / "hashes").iterdir() if json.loads(path.read_text())["value"] == found]
    file.write_text(file.read_text().replace(found, found[::-1]))  # damaged
    assert inputs._of_all(name) == of_file(name, 2**20, 2**22)


def test_another_run_of_the_same_finds_what_was_admitted(tiny_folder, tmp_path, kept, monkeypatch):  # noqa: F811
    name = str(written(tmp_path / "data", 40))
    asked: list[str] = []
    right = admission._refused
    monkeypatch.setattr(admission, "_refused", lambda source, *rest: asked.append(source.name) or right(source, *rest))

    def run(out: str, **changes: Any) -> int:
        del asked[:]
        settings = {"prompts": [{"name": name}], "max_steps": 1, **changes}
        grpo(grpo_config(tiny_folder, tmp_path / out, **settings))
        return len(asked)

    assert run("one") == 1
    assert run("two", seed=5, optim={"lr": 1e-4}) == 0
    assert run("three", sampling={"max_images": 1, "max_text_tokens": 4}) == 1
