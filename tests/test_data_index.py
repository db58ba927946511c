"""Where records stand is found once, and never wrong."""

from __future__ import annotations

import json
import mmap
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_data import picture
from test_training import grpo_config, tiny_folder, warmup_config, weights  # noqa: F401

from diptych.config import MixtureSource
from diptych.data import Mixture, Problems, cache, index, rows
from diptych.data.records import open_file, open_source
from diptych.data.rows import RowFile
from diptych.training import admission, inputs


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
    """The sources whose rows were scanned."""
    calls: list[str] = []
    right = RowFile._scan
    monkeypatch.setattr(RowFile, "_scan", lambda self, writer: calls.append(self.source) or right(self, writer))
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
    monkeypatch.setattr(RowFile, "_scan", lambda *_: pytest.fail("scanned again"))
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
        assert [line["id"] for line in mixture.left_out()] == ["r0", "r5", "r10", "r15"]
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
