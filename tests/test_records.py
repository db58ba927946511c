"""What a row of a data set may be: one rule, told in words, by conversion, inspection and training alike."""

from __future__ import annotations

import contextlib
import decimal
import io
import json
import math
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_data_convert import as_tar, converted, messages_file

from diptych.config import MixtureSource
from diptych.data import Mixture, Problems, open_source
from diptych.data.conversation import NotARecord, answer_places, given_messages
from diptych.data.inspect import inspect_records
from diptych.document import STAND_IN

USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
PYTHONS_OWN = ("object is not", "indices must be", "has no attribute", "NoneType", "KeyError", "codec can't", "unhashable", "not supported")


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told_by_all(path: Path, row: Any, tmp_path: Path) -> tuple[str, str, str]:
    """What training, inspection and conversion say of a file with a good row and this one."""
    written(path, [{"messages": [USER, ANSWER]}, row])
    with pytest.raises(ValueError, match=rf"{path.name}:2: not a record: ") as caught:
        open_source(str(path))
    trained = str(caught.value).split(": not a record: ", 1)[1]
    (inspected,) = inspect_records(str(path)).problems.found
    report, lines = converted("messages", tmp_path / f"out{random.random()}", path)
    assert len(lines) == 1
    (item,) = report["items"]
    assert (inspected.where, inspected.cause) == (item["where"], item["cause"]) == (f"{path}:2", inspected.cause)
    assert inspected.detail == item["detail"]
    assert trained[:200] == inspected.detail[:200]
    return trained, inspected.cause, inspected.detail


