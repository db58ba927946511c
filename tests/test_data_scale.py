"""Data at scale: where records stand is found once and never wrong, and batches that are read ahead are those that are read in turn."""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from family_data import picture
from test_training import grpo_config, tiny_folder, warmup_config, weights  # noqa: F401

from diptych.config import MixtureSource
from diptych.data import Mixture, Problems, Record, cache, index, rows
from diptych.data.background import IN_TURN, Reader
from diptych.data.conversation import NotARecord
from diptych.data.records import open_file, open_source
from diptych.data.rows import RowFile
from diptych.document import Image, Text
from diptych.models import UnifiedModel
from diptych.models.codes import CodeCache, Deferred, defer_codes
from diptych.runs import read_jsonl
from diptych.training import admission, inputs
from diptych.training.grpo import grpo
from diptych.training.preemption import Preempted
from diptych.training.supervised import encode_batch
from diptych.training.warmup import warmup


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """A cache in which everything is kept, however quickly it was made and however young its files are. Gives its folder of indexes."""
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    for module in (index, admission, inputs):
        monkeypatch.setattr(module, "WORTH", 0.0)
    monkeypatch.setattr(cache, "SETTLED", -1e9)
    return tmp_path / "cache" / "indexes"


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The sources whose rows were gone through."""
    calls: list[str] = []
    right = RowFile._go_through
    monkeypatch.setattr(RowFile, "_go_through", lambda self, writer: calls.append(self.source) or right(self, writer))
    return calls


def written(folder: Path, count: int, *, broken: tuple[int, ...] = (), text: str = "tell a story") -> Path:
    """Records of a prompt with a picture and an answer with one; the rows at `broken` are none."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        (folder / f"{i}.png").exists() or picture(i).save(folder / f"{i}.png")
        blocks = [{"type": "text", "text": text}, {"type": "image", "image": f"{i}.png"}]
        messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": blocks}]
        lines.append(json.dumps({"messages": "none" if i in broken else messages, "id": f"r{i}", "column": i}) + "\n")
    (folder / "d.jsonl").write_text("".join(lines))
    return folder / "d.jsonl"


def seen(name: Path, problems: Problems | None = None) -> list[Any]:
    """All that an opened file says of itself."""
    file = open_file(str(name), problems=problems)
    train, held_out = (open_source(str(name), split=split, problems=Problems()) for split in ("train", "validation"))
    told = [
        [(r.id, r.where, r.prompt.text, r.columns["column"]) for r in map(source.__getitem__, range(source.size))]
        for source in (train, held_out)
    ]
    said = [[(at, r.id, r.prompt.text) for at, r in source.conversations()] for source in (train, held_out)]
    found = [] if problems is None else [problem.as_dict() for problem in problems.found]
    return [told, said, file.num_rows, file.lines.tolist(), sorted(file.columns), file.pictures, found]


# --- the index -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [(), (3, 19, 25)])
def test_a_file_is_gone_through_once(tmp_path, kept, passes, monkeypatch, broken):
    name = written(tmp_path / "data", 43, broken=broken)
    monkeypatch.setenv("DIPTYCH_CACHE", str(name))  # no folder: everything is found out anew
    expected = seen(name, Problems())
    assert len(passes) == 3
    monkeypatch.setenv("DIPTYCH_CACHE", str(kept.parent))
    del passes[:]
    assert seen(name, Problems()) == expected
    assert len(passes) == 1
    monkeypatch.setattr(RowFile, "_go_through", lambda *_: pytest.fail("gone through again"))
    assert seen(name, Problems()) == expected
    if broken:
        message = r"d\.jsonl:4: not a record: `messages` is a string"
        with pytest.raises(ValueError, match=message):
            open_file(str(name))
        with pytest.raises(ValueError, match=r"d\.jsonl:4: not a record: .*\(--strict stops"):
            open_file(str(name), problems=Problems(strict=True))


@pytest.mark.parametrize(("content", "message"), [("\n", "is empty; at least one"), ('{"a": 1}\n', "none of the 1 rows .* is a record")])
def test_files_without_records(tmp_path, kept, content, message):
    (tmp_path / "d.jsonl").write_text(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            open_file(str(tmp_path / "d.jsonl"), problems=Problems())


def test_the_share_that_may_be_left_out_counts_what_is_remembered(tmp_path, kept, passes):
    name = written(tmp_path / "data", 40, broken=(0, 5, 10, 15))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"4 of the 40 rows of .* cannot be used, and max_skipped_records: 0\.05"):
            Mixture([MixtureSource(name=str(name))], 0, max_skipped=0.05)
        mixture = Mixture([MixtureSource(name=str(name))], 0, max_skipped=0.1)
        assert [line["id"] for line in mixture.told()] == ["r0", "r5", "r10", "r15"]
    assert len(passes) == 1


def test_what_is_asked_for_is_part_of_the_name(tmp_path, kept, passes):
    name = str(written(tmp_path / "data", 30))
    assert [len(open_file(name, count)) for count in (None, 7, None, 7, 8)] == [30, 7, 30, 7, 8]
    assert len(passes) == 3


