"""Text files that users write: with or without a mark, UTF-8 or refused by name, by every reader."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from diptych.ablation.suite import load_suite
from diptych.cli import app
from diptych.config import WarmupConfig, load_config
from diptych.data import Problems, open_source
from diptych.data.exclude import Exclusion
from diptych.data.inspect import inspect_records
from diptych.evaluation.benchmark import as_file_name
from diptych.rewards.judges.transcript import read_document
from diptych.userfiles import decode, read_entries, read_json

ROW = {"id": "r0", "messages": [{"role": "user", "content": "x é"}, {"role": "assistant", "content": "y"}]}
RECIPE = "{model: m, output_dir: o, max_steps: 1, optim: {lr: 1}, sources: [{name: a}]}"
SUITE = """{title: t, question: q, paper: p, reference: a, measures: [greedy/score], variants: [{name: a, label: é}]}"""
READERS = {  # name of a file -> its text, and what reads it
    "list.txt": ("r0\nr1\n", lambda path: sorted(Exclusion.load([path], Problems()).ids)),
    "list.json": (json.dumps([{"id": "video_00000001"}]), lambda path: sorted(Exclusion.load([path], Problems()).ids)),
    "list.jsonl": (json.dumps({"id": "video_00000001"}), lambda path: sorted(Exclusion.load([path], Problems()).ids)),
    "rows.jsonl": (json.dumps(ROW, ensure_ascii=False) + "\n", lambda path: open_source(str(path))[0].prompt.text),
    "rows.json": (json.dumps([ROW], ensure_ascii=False), lambda path: open_source(str(path))[0].prompt.text),
    "other.jsonl": (json.dumps({"prompt": "é", "completion": "b"}, ensure_ascii=False), lambda path: open_source(str(path))[0].prompt.text),
    "recipe.yaml": (RECIPE, lambda path: load_config(WarmupConfig, path).model),
    "suite.yaml": (SUITE, lambda path: load_suite(str(path))[1].variants[0].label),
    "answer.json": ('[{"type": "text", "text": "é"}]', lambda path: read_document(path)[1].text),
}


@pytest.fixture(params=READERS)
def reader(request, tmp_path):
    text, read = READERS[request.param]
    return tmp_path / request.param, text, read


def test_a_mark_and_line_ends_change_nothing(reader):
    path, text, read = reader
    path.write_text(text)
    right = read(path)
    assert right
    for mark in (b"", b"\xef\xbb\xbf"):
        for end in ("\n", "\r\n"):
            path.write_bytes(mark + text.replace("\n", end).encode())
            assert read(path) == right


def test_other_encodings_are_refused_by_name(reader):
    path, text, read = reader
    for encoding, told in (("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-16-le", "0x00")):
        path.write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=rf"{path.name}.*({told}).*save it as UTF-8"):
            read(path)
    path.write_bytes(text.replace("r0", "r\xe9").replace("é", "\xe9").replace("video", "vid\xe9o").replace("m,", "\xe9,").encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{path.name}.*byte \d+ is 0xe9, which is not UTF-8"):
        read(path)


def test_the_byte_is_counted_in_the_file():
    for before in (b"", b"abc", b"\xef\xbb\xbfa"):
        with pytest.raises(ValueError, match=rf"f: byte {len(before) + 1} is 0xff, which is not UTF-8"):
            decode(before + b"\xffa", "f")


def test_entries_of_a_list(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa b \r\n\n\tc\u2028d\x0b\re\x85f".encode())
    assert read_entries(path) == ["a b", "c\u2028d", "e\x85f"]  # only line ends part lines


def test_an_exclusion_that_cannot_be_read_stops_the_conversion(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(ROW) + "\n")
    (tmp_path / "list.jsonl").write_text('{"id": "video_00000001"}\n{oops\n')
    for name in ("list.jsonl", "utf16.txt"):
        (tmp_path / "utf16.txt").write_bytes("r0\n".encode("utf-16"))
        command = [
            "data",
            "convert",
            "messages",
            str(tmp_path / "d.jsonl"),
            "--out",
            str(tmp_path / "out"),
            "--exclude",
            str(tmp_path / name),
        ]
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, ValueError)
        assert name in str(result.exception)
        assert not (tmp_path / "out").exists()


def test_ids_of_an_evaluation(tmp_path):
    (tmp_path / "ids").write_bytes("a".encode("utf-16"))
    result = CliRunner().invoke(app, ["evaluate", "mme", str(tmp_path), "--out", str(tmp_path / "out"), "--ids", str(tmp_path / "ids")])
    assert "is UTF-16" in str(result.exception)


def told(read: Callable[[], object]) -> str | None:
    """The ValueError that it raises, if it raises one."""
    try:
        read()
    except ValueError as error:
        return str(error)
    return None


def test_whatever_bytes_a_file_holds_its_place_is_told(tmp_path):
    """1,000 damaged files: a reader gives records or a ValueError that names the file, and nothing of Python's own."""
    source, path = random.Random(0), tmp_path / "rows.jsonl"
    whole = (json.dumps(ROW, ensure_ascii=False) + "\n").encode() * 3
    for _ in range(1000):
        raw = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            place = source.randrange(len(raw))
            raw[place : place + source.randint(0, 3)] = source.randbytes(source.randint(0, 3))
        path.write_bytes(raw)
        for read in (lambda: [open_source(str(path))[i] for i in range(3)], lambda: inspect_records(str(path))):
            said = told(read)
            assert said is None or str(path) in said
            assert "codec" not in (said or "")
            assert "object" not in (said or "").replace("a JSON object", "")


def test_paths_are_in_no_way_special(tmp_path):
    for name in ("[draft]", "a #b", "[/x]", ":x:"):
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir()
        (folder / "d.jsonl").write_text(json.dumps(ROW) + "\n")
        assert open_source(str(folder))[0].id == "r0"
        assert open_source(str(Path(folder) / "d.jsonl"))[0].id == "r0"


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "..", "", "x" * 300, "a\0b"])
def test_names_out_of_published_data_lead_nowhere_else(name):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        as_file_name(name)
    assert as_file_name("task-1_é.2") == "task-1_é.2"


def test_numbers_that_python_will_not_read_are_told_with_their_file(tmp_path):
    (tmp_path / "a.json").write_text("[" + "9" * 5000 + "]")
    with pytest.raises(ValueError, match=r"cannot read .*a\.json: "):
        read_json(tmp_path / "a.json")
