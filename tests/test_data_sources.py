"""Training reads parquet, tar and JSON files where they stand: the same records, in the same order, as after a conversion."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from family_data import picture
from huggingface_hub import constants
from test_data_convert import FORMS, as_bytes, as_json, as_parquet, as_tar, converted, message_rows, messages_file
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import MixtureSource
from diptych.data import Mixture, open_source
from diptych.data.inspect import inspect_records
from diptych.data.records import Source


def parquet_rows(count: int) -> list[dict]:
    rows = []
    for i, row in enumerate(message_rows(count)):
        row["messages"][0]["content"] = [{"type": "text", "text": f"draw {i}"}]
        row["messages"][1]["content"] = [{"type": "image", "text": None}]
        rows.append({**row, "images": [{"bytes": as_bytes(picture(i)), "path": None}]})
    return rows


def shards_of_parquet(folder, count: int = 45):
    """Two files, row groups of four."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = parquet_rows(count)
    for number, part in enumerate((rows[:20], rows[20:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"train-{number}.parquet", row_group_size=4)
    return folder


def same(a, b) -> bool:
    pictures = zip(a.answer.images, b.answer.images, strict=True)
    return (a.id, a.prompt.text) == (b.id, b.prompt.text) and all(
        np.array_equal(np.asarray(x.pixels), np.asarray(y.pixels)) for x, y in pictures
    )


def all_of(source: Source) -> list:
    return [source[i] for i in range(source.size or 0)]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "tar", "trl"])
def test_every_form_gives_the_records_of_its_conversion(tmp_path, form):
    (tmp_path / "in").mkdir()
    file = FORMS[form](tmp_path / "in")
    converted("messages", tmp_path / "out", file)
    for split in ("train", "validation"):
        direct = all_of(open_source(str(file), split=split))
        after = all_of(open_source(str(tmp_path / "out"), split=split))  # the folder of a conversion
        assert len(direct) == len(after) > 0
        assert all(same(a, b) for a, b in zip(direct, after, strict=True))
    assert direct[0].columns["num_images"] == 1


def test_the_mixture_is_that_of_the_conversion(tmp_path):
    """Which record stands where is a function of seed and step, so a run that is resumed reads what it would have read."""
    folder = shards_of_parquet(tmp_path / "in")
    converted("messages", tmp_path / "out", folder)
    names = (str(folder), str(folder / "train-*.parquet"), str(tmp_path / "out" / "records.jsonl"))
    for step in (0, 7):
        batches = [Mixture([MixtureSource(name=name)], seed=3).batch(step, 8) for name in names]
        assert all(same(a, b) and same(a, c) for a, b, c in zip(*batches, strict=True))
    assert open_source(str(folder)).size == 43  # of 45 rows, the 20th and the 40th are for validation
    assert [record.id for record in all_of(open_source(str(folder), split="validation"))] == ["m-19", "m-39"]
    assert open_source(str(folder), 21).size == 20


def test_only_row_groups_and_samples_that_are_used_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.data.rows.PICTURES_CHECKED", 0)
    folder, read = shards_of_parquet(tmp_path / "in"), []
    original = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", lambda self, i, **k: read.append(i) or original(self, i, **k))
    source = open_source(str(folder))
    assert read == []
    assert [source[i].id for i in (5, 4, 6)] == ["m-5", "m-4", "m-6"]
    assert read == [1]  # once for the three
    taken = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(tarfile.TarFile, "extractfile", lambda self, member: taken.append(member.name) or extract(self, member))
    source = open_source(str(as_tar(tmp_path)))
    assert taken == [f"shard/000{i}.json" for i in range(3)]
    assert source[1].id == "m-1"
    assert taken[3:] == ["shard/0001.json", "shard/0001.png"]