def test_a_changed_file_is_never_read_by_an_old_index(tmp_path, kept):
    name = written(tmp_path / "data", 12)
    assert len(open_file(str(name))) == 12
    old, before = name.read_text(), name.stat()
    written(tmp_path / "data", 13)
    assert len(open_file(str(name))) == 13
    name.write_text(old[::-1].replace("tnatsissa", "ydobosyna", 1)[::-1])  # of the same size, and as old by its time: the last row is none
    os.utime(name, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (name.stat().st_size, name.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(ValueError, match=r"d\.jsonl:12: not a record: roles are"):
        open_file(str(name))


def test_a_file_that_was_changed_just_now_is_not_remembered(tmp_path, kept, passes, monkeypatch):
    name = str(written(tmp_path / "data", 12))
    monkeypatch.setattr(cache, "SETTLED", 3600.0)
    for _ in range(2):
        open_file(name)
    assert len(passes) == 2


def test_other_rules_make_other_indexes(tmp_path, kept, passes, monkeypatch):
    name = str(written(tmp_path / "data", 12))
    open_file(name)
    monkeypatch.setattr(cache, "rules", lambda *_: "others")
    open_file(name)
    assert len(passes) == 2


@pytest.mark.parametrize("opened", [1000, 3])
def test_a_picture_that_vanished_is_noticed(tmp_path, kept, monkeypatch, opened):
    monkeypatch.setattr(rows, "PICTURES_CHECKED", opened)
    name = written(tmp_path / "data", 30)
    before = open_file(str(name)).pictures
    (tmp_path / "data" / "17.png").rename(tmp_path / "other.png")
    with pytest.raises(ValueError, match=r"d\.jsonl:18: not a record: .*17\.png does not exist"):
        open_file(str(name))
    for _ in range(2):
        problems = Problems()
        assert len(open_file(str(name), problems=problems)) == 29
        assert [problem.id for problem in problems.found] == ["r17"]
    (tmp_path / "other.png").rename(tmp_path / "data" / "17.png")
    assert open_file(str(name)).pictures == before


def test_a_picture_that_changed_is_noticed(tmp_path, kept, passes, monkeypatch):
    monkeypatch.setattr(rows, "PICTURES_CHECKED", 3)
    name, image = written(tmp_path / "data", 30), tmp_path / "data" / "1.png"
    content = image.read_bytes() + b"1"  # behind a picture's end there may be more
    image.write_bytes(content)
    times, found = image.stat(), [open_file(str(name)).pictures]
    image.write_bytes(content[:-1] + b"2")  # of the same size, one of those that are opened
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    found.append(open_file(str(name)).pictures)
    image.write_bytes(content)
    found.append(open_file(str(name)).pictures)
    (tmp_path / "data" / "29.png").write_bytes(b"one of those that are not")
    found.append(open_file(str(name)).pictures)
    assert found[2] == found[0]
    assert len(set(found)) == 3
    assert len(passes) == 4
    assert open_file(str(name)).pictures == found[-1]
    assert len(passes) == 4


def test_a_broken_picture_that_is_mended_is_noticed(tmp_path, kept):
    name = written(tmp_path / "data", 12)
    image = tmp_path / "data" / "4.png"
    content = image.read_bytes()
    image.write_bytes(b"no picture")
    open_file(str(name), problems=(problems := Problems()))
    assert [problem.id for problem in problems.found] == ["r4"]
    image.write_bytes(content)
    open_file(str(name), problems=(problems := Problems()))
    assert not problems.found


def test_many_pictures_are_looked_for_in_parts(tmp_path, kept, passes, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 7)
    for number in range(2):
        written(tmp_path / f"part{number}", 20)
        (tmp_path / f"part{number}" / "d.jsonl").rename(tmp_path / f"part{number}" / f"p{number}.jsonl")
    name = str(tmp_path / "part*" / "p*.jsonl")
    file = open_file(name)
    assert len(file) == 40
    open_file(name)
    assert len(passes) == 1
    for folder, at in (("part0", 0), ("part0", 19), ("part1", 0), ("part1", 19)):
        image = tmp_path / folder / f"{at}.png"
        content = image.read_bytes()
        image.write_bytes(b"")
        assert open_file(name, problems=Problems()).pictures != file.pictures
        image.write_bytes(content)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "another bit": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "another bit in the middle": lambda content: content[:800] + bytes([content[800] ^ 1]) + content[801:],
    "nonsense": lambda content: b"x" * len(content),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_made_again(tmp_path, kept, passes, caplog, damage):
    name = written(tmp_path / "data", 25)
    expected = seen(name)
    (file,) = kept.glob("*.index")
    content = file.read_bytes()
    file.unlink()  # not in place: who has it mapped keeps what he has
    file.write_bytes(DAMAGE[damage](content))
    del passes[:]
    assert seen(name) == expected
    assert len(passes) == 1
    assert "is damaged" in caplog.text
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written(tmp_path, kept, passes, monkeypatch, caplog):
    name = written(tmp_path / "data", 12)
    monkeypatch.setenv("DIPTYCH_CACHE", str(name))
    cache.say_once.cache_clear()
    found = [seen(name) for _ in range(2)]
    assert found[0] == found[1]
    assert len(passes) == 6
    assert [record.message.startswith("the cache cannot be written") for record in caplog.records] == [True]


def test_a_disk_that_is_full_while_an_index_is_written(tmp_path, kept, passes, monkeypatch, caplog):
    name = written(tmp_path / "data", 12)
    cache.say_once.cache_clear()
    right = index.Writer._write

    def full(self: index.Writer, content: bytes) -> None:
        if isinstance(getattr(self._stream, "name", None), str):  # of a file, not of memory
            raise cache.Unwritable from OSError("No space left on device")
        right(self, content)

    monkeypatch.setattr(index.Writer, "_write", full)
    assert len(open_file(str(name))) == 12
    assert len(passes) == 2
    assert "No space left on device" in caplog.text
    assert not list(kept.iterdir())


def test_nothing_is_kept_of_what_is_made_quickly(tmp_path, kept, monkeypatch):
    monkeypatch.setattr(index, "WORTH", 3600.0)
    file = open_file(str(written(tmp_path / "data", 12)))
    assert not list(kept.iterdir())
    assert file[3].id == "r3"  # from what was mapped


def test_what_nobody_uses_goes(tmp_path, kept):
    open_file(str(written(tmp_path / "one", 12)))
    (old,) = kept.glob("*.index")
    os.utime(old, (0, 0))
    open_file(str(written(tmp_path / "two", 12)))
    assert old not in list(kept.glob("*.index"))


def test_memory_does_not_grow_with_the_rows(tmp_path, kept):
    """Of a warm start: what Python and NumPy hold is far less than the 48 bytes of a record and the 8 of its place."""
    sizes = {}
    for count in (2_000, 20_000):
        name = tmp_path / f"{count}.jsonl"
        name.write_text("".join(f'{{"prompt": "tell {i}", "completion": "a story"}}\n' for i in range(count)))
        open_source(str(name))
        tracemalloc.start()
        train, held_out = open_source(str(name)), open_source(str(name), split="validation")
        sizes[count] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert (len(train.file), train.size, held_out.size) == (count, count * 19 // 20, count // 20)
        base: Any = train.file.lines
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
    assert sizes[20_000] < sizes[2_000] + 20_000


# --- several processes ---------------------------------------------------------------------------------------------------


def open_when_told(pipe: Any, name: str, seconds: float, environment: dict[str, str]) -> None:
    """A process that says over the pipe what it does; its rows take `seconds` to be gone through."""
    os.environ.update(environment)
    go_through, look = RowFile._go_through, index.Index.is_current

    def slowly(self: RowFile, writer: index.Writer) -> None:
        pipe.send("goes through")
        time.sleep(seconds)
        go_through(self, writer)

    def looking(self: index.Index) -> bool:
        pipe.send("looks")
        return look(self)

    RowFile._go_through, index.Index.is_current = slowly, looking  # type: ignore[method-assign]
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


def test_one_of_several_processes_makes_the_index(tmp_path, kept):
    name = written(tmp_path / "data", 12)
    with opening(name, 3, 1.0, WORLD_SIZE="3") as processes:
        for _, pipe in processes:
            pipe.send("go")
        told = [said(pipe) for _, pipe in processes]
    assert sorted(told, key=len) == [[12], [12], ["goes through", 12]]  # and no other looks for its pictures


def test_a_process_of_another_start_looks_for_pictures(tmp_path, kept):
    name = written(tmp_path / "data", 12)
    told = []
    for count, environment in ((1, {"WORLD_SIZE": "2"}), (2, {"WORLD_SIZE": "2"}), (2, {})):
        time.sleep(0.05)  # the system counts a process's start in hundredths of a second
        with opening(name, count, 0.0, **environment) as processes:
            for _, pipe in processes:
                pipe.send("go")
                told.append(said(pipe))
    assert told == [["goes through", 12], ["looks", 12], [12], ["looks", 12], ["looks", 12]]


def test_a_process_that_dies_holds_up_nobody(tmp_path, kept):
    name = written(tmp_path / "data", 12)
    with opening(name, 1, 600.0) as ((dying, first),), opening(name, 1, 0.0) as ((_, second),):
        first.send("go")
        assert first.recv() == "goes through"
        second.send("go")
        assert not second.poll(0.5)  # it waits
        dying.kill()
        assert said(second) == ["goes through", 12]


# --- what else is remembered -----------------------------------------------------------------------------------------------


def test_hashes_of_files_are_remembered_and_are_those_that_were(tmp_path, kept, monkeypatch):
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


# --- reading ahead ---------------------------------------------------------------------------------------------------------


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
        while begun.count(3) < 4 and time.monotonic() < deadline:
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