@pytest.mark.parametrize(
    ("row", "cause", "told"),
    [
        ({"conversations": [{"from": "human", "value": "a"}]}, "not a record", "it has 'conversations'; `messages`, or"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "not a record",
            "the content of message 2 is missing, or null; it is a",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "not a record", "the content of message 2 is missing, or null"),
        ({"messages": json.dumps([USER])}, "not a record", "`messages` is a string .*; it looks like JSON that was written as a string"),
        ({"messages": [[USER]]}, "not a record", "message 1 of `messages` is a list"),
        ({"messages": None}, "not a record", "it has nothing; `messages`, or `prompt` and `completion`, are needed"),
        ({"messages": []}, "not a record", "`messages` is an empty list"),
        ({"messages": [{"content": "x"}]}, "not a record", "the role of message 1 is missing, or null"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "not a record", 'block 0 of message 1 is "x"; allowed are text, image'),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "not a record",
            "block 0 of message 1 has a text that is missing",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not a record", "block 0 has no address"),
        ({"messages": [USER], "images": 3}, "not a record", r"`images` is a number \(3\)"),
        ({"prompt": 3}, "not a record", r"`prompt` is a number \(3\); a list of messages"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "empty message", r"message 2 \(assistant\) is empty"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": " \n"}]}]}, "empty message", "message 2"),
        ({"messages": [{"role": "user", "content": []}]}, "empty message", r"message 1 \(user\) is empty"),
        ({"prompt": "a", "completion": ""}, "empty message", r"message 2 \(assistant\) is empty"),
        ({"prompt": "a", "completion": []}, "not a record", "`completion` is an empty list"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a \ud83d"}]},
            "broken text",
            r"a lone surrogate \('\\ud83d'\) at character 2",
        ),
        ({"messages": [USER, ANSWER], "answer": {"a": ["\udc00"]}}, "broken text", "lone surrogate"),
        ({"messages": [USER, ANSWER], "\ud83d": 1}, "broken text", "lone surrogate"),
        ([1], "broken line", "a JSON object is needed, this is a list"),
    ],
)
def test_rows_that_are_no_records(tmp_path, row, cause, told):
    trained, found, _ = told_by_all(tmp_path / "d.jsonl", row, tmp_path)
    assert found == cause
    assert re.search(told, trained), trained


def test_what_is_null_is_not_there(tmp_path):
    rows = [
        {"messages": None, "prompt": "x", "completion": "y"},
        {"messages": [{**USER, "loss": None}, {**ANSWER, "loss": None, "name": None}], "prompt": None, "images": None, "image": None},
        {"messages": [{"role": "system", "content": ""}, USER, ANSWER]},
        {"prompt": "x", "completion": None},
    ]
    source = open_source(str(written(tmp_path / "d.jsonl", rows)), split="train")
    found = [source.file[i] for i in range(4)]
    assert [r.prompt.text.strip() for r in found] == ["x"] * 4
    assert [r.answer and r.answer.text for r in found] == ["y", "y", "y", None]


WORDS = ["", " ", "a", "user", "assistant", "system", "text", "image", "\ud83d", "\0", "[1]", "p.png", "data:image/png;base64,x"]
KEYS = [
    "messages", "prompt", "completion", "role", "content", "type", "text", "image", "image_url", "url", "loss", "images", "id", "bytes",
    "path", "source", "license", "num_images",
]  # fmt: skip


def random_value(source: random.Random, depth: int = 0) -> Any:
    kinds = [
        lambda: None, lambda: source.choice([True, False]), lambda: source.choice([0, -1, 2**70, 1.5, 1e308]),
        lambda: source.choice(WORDS),
    ]  # fmt: skip
    if depth < 5:
        kinds += [
            lambda: [random_value(source, depth + 1) for _ in range(source.randint(0, 3))],
            lambda: {random_key(source): random_value(source, depth + 1) for _ in range(source.randint(0, 4))},
        ] * 2
    return source.choice(kinds)()


def random_key(source: random.Random) -> str:
    return source.choice(KEYS)


def mutated(source: random.Random, value: Any) -> Any:
    """A good row with something in it exchanged for anything."""
    if source.random() < 0.25:
        return random_value(source, 2)
    if isinstance(value, dict) and value:
        key = source.choice(list(value))
        return {**value, key: mutated(source, value[key])}
    if isinstance(value, list) and value:
        at = source.randrange(len(value))
        return [*value[:at], mutated(source, value[at]), *value[at + 1 :]]
    return random_value(source, 3)


def test_whatever_json_a_row_is_what_is_said_is_ours(tmp_path):
    """2,000 rows, random ones and damaged good ones: a record, or a ValueError with file and line in our words."""
    source, path = random.Random(1), tmp_path / "d.jsonl"
    good = {
        "messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "p.png"}]}],
        "id": 1,
    }
    rows = [random_value(source) for _ in range(1000)] + [mutated(source, good) for _ in range(1000)]
    written(path, rows)
    problems = inspect_records(str(path)).problems.found
    assert len(problems) > 1500
    for problem in problems:
        assert problem.where.startswith(f"{path}:")
        assert not any(words in problem.detail for words in PYTHONS_OWN), problem
    found = Problems()
    with contextlib.suppress(ValueError):  # where none is a record
        open_source(str(path), problems=found)
    broken = {p.where for p in problems if p.cause != "duplicate id"}
    assert {p.where for p in found.found} == broken


def test_given_messages_and_places_raise_nothing_else():
    source = random.Random(2)
    for _ in range(1000):
        value = mutated(source, {"prompt": [USER], "completion": [ANSWER]})
        if isinstance(value, dict):
            with contextlib.suppress(NotARecord):
                answer_places(given_messages(value))


# --- parquet and tar -------------------------------------------------------------------------------------------------------


def test_text_in_parquet_that_is_not_utf8_is_named_with_its_row(tmp_path):
    buffers = pyarrow.array(["a", "b ??", "c"])
    raw = bytearray(buffers.buffers()[2].to_pybytes())
    raw[raw.index(b"?")] = 0xFF
    column = pyarrow.StringArray.from_buffers(3, buffers.buffers()[1], pyarrow.py_buffer(bytes(raw)))
    table = pyarrow.table({"prompt": column, "completion": ["x", "y", "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 2: not a record: a text is not UTF-8 \(byte 3 of it is 0xff\)"):
        open_source(str(tmp_path / "a.parquet"))
    found = inspect_records(str(tmp_path / "a.parquet"))
    assert [(p.where.rsplit(":", 1)[1], p.cause) for p in found.problems.found] == [("row 2", "broken text")]
    assert found.num_records == 2


def test_json_columns_of_parquet_are_read(tmp_path):
    """As Hugging Face datasets write messages whose content is sometimes a string and sometimes a list."""
    kind = pyarrow.json_(pyarrow.string())
    contents = [["x", "y"], [[{"type": "text", "text": "a"}], "b"]]
    message = pyarrow.struct([("role", pyarrow.string()), ("content", kind)])
    rows = [[{"role": "user", "content": json.dumps(u)}, {"role": "assistant", "content": json.dumps(a)}] for u, a in contents]
    storage = pyarrow.array(rows, pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])))
    nested = pyarrow.ListArray.from_arrays(
        storage.offsets,
        pyarrow.StructArray.from_arrays(
            [storage.values.field("role"), pyarrow.ExtensionArray.from_storage(kind, storage.values.field("content"))], fields=list(message)
        ),
    )
    whole = pyarrow.ExtensionArray.from_storage(kind, pyarrow.array([json.dumps({"n": 1}), None]))
    pyarrow.parquet.write_table(pyarrow.table({"messages": nested, "answer": whole}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    records = [source.file[i] for i in range(2)]
    assert [(r.prompt.text, r.answer.text, r.columns.get("answer")) for r in records] == [("x", "y", {"n": 1}), ("a", "b", None)]


@pytest.mark.parametrize("kind", ["", "gz"])
def test_cut_and_broken_archives_lose_nothing_silently(tmp_path, kind):
    """tarfile takes the end of a file, and a header that is none, for the end of the archive."""
    whole = as_tar(tmp_path, kind)
    raw, source = whole.read_bytes(), random.Random(0)
    right = inspect_records(str(whole)).num_records
    for number in range(40):
        cut = tmp_path / f"{number}" / whole.name
        cut.parent.mkdir()
        cut.write_bytes(raw[: source.randrange(600, len(raw) - 11_000 if not kind else len(raw) - 1)])
        found = inspect_records(str(cut))
        assert found.num_records < right
        assert found.problems.found, "nothing was said"
        if not kind:
            with pytest.raises(ValueError, match=r"cannot read|does not open|not a record|cannot read image"):
                open_source(str(cut))
    if not kind:
        with tarfile.open(whole) as archive:
            offsets = [member.offset for member in archive][1:]
        for offset in offsets:
            broken = bytearray(raw)
            broken[offset + 150] ^= 0x55  # of its checksum
            whole.write_bytes(broken)
            assert inspect_records(str(whole)).problems.found
            with pytest.raises(ValueError, match=r"no end mark there|no \.json member|does not exist"):
                open_source(str(whole))
        whole.write_bytes(raw + raw)
        with pytest.raises(ValueError, match="several archives in one file"):
            open_source(str(whole))


def tar_of(path: Path, members: list[tuple[str, bytes | str]], mode: str = "w") -> Path:
    """Members with bytes are files; with a text, links to what it names."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = (tarfile.SYMTYPE if name.endswith("txt") else tarfile.LNKTYPE), content
                archive.addfile(info)
    return path


ROW = json.dumps({"messages": [USER, ANSWER]}).encode()


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("a.json", ROW), ("b.json", "a.json")], "b.json is a link"),
        ([("a.json", ROW), ("b.json", ROW), ("b.txt", "c.txt")], "b.txt is a link"),
        ([("a.json", ROW), ("a.json", ROW)], "two members .json"),
        ([("a.json", ROW), ("a.png", b"x"), ("a.PNG", b"y")], "two members .png"),
    ],
)
def test_links_and_doubled_members_are_told(tmp_path, members, told):
    path = tar_of(tmp_path / "a.tar", [("0.json", ROW), *members, ("z.json", ROW)])
    problems = inspect_records(str(path)).problems.found
    assert any(told in problem.detail for problem in problems), problems
    with pytest.raises(ValueError, match=told):
        open_source(str(path))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_packed_archive_whose_sum_is_wrong_is_told(tmp_path, kind):
    path = tar_of(tmp_path / "a.tar.gz", [(f"{i}.json", ROW) for i in range(20)], f"w:{kind}")
    assert inspect_records(str(path)).problems.found == []
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[:-6])
    assert inspect_records(str(path)).problems.found
    if kind == "gz":
        raw[-8] ^= 1  # of the checksum alone
        path.write_bytes(raw)
        (problem,) = inspect_records(str(path)).problems.found
        assert "CRC" in problem.detail
    path.rename(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="has no random access, which training needs"):
        open_source(str(tmp_path / "a.tar"))


def test_what_a_row_rules_out_is_not_trained_by_its_conversion(tmp_path):
    for loss in (0, "false", 1):
        rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, {**ANSWER, "loss": loss}, USER, ANSWER]}]
        report, lines = converted("messages", tmp_path / f"out{loss}", written(tmp_path / "d.jsonl", rows))
        assert len(lines) == 1
        assert report["skipped"] == {"not a record": 1}


def test_decimals_dates_and_times_of_parquet(tmp_path):
    table = pyarrow.table(
        {
            "prompt": ["a", "b"], "completion": ["x", "y"],
            "num_images": pyarrow.array([3, None], pyarrow.decimal128(10, 2)),
            "price": pyarrow.array([decimal.Decimal("1.25"), None], pyarrow.decimal128(10, 2)),
            "day": pyarrow.array([19000, 0], pyarrow.date32()),
            "moment": pyarrow.array([1, 2], pyarrow.timestamp("ns")), "span": pyarrow.array([1, 2], pyarrow.duration("ns")),
            "clock": pyarrow.array([1, 2], pyarrow.time64("ns")),
            "raw": pyarrow.array([b"x", b"y"]),
        }
    )  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    columns = source.file[0].columns
    assert (columns["num_images"], columns["price"], columns["day"]) == (3, 1.25, "2022-01-08")
    assert isinstance(columns["num_images"], int)
    assert "raw" not in source.columns
    assert {"price", "day", "moment", "num_images"} <= source.columns
    late = pyarrow.array([1, 2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["x", "y"], "day": late}), tmp_path / "late.parquet")
    (problem,) = inspect_records(str(tmp_path / "late.parquet")).problems.found
    assert problem.where.endswith("row 2")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("num_images", -1, "a whole number from 0"), ("num_images", 1.5, "a whole number"), ("num_images", "two", "a whole number"),
        ("num_images", True, "a whole number"), ("num_images", [1], "a whole number"), ("ends_with_text", "no", "true or false"),
        ("ends_with_text", 1, "true or false"),
    ],
)  # fmt: skip
def test_columns_that_format_reads_are_checked(tmp_path, name, value, told):
    path = tmp_path / "d.jsonl"
    written(path, [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER], name: value}])
    with pytest.raises(ValueError, match=rf"d\.jsonl:2: not a record: `{name}` is .*; it is {told}"):
        open_source(str(path))
    good = [{"messages": [USER]} | {name: one} for one in (None, math.nan, *((3, 3.0) if name == "num_images" else (True, False)))]
    source = open_source(str(written(path, good)))
    assert [source.file[i].columns[name] for i in range(4)] == [None, None, *((3, 3) if name == "num_images" else (True, False))]


# --- what is left out ------------------------------------------------------------------------------------------------------


def test_broken_rows_are_left_out_up_to_a_share(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": f"{i}" if i % 5 else ""}], "id": f"r{i}"} for i in range(40)]
    name = str(written(tmp_path / "d.jsonl", rows))
    sources = [MixtureSource(name=name)]
    with pytest.raises(ValueError, match=r"d\.jsonl:1: not a record: message 2 \(assistant\) is empty"):
        Mixture(sources, 0)
    with pytest.raises(
        ValueError, match=r"8 of the 40 rows of .* cannot be used, and max_skipped_records: 0\.1: .*d\.jsonl:1 \(id r0\): message"
    ):
        Mixture(sources, 0, max_skipped=0.1)
    mixture = Mixture(sources, 0, max_skipped=0.2)
    assert {r.id for step in range(20) for r in mixture.batch(step, 8)} <= {f"r{i}" for i in range(40) if i % 5}
    assert [line["where"] for line in mixture.left_out()] == [f"{name}:{i}" for i in range(1, 41, 5)]
    assert mixture.sources[0].size == 30  # of 32 records; rows 20 and 40 are for validation


def test_a_row_of_several_answers_is_left_out_once(tmp_path):
    turns = [turn for i in range(4) for turn in (USER, {"role": "assistant", "content": f"{i}"})]
    rows = [{"messages": turns, "id": "many"}, *({"messages": [USER, ANSWER], "id": f"r{i}"} for i in range(9))]
    sources = [MixtureSource(name=str(written(tmp_path / "d.jsonl", rows)))]

    def make(_: int, record: Any) -> str:
        if record.id == "many":
            raise ValueError("too hard")
        return record.id

    mixture = Mixture(sources, 0, max_skipped=0.1)
    assert "many" not in mixture.made(0, 200, make)
    assert len(mixture.left_out()) == 4


def test_what_only_shows_later_takes_the_next_record(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": f"{i}"}], "id": f"r{i}"} for i in range(20)]
    sources = [MixtureSource(name=str(written(tmp_path / "d.jsonl", rows)))]

    def make(place: int, record: Any) -> str:
        if record.id in ("r3", "r4"):
            raise ValueError("too hard")
        return record.id

    plain = [r.id for r in Mixture(sources, 0).batch(0, 60)]
    mixture = Mixture(sources, 0, max_skipped=0.1)
    found = mixture.made(0, 60, make)
    assert found == [{"r3": "r5", "r4": "r5"}.get(id, id) for id in plain]
    assert mixture.made(0, 60, make, [7, 3]) == [found[7], found[3]]
    assert sorted(line["id"] for line in mixture.left_out()) == ["r3", "r4"]
    with pytest.raises(
        ValueError, match=r"1 of the 20 rows .* none may be left out .*d\.jsonl:[45] \(id r[34]\): too hard\. Mend or remove"
    ):
        Mixture(sources, 0).made(0, 60, make)


def test_conversations_stand_in_for_pictures_and_open_none(tmp_path):
    rows = [json.loads(line) for line in messages_file(tmp_path, 3).read_text().splitlines()]
    for row in rows:
        row["messages"][1]["content"].append({"type": "text", "text": "end"})
    path = written(tmp_path / "d.jsonl", rows)
    source = open_source(str(path), split="train")
    read = dict(source.conversations())
    assert sorted(read) == list(range(source.size))
    for index, record in read.items():
        real = source[index]
        assert (record.id, record.where, record.prompt.text, record.answer.text) == (
            real.id,
            real.where,
            real.prompt.text,
            real.answer.text,
        )
        assert len(record.answer.images) == len(real.answer.images) == 1
        assert record.answer.images[0] is STAND_IN