def test_conversations_and_folders_of_shards(tmp_path):
    rows = [{"messages": [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]}]
    rows += [{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "b.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "only ß asked"}]}] * 3, ensure_ascii=False, indent=1)
    )
    found = all_of(open_source(str(tmp_path)))
    assert [r.prompt.text for r in found] == [
        "user 0",
        "user 0 assistant 0 user 1",
        "a",
        *["only ß asked"] * 2,
    ]  # the last row is for validation
    assert [r.answer.text if r.answer else None for r in found] == ["assistant 0", "assistant 1", "b", None, None]
    assert found[0].columns["id"] == "a.jsonl:1"


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A data set in the cache of the hub's library, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache" / "datasets--org--name" / "snapshots" / COMMIT


@pytest.mark.parametrize("pattern", ["data/train-*.parquet", "data"])
def test_files_of_the_hub_are_read_at_a_commit(hub_cache, pattern):
    shards_of_parquet(hub_cache / "data")
    (hub_cache / "data" / "README.md").write_text("words")
    found = all_of(open_source(f"hf://datasets/org/name@{COMMIT}/{pattern}"))
    local = all_of(open_source(str(hub_cache / "data")))
    assert len(found) == len(local) == 43
    assert all(same(a, b) for a, b in zip(found, local, strict=True))
    result = CliRunner().invoke(app, ["data", "inspect", f"hf://datasets/org/name@{COMMIT}/{pattern}"])
    assert result.exit_code == 0, result.exception
    assert "45 records, 45 pictures" in " ".join(result.output.split())


def test_addresses_of_the_hub_that_lead_nowhere(hub_cache):
    shards_of_parquet(hub_cache / "data")
    for wrong in ("hf://datasets/org/name/data", "hf://datasets/org/name@main/data", "hf://org/name@" + COMMIT + "/data"):
        with pytest.raises(ValueError, match="the form is hf://datasets/ORG/NAME@COMMIT/PATTERN, COMMIT being the 40 digits"):
            open_source(wrong)
    with pytest.raises(ValueError, match=r"no file of the repository matches 'data/test-\*\.parquet'"):
        open_source(f"hf://datasets/org/name@{COMMIT}/data/test-*.parquet")
    with pytest.raises(ValueError, match=r"the hub did not give 'hf://datasets/org/other@"):
        open_source(f"hf://datasets/org/other@{COMMIT}/data")


def test_only_what_the_pattern_names_is_fetched(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, **options):
        asked.append((repository, options))
        shards_of_parquet(tmp_path / "data")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert len(all_of(open_source(f"hf://datasets/org/name@{COMMIT}/data/train-1.parquet"))) == 24
    patterns = ["data/train-1.parquet", "data/train-1.parquet/*"]
    assert asked == [("org/name", {"repo_type": "dataset", "revision": COMMIT, "allow_patterns": patterns})]


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    for folder in ("tar", "gz", "parquet", "json"):
        (tmp_path / folder).mkdir()
    packed = as_tar(tmp_path / "gz", "gz")
    with pytest.raises(ValueError, match=r"a\.tar\.gz has no random access, which training needs; .*Unpack it"):
        open_source(str(packed))
    with pytest.raises(ValueError, match=r"such as hf://datasets/org/name@COMMIT/data/train-\*\.parquet"):
        open_source("org/name")
    with pytest.raises(ValueError, match=r"'gone\.jsonl' does not exist; give a file or folder of records"):
        open_source("gone.jsonl")
    cut = as_tar(tmp_path / "tar")
    cut.write_bytes(cut.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cannot read .*a\.tar behind shard/0000"):
        open_source(str(cut))
    rows = parquet_rows(3)
    rows[2]["messages"] = rows[2]["messages"][1:]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet" / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet:row 3: not a record: roles are \['assistant'\]"):
        open_source(str(tmp_path / "parquet" / "a.parquet"))
    entries = as_json(tmp_path / "json")
    (tmp_path / "json" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"rows\.json:entry 3: not a record: .*2\.png does not exist"):
        open_source(str(entries))
    entries.write_text('[{"messages": [{"role": "user", "content": "a"}]} {}]')
    with pytest.raises(ValueError, match=r"cannot read .*rows\.json behind entry 1: , or \] is needed, found '\{'"):
        open_source(str(entries))
    whole = as_parquet(tmp_path)
    monkeypatch.setattr("diptych.data.shards.MAX_GROUP_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"row group 1 has \d+ bytes .*at most 1000 are allowed\. Make records of it first: diptych data convert"
    ):
        open_source(str(whole))


def test_json_lines_under_another_name(tmp_path):
    path = messages_file(tmp_path, 3).rename(tmp_path / "rows.json")
    assert [record.id for record in all_of(open_source(str(path)))] == ["m-0", "m-1"]


# --- inspect -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_inspected(tmp_path, form):
    (tmp_path / "in").mkdir()
    file = FORMS[form](tmp_path / "in")
    found = inspect_records(file)
    assert found.problems.by_cause() == {}
    assert (found.num_lines, found.num_records, found.num_images) == (3, 3, [1, 1, 1])
    assert [sample.record.id for sample in found.samples] == ["m-0", "m-1", "m-2"]


def test_problems_in_rows(tmp_path):
    rows = parquet_rows(6)
    rows[1]["images"][0]["bytes"] = b"broken"
    rows[2]["images"] = [{"bytes": None, "path": "gone.png"}]
    rows[3]["images"] = []
    rows[4]["id"] = "m-0"
    rows[5]["messages"][1]["content"].append({"type": "text", "text": ""})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = inspect_records(tmp_path / "a.parquet")
    assert {problem.where.rsplit(" ", 1)[1]: problem.cause for problem in found.problems.found} == {
        "2": "unreadable picture", "3": "missing picture", "4": "not a record", "5": "duplicate id", "6": "empty step",
    }  # fmt: skip
    assert (found.num_lines, found.num_records) == (6, 2)  # the first, and the one whose id stood before


def test_inspecting_what_has_no_rows(tmp_path):
    assert inspect_records(Path("storyboard:interleaved"), max_lines=5).num_records == 5
    (tmp_path / "a.json").write_text('{\n "a": 1\n}\n')
    (problem,) = inspect_records(tmp_path / "a.json").problems.found
    assert (problem.cause, problem.detail) == ("unreadable file", 'a list of records is needed, this is an object ({"a": 1})')
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"no data set that can be read; give a file, or a folder of files, ending in \.jsonl, .*\.parquet"
    ):
        inspect_records(tmp_path / "empty")
