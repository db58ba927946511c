"""Published data sets to records: every layout, every kind of broken input, exclusion, and being killed in the middle."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import av
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pyarrow
import pyarrow.parquet
import pytest
import torch
from family_data import picture
from test_training import warmup_config
from typer.testing import CliRunner

from diptych.cli import app
from diptych.data import Mixture, Problems, open_source
from diptych.data.convert import KINDS, Options, run
from diptych.data.convert.activitynet import events
from diptych.data.convert.job import _Job
from diptych.data.convert.journeydb import caption
from diptych.data.convert.pictures import frame_at
from diptych.data.exclude import Exclusion, dhash
from diptych.data.inspect import inspect_records, summary
from diptych.data.readers import read_rows
from diptych.data.rows import RowFile
from diptych.data.sampling import is_sampled
from diptych.report.records import records_page
from diptych.runs import read_jsonl
from diptych.training.supervised import encode
from diptych.training.warmup import warmup

PUBLISHED = Path(__file__).parent / "data" / "published"


def as_bytes(image: PIL.Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def converted(name: str, out: Path, input: Path, log=None, **changes) -> tuple[dict, list[dict]]:
    """By the command, as users do it; with `log` by the function behind it."""
    if log is not None:
        return run(name, KINDS[name], Options(input, **changes), out, log=log), read_jsonl(out / "records.jsonl")
    command = ["data", "convert", name, str(input), "--out", str(out)]
    for key, value in changes.items():
        option = "--" + key.replace("_", "-")
        values = value if isinstance(value, list | tuple) else [value]
        command += [option] if value is True else [part for one in values for part in (option, str(one))]
    result = CliRunner().invoke(app, command)
    if result.exception is not None:
        raise result.exception
    return json.loads((out / "report.json").read_text()), read_jsonl(out / "records.jsonl")


def texts(line: dict, role: int = 1) -> list[str]:
    return [block.get("text", "*") for block in line["messages"][role]["content"]]


def video(path: Path, seconds: int = 12) -> Path:
    """Four frames a second; in second s all pixels are grey 20 * s, so that a frame says when it was shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(4 * seconds):
            pixels = np.full((48, 64, 3), 20 * (index // 4), dtype=np.uint8)
            pixels[:24, :32] += 15  # some contrast
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def second_of(path: Path) -> int:
    return round(float(np.asarray(PIL.Image.open(path).convert("L"))[30:, 40:].mean()) / 20)


def message_rows(count: int) -> list[dict]:
    return [
        {"id": f"m-{i}", "messages": [{"role": "user", "content": f"draw {i}"},
                                      {"role": "assistant", "content": [{"type": "image", "image": f"{i}.png"}]}]}
        for i in range(count)
    ]  # fmt: skip


def messages_file(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in message_rows(count)))
    return path


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the sources, in their published layouts -------------------------------------------------------------------------------


def test_activitynet(tmp_path):
    video(tmp_path / "videos" / "v_one.mp4")
    video(tmp_path / "videos" / "end.mp4")
    report, lines = converted("activitynet", tmp_path / "out", PUBLISHED / "activitynet.json", media=tmp_path / "videos")
    (line,) = lines
    assert texts(line) == ["A man sets up a tent.", "*", "He hammers the pegs.", "*"]  # in time order, without the repeated and the short
    pictures = [tmp_path / "out" / block["image"] for block in line["messages"][1]["content"] if block["type"] == "image"]
    assert [second_of(p) for p in pictures] == [2, 7]  # the middle of 0-4 and of 6-8
    assert (line["id"], line["source"], line["video_id"]) == ("v_one", "activitynet", "one")
    assert report["skipped"] == {"missing video": 1, "not a record": 1, "too few pictures": 1, "unreadable picture": 1}
    assert {item["id"]: item["cause"] for item in report["items"]} == {
        "v_gone": "missing video", "v_odd": "not a record", "v_short": "too few pictures", "v_end": "unreadable picture",
    }  # fmt: skip


def test_events_by_hand():
    # 0-10 and 1-10 share 9 of 10 seconds (0.9 > 0.7: the later goes); 0-10 and 4-14 share 6 of 14 (stays)
    entry = {"timestamps": [[4, 14], [1, 10], [0, 10]], "sentences": ["c", "b", "a"]}
    assert [s for _, _, s in events(entry)] == ["a", "c"]


def test_events_past_the_end_of_a_video(tmp_path):
    video(tmp_path / "videos" / "v_a.mp4")
    timestamps, sentences = [[0, 4], [6, 8], [10, 30], [20, 25]], ["one", "two", "three", "four"]
    (tmp_path / "a.json").write_text(json.dumps({"v_a": {"duration": 12.0, "timestamps": timestamps, "sentences": sentences}}))
    report, (line,) = converted("activitynet", tmp_path / "out", tmp_path / "a.json", media=tmp_path / "videos")
    assert texts(line)[::2] == ["one", "two", "three"]
    pictures = [tmp_path / "out" / block["image"] for block in line["messages"][1]["content"] if block["type"] == "image"]
    assert [second_of(p) for p in pictures] == [2, 7, 11]  # the third is cut at 12
    assert [(item["where"], item["cause"]) for item in report["items"]] == [(f"{tmp_path / 'a.json'}:v_a:event 4", "event past the end")]


def test_frames_of_a_video(tmp_path):
    path = video(tmp_path / "a.mp4", seconds=6)
    for seconds in (0.0, 2.6, 5.9):
        assert round(float(np.asarray(frame_at(path, seconds).convert("L"))[30:, 40:].mean()) / 20) == int(seconds)
    with pytest.raises(ValueError, match=r"a\.mp4 ends before second 9"):
        frame_at(path, 9)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be read"):
        frame_at(path, 1)


def test_genhowto(tmp_path):
    video(tmp_path / "videos" / "one.mp4")
    report, lines = converted("genhowto", tmp_path / "out", PUBLISHED / "actions.heldout.txt", media=tmp_path / "videos")
    (line,) = lines
    assert texts(line) == ["a person slicing an apple", "*", "sliced apples on a plate", "*"]  # the better of its two triplets
    shown = [block["image"] for message in line["messages"] for block in message["content"] if block["type"] == "image"]
    assert [second_of(tmp_path / "out" / name) for name in shown] == [2, 5, 9]  # initial, action, final
    assert "apple" in texts(line, 0)[1]
    assert report["skipped"] == {"another triplet of the video is better": 1, "broken line": 1, "missing video": 1, "no final state": 1}
    with pytest.raises(ValueError, match=r"give actions.SPLIT.txt, with states.SPLIT.txt beside it"):
        converted("genhowto", tmp_path / "other", PUBLISHED / "states.heldout.txt", media=tmp_path / "videos")


def test_openstory(tmp_path):
    keys = [f"abcdefghijk_keyframe_00-00-0{i}-000" for i in range(7)]
    rows = [{"__key__": key, "video_id": "abcdefghijk", "time_stamp": key[-12:], "png": b"mask", "json": {"caption": f"part {i}"}}
            for i, key in enumerate(keys)]  # fmt: skip
    rows[5]["__key__"] = f"{keys[4]}_override_{keys[5]}"
    rows += [{**rows[0], "__key__": "kkkkkkkkkkk_keyframe_00-00-01-000", "video_id": "kkkkkkkkkkk", "json": {"caption": " "}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), tmp_path / "story-0.parquet")
    frames = tmp_path / "frames" / "abcdefghijk"
    frames.mkdir(parents=True)
    for i in (0, 1, 2, 4, 6):
        picture(i).save(frames / f"{keys[i]}.jpg")
    report, lines = converted("openstory", tmp_path / "out", tmp_path, media=tmp_path / "frames", max_images=3)
    (line,) = lines
    assert texts(line) == ["part 0", "*", "part 1", "*", "part 2", "*"]  # in the order of time, not of the file
    assert report["skipped"] == {"too few pictures": 2, "annotation of another frame": 1, "missing picture": 1, "not a record": 1}


def test_openstory_windows_span_no_missing_frame(tmp_path):
    keys = [f"abcdefghijk_keyframe_00-00-{i:02}-000" for i in range(12)]
    rows = [{"__key__": key, "video_id": "abcdefghijk", "time_stamp": key[-12:], "json": {"caption": "" if i == 8 else f"c{i}"}}
            for i, key in enumerate(keys)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "story-0.parquet")
    (tmp_path / "frames").mkdir()
    for i in set(range(12)) - {2, 3}:
        picture(i).save(tmp_path / "frames" / f"{keys[i]}.jpg")
    report, lines = converted("openstory", tmp_path / "out", tmp_path, media=tmp_path / "frames")
    # c0 c1 | c4 c5 c6 c7 | c9 c10 c11: without frames 2 and 3, and without a caption of 8
    assert [texts(line)[::2] for line in lines] == [["c4", "c5", "c6", "c7"], ["c9", "c10", "c11"]]
    assert report["skipped"] == {"missing picture": 2, "too few pictures": 2, "not a record": 1}


@pytest.mark.parametrize("packed", [False, True])
def test_journeydb(tmp_path, packed):
    split = tmp_path / "train"
    for name, seed in (("000/a.jpg", 0), ("000/b.jpg", 1), ("001/c.jpg", 2)):
        (split / "imgs" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(split / "imgs" / name)
    shutil.copy(PUBLISHED / "train_anno_realease_repath.jsonl", split)
    if packed:
        for path in (split / "imgs" / "000", split / "imgs" / "001", split / "train_anno_realease_repath.jsonl"):
            with tarfile.open(f"{path}.tgz", "w:gz") as archive:
                archive.add(path, arcname=path.name)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    report, lines = converted("journeydb", tmp_path / "out", split)
    assert [texts(line, 0) for line in lines] == [["A red fox in the snow."], ["a small house"], ["A boat."]]
    assert all(texts(line) == ["*"] and line["license"].startswith("JourneyDB terms") for line in lines)
    assert report["skipped"] == {"broken line": 1, "duplicate id": 1, "missing picture": 1, "not a record": 1}


def test_captions_of_journeydb():
    assert caption({"prompt": "<https://s.mj.run/ab> a fox,  red --ar 3:2 --stylize 500 --v 4"}) == "a fox, red"
    assert caption({"prompt": "x", "Task2": {"Caption": "A fox."}}) == "A fox."
    assert caption({"prompt": "a well-known -- almost --- road 3:2"}) == "a well-known -- almost --- road 3:2"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a beach --no people --ar 3:2", "a beach"),  # what follows `no` is not in the picture
        ("a beach --style raw", "a beach"),
        ("a beach —ar 16:9", "a beach"),
        ("a beach, at dusk –v4", "a beach, at dusk"),
        ("a beach--AR 3:2", "a beach"),
        ("--v 5 a beach", None),
        ("a fox::2 snow:: , night", "a fox snow, night"),
        ("a beach::2 people::-0.5", "a beach"),  # a negative weight is Midjourney's other way of saying no
        ("a well -known, half-timbered - and old - house", "a well -known, half-timbered - and old - house"),
        ("a tree — no leaves", "a tree — no leaves"),
        ("a tree --nothing else", "a tree --nothing else"),  # no flag of theirs
        ("a road—no end", "a road—no end"),
    ],
)
def test_flags_end_a_prompt(prompt, text):
    if text is None:
        with pytest.raises(ValueError, match="neither a caption nor a prompt"):
            caption({"prompt": prompt})
    else:
        assert caption({"prompt": prompt}) == text


def test_emova(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "kettles").mkdir()
    shutil.copy(PUBLISHED / "emova.json", tmp_path / "annotations" / "kettles.json")
    picture(0).save(tmp_path / "kettles" / "0.png")
    (tmp_path / "kettles" / "broken.png").write_bytes(as_bytes(picture(1))[:200])
    report, lines = converted("emova", tmp_path / "out", tmp_path / "annotations" / "kettles.json")
    (line,) = lines
    assert [texts(line, i) for i in range(4)] == [["*", "What is this?"], ["A kettle."], ["Is it hot?"], ["Yes."]]
    assert report["skipped"] == dict.fromkeys(["missing picture", "no picture", "not a record", "speech", "unreadable picture"], 1)


def test_emova_subsets_that_count_alike(tmp_path):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
    picture(0).save(tmp_path / "0.png")
    for subset in ("cats", "dogs"):
        (tmp_path / "annotations" / f"{subset}.json").parent.mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"{subset}.json").write_text(json.dumps([{"id": "0", "image": "0.png", "conversations": turns}]))
    report, lines = converted("emova", tmp_path / "out", tmp_path / "annotations")
    assert ([line["id"] for line in lines], report["skipped"]) == (["cats/0", "dogs/0"], {})


def test_emova_from_the_hub(tmp_path):
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"id": "p-0", "image": {"bytes": as_bytes(picture(0), "JPEG"), "path": None}, "conversations": turns}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    _, (line,) = converted("emova", tmp_path / "out", tmp_path / "a.parquet")
    assert texts(line, 0) == ["*", "What is it?"]  # no mark says where the picture stands: before the question
    (file,) = (tmp_path / "out" / "images").rglob("*.jpg")
    assert file.read_bytes() == rows[0]["image"]["bytes"]  # not encoded again


def test_vist(tmp_path):
    for photo in (100, 101, 102):
        picture(photo).save(tmp_path / f"{photo}.png")
    report, (line,) = converted("vist", tmp_path / "out", PUBLISHED / "train.story-in-sequence.json", media=tmp_path)
    assert texts(line) == ["We met.", "*", "Tom was late.", "*"]
    assert report["skipped"] == {"missing picture": 1, "not a record": 1}


def test_numbers_of_pictures_hold_for_every_kind(tmp_path):
    for photo in (100, 101, 102):
        picture(photo).save(tmp_path / f"{photo}.png")
    story = PUBLISHED / "train.story-in-sequence.json"  # one of its stories is whole, and has two pictures
    for name, limits, cause in (("few", {"min_images": 3}, "too few pictures"), ("many", {"max_images": 1}, "too many pictures")):
        with pytest.raises(ValueError, match=rf"nothing of .* was kept; skipped: .*'{cause}': 1"):
            converted("vist", tmp_path / name, story, media=tmp_path, **limits)
    rows = messages_file(tmp_path / "in", 2).read_text().splitlines()
    two = json.loads(rows[1])
    two["messages"][1]["content"] *= 8
    (tmp_path / "in" / "rows.jsonl").write_text(f"{rows[0]}\n{json.dumps(two)}\n")
    for limits, kept in (({}, ["m-0", "m-1"]), ({"min_images": 2}, ["m-1"]), ({"max_images": 7}, ["m-0"])):
        _, lines = converted("messages", tmp_path / f"out-{len(kept)}-{kept[0]}", tmp_path / "in" / "rows.jsonl", **limits)
        assert [line["id"] for line in lines] == kept


def test_stories_with_an_empty_sentence(tmp_path):
    for photo in (100, 101, 102):
        picture(photo).save(tmp_path / f"{photo}.png")
    story = tmp_path / "story.json"
    story.write_text((PUBLISHED / "train.story-in-sequence.json").read_text().replace("Tom was late.", " "))
    with pytest.raises(ValueError, match=r"nothing of .* was kept; skipped: .*'empty step': 1"):
        converted("vist", tmp_path / "out", story, media=tmp_path)


def test_comm(tmp_path):
    def step(text: str, *names: str) -> list[dict]:
        return [{"type": "text", "content": text}, *({"type": "image", "image_path": n, "url": f"http://x/{n}"} for n in names)]

    def item(id: str, title: str | None, *steps: list[dict]) -> dict:
        return {"data_id": id, "dataset_type": "wikihow", "title": title, "summary_info": [], "step_info": list(steps)}

    items = [
        item("c1", "Fold a boat", step(" Fold\n it. ", "a.png"), step("Turn it.", "b.png", "a.png"), step("Swim.", "b.png")),
        item("c2", None, step("?", "a.png")),
        item("c3", "Talk", step("Talk.")),
    ]
    torch.save(items, tmp_path / "train_data.pth")
    for seed, name in enumerate(("a.png", "b.png")):
        picture(seed).save(tmp_path / name)
    report, (line,) = converted("comm", tmp_path / "out", tmp_path / "train_data.pth", media=tmp_path, max_images=3)
    assert texts(line) == ["Fold it.", "*", "Turn it.", "*", "*"]  # whole steps, at most three pictures
    assert texts(line, 0) == ["Explain step by step, with pictures: Fold a boat"]
    assert report["skipped"] == {"not a record": 1, "too few pictures": 1}
    (tmp_path / "bad.pth").write_bytes(b"no torch file")
    with pytest.raises(ValueError, match=r"cannot read .*bad.pth"):
        converted("comm", tmp_path / "other", tmp_path / "bad.pth", media=tmp_path)


# --- messages in every format ----------------------------------------------------------------------------------------------


def as_parquet(folder: Path) -> Path:
    rows = []
    for i in range(3):
        asked = {"role": "user", "content": [{"type": "text", "text": f"draw {i}"}]}
        told = {"role": "assistant", "content": [{"type": "image", "text": None}]}
        rows.append({"id": f"m-{i}", "images": [{"bytes": as_bytes(picture(i)), "path": f"{i}.png"}], "messages": [asked, told]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def as_tar(folder: Path, packed: str = "") -> Path:
    path = folder / ("a.tar" + (".gz" if packed else ""))
    with tarfile.open(path, f"w:{packed}") as archive:
        for i, row in enumerate(message_rows(3)):
            row["messages"][1]["content"][0]["image"] = "png"
            for ending, content in (("json", json.dumps(row).encode()), ("png", as_bytes(picture(i)))):
                member = tarfile.TarInfo(f"shard/{i:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def as_json(folder: Path) -> Path:
    messages_file(folder, 3)
    (folder / "rows.json").write_text(json.dumps(message_rows(3)))
    (folder / "rows.jsonl").unlink()
    return folder / "rows.json"


def as_trl(folder: Path) -> Path:
    path = messages_file(folder, 3)
    told = [{"role": "assistant", "content": [{"type": "image"}]}]
    rows = [{"id": f"m-{i}", "prompt": f"draw {i}", "completion": told, "image": f"{i}.png"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FORMS = {
    "jsonl": lambda folder: messages_file(folder, 3), "json": as_json, "parquet": as_parquet, "tar": as_tar,
    "tar.gz": lambda folder: as_tar(folder, "gz"), "trl": as_trl,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_messages_in_every_format(tmp_path, form):
    (tmp_path / "in").mkdir()
    report, lines = converted("messages", tmp_path / "out", FORMS[form](tmp_path / "in"))
    assert (report["kept"], report["images"], report["skipped"]) == (3, 3, {})
    file = RowFile([tmp_path / "out" / "records.jsonl"], "rows")
    for i in range(3):
        assert file[i].prompt.text == f"draw {i}"
        assert np.array_equal(np.asarray(file[i].answer.images[0].pixels), np.asarray(picture(i)))
        assert file[i].id == f"m-{i}"
    assert [line["id"] for line in lines] == ["m-0", "m-1", "m-2"]


def test_pictures_in_every_form(tmp_path):
    picture(0).save(tmp_path / "0.png")
    address = "data:image/png;base64," + base64.b64encode(as_bytes(picture(1))).decode()
    blocks = [
        {"type": "image", "image": {"bytes": None, "path": "0.png"}}, {"type": "image", "image": address},
        {"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": "which?"},
    ]  # fmt: skip
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "one", "loss": False},
                {"role": "user", "content": "and now?"}, {"role": "assistant", "content": "two"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages, "id": None, "license": "mit", "topic": "cats"}) + "\n")
    _, (line,) = converted("messages", tmp_path / "out", tmp_path / "a.jsonl")
    assert texts(line, 0) == ["*", "*", "*", "which?"]
    assert (line["id"], line["license"], line["topic"]) == ("a.jsonl:1", "mit", "cats")
    file = RowFile([tmp_path / "out" / "records.jsonl"], "rows")
    assert [file[i].answer.text for i in range(len(file))] == ["two"]  # the flag is kept
    assert len(list((tmp_path / "out" / "images").rglob("*.*"))) == 2  # the same picture is stored once
    assert np.array_equal(np.asarray(file[0].prompt.images[0].pixels), np.asarray(picture(0)))


def test_broken_rows_are_named_counted_and_skipped(tmp_path):
    path = messages_file(tmp_path / "in", 5)
    (tmp_path / "in" / "3.png").unlink()
    (tmp_path / "in" / "4.png").write_bytes(as_bytes(picture(4))[:-40])  # cut off
    rows = path.read_text().splitlines()
    user = {"role": "user", "content": "x"}
    rows += [
        '{"messages": oops}', "[1, 2]", rows[0], json.dumps({"id": "a", "messages": [user, user]}), json.dumps({"id": "b", "text": "x"}),
        json.dumps({"id": "c", "messages": [user, {"role": "assistant", "content": " "}]}),
        json.dumps({"id": "d", "messages": [{"role": "user", "content": [{"type": "image", "image": "https://x/a.png"}]}]}),
        json.dumps({"id": "e", "messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}),
        json.dumps({"id": "f", "images": ["0.png"], "messages": [user]}),
    ]  # fmt: skip
    path.write_bytes("\n".join(rows).encode() + b'\n{"id": "\xff"}\n')
    report, lines = converted("messages", tmp_path / "out", path)
    assert [line["id"] for line in lines] == ["m-0", "m-1", "m-2"]
    found = {int(item["where"].rsplit(":", 1)[1]): item["cause"] for item in report["items"]}
    assert found == {
        4: "missing picture", 5: "unreadable picture", 6: "broken line", 7: "broken line", 8: "duplicate id", 9: "not a record",
        10: "not a record", 11: "empty message", 12: "not a record", 13: "not a record", 14: "not a record", 15: "broken line",
    }  # fmt: skip
    assert sum(report["skipped"].values()) == 12
    with pytest.raises(ValueError, match=r"rows.jsonl:4: missing picture: .*3.png does not exist \(--strict stops"):
        converted("messages", tmp_path / "strict", path, strict=True)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize("form", ["tar", "tar.gz", "parquet"])
def test_files_that_are_cut_off(tmp_path, form):
    path = FORMS[form](tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    problems = Problems()
    rows = list(read_rows(path, problems))
    assert len(rows) < 3
    (problem,) = [p for p in problems.found if p.cause == "unreadable file"]
    assert path.name in problem.where
    with pytest.raises(ValueError, match="unreadable file"):
        list(read_rows(path, Problems(strict=True)))


def test_a_sample_without_json_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x/1.png"))
    problems = Problems()
    assert not list(read_rows(tmp_path / "a.tar", problems))
    assert (problems.found[0].where, problems.found[0].cause) == (f"{tmp_path}/a.tar:x/1", "broken line")


def test_input_that_is_none(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    for input, message in ((tmp_path / "gone", "does not exist"), (tmp_path / "a.csv", r"no data set that can be read; .*\.parquet")):
        with pytest.raises(ValueError, match=message):
            converted("messages", tmp_path / "out", input)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"nothing of .* was kept"):
        converted("messages", tmp_path / "out", tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="--media is nothing; this kind needs the folder of the videos"):
        converted("activitynet", tmp_path / "out", PUBLISHED / "activitynet.json")
    path = messages_file(tmp_path / "in", 1)
    converted("messages", tmp_path / "done", path)
    with pytest.raises(ValueError, match="exists and is not the result of this command"):
        converted("messages", tmp_path / "done", path, image_size=16)


# --- nothing is lost, nothing is half-written --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from diptych.data.convert import KINDS, Options, job, run
job.CHECKPOINT_RECORDS = 7
write, count = job._Job._write_picture, 0
def deadly(self, path, raw):
    global count
    count += 1
    if count == int(sys.argv[3]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".tmp-{path.name}").write_bytes(raw[:50])
        self.records.write(b'{"messages": [{"ro'); self.records.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, path, raw)
job._Job._write_picture = deadly
run("messages", KINDS["messages"], Options(Path(sys.argv[1])), Path(sys.argv[2]), log=print)
"""


def test_killed_again_and_again_gives_the_same_bytes(tmp_path):
    path = messages_file(tmp_path / "in", 30)
    (tmp_path / "in" / "11.png").unlink()
    path.write_text("broken first\n" + path.read_text().replace('{"id": "m-4"', "{", 1) + "broken\n")
    converted("messages", tmp_path / "whole", path)
    out, said = tmp_path / "out", []
    for after in ("10", "12"):  # pictures written before the process is killed
        done = subprocess.run([sys.executable, "-c", KILLED, path, out, after], capture_output=True, text=True, timeout=60, check=False)
        said.append(done.stdout.strip())
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists()  # all or nothing
    converted("messages", out, path, log=said.append)
    # checkpoints are after every 7 items, of which m-11's picture is missing: killed at items 10 and 19
    assert said == ["", "going on behind 7 items, 7 of them kept", "going on behind 14 items, 13 of them kept"]
    assert tree(out) == tree(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_record_that_was_skipped_blocks_no_other(tmp_path, monkeypatch):
    path = messages_file(tmp_path / "in", 4)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["messages"][1]["content"][0]["image"] = "gone.png"
    for row in rows:
        row["id"] = "a"
    rows.append({**rows[3], "id": "b"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report, lines = converted("messages", tmp_path / "out", path)
    assert [(line["id"], line["messages"][0]["content"][0]["text"]) for line in lines] == [("a", "draw 1"), ("b", "draw 3")]
    assert [item["cause"] for item in report["items"]] == ["missing picture", "duplicate id", "duplicate id"]
    assert all(item["detail"] == f"a stood in {path}:2" for item in report["items"][1:])
    monkeypatch.setattr("diptych.data.convert.job.CHECKPOINT_RECORDS", 1)
    with monkeypatch.context() as patch:  # stopped at every place, and gone on with
        for _ in range(6):
            patch.setattr("diptych.data.convert.job._Job._checkpoint", stopping(_Job._checkpoint))
            with contextlib.suppress(KeyboardInterrupt):
                converted("messages", tmp_path / "again", path, log=print)
    converted("messages", tmp_path / "again", path)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def stopping(checkpoint):
    def then_stop(self, done=False):
        checkpoint(self, done)
        if not done:
            raise KeyboardInterrupt

    return then_stop


def test_a_second_run_is_the_same_and_does_nothing(tmp_path):
    path = messages_file(tmp_path / "in", 4)
    converted("messages", tmp_path / "a", path)
    before, said = tree(tmp_path / "a"), []
    converted("messages", tmp_path / "a", path, log=said.append)
    converted("messages", tmp_path / "b", path)
    assert said == [f"{tmp_path / 'a'} is finished already"]
    assert tree(tmp_path / "a") == before == tree(tmp_path / "b")


def test_another_command_starts_over(tmp_path):
    path = messages_file(tmp_path / "in", 4)
    (tmp_path / "in" / "2.png").unlink()
    with pytest.raises(ValueError, match="missing picture"):
        converted("messages", tmp_path / "out", path, strict=True)
    said: list[str] = []
    _, lines = converted("messages", tmp_path / "out", path, image_size=16, log=said.append)
    assert "starting over" in said[0]
    assert {PIL.Image.open(tmp_path / "out" / line["messages"][1]["content"][0]["image"]).size for line in lines} == {(16, 16)}
    assert len(list((tmp_path / "out" / "images").rglob("*.*"))) == 3


def test_full_disk(tmp_path, monkeypatch):
    path = messages_file(tmp_path / "in", 4)
    original = Path.write_bytes

    def full(self, raw):
        if self.name.startswith(".tmp-") and len(list((tmp_path / "out.partial").rglob("*.png"))) == 2:
            original(self, raw[:10])
            raise OSError(28, "No space left on device")
        return original(self, raw)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"no space left .* run the same command again: it resumes"):
        converted("messages", tmp_path / "out", path)
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").rglob(".tmp-*"))
    monkeypatch.undo()
    said: list[str] = []
    report, _ = converted("messages", tmp_path / "out", path, log=said.append)
    assert report["kept"] == 4
    assert said == ["going on behind 0 items, 0 of them kept"]  # and does not take itself for another command


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    path = messages_file(tmp_path / "in", 2)
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    (tmp_path / "out.partial").mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "out.partial" / "lock"], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process is converting"):
            converted("messages", tmp_path / "out", path)
    finally:
        other.kill()
        other.wait()
    assert converted("messages", tmp_path / "out", path)[0]["kept"] == 2


def test_shares_are_fixed_and_nested(tmp_path):
    path = messages_file(tmp_path / "in", 30)
    half, _ = converted("messages", tmp_path / "half", path, share=0.5, seed=1)
    kept = {line["id"] for line in read_jsonl(tmp_path / "half" / "records.jsonl")}
    assert kept == {f"m-{i}" for i in range(30) if is_sampled(f"m-{i}", 0.5, 1)}
    assert half["not_sampled"] == 30 - len(kept)
    assert {i for i in range(1000) if is_sampled(str(i), 0.2, 1)} <= {i for i in range(1000) if is_sampled(str(i), 0.3, 1)}
    assert abs(sum(is_sampled(str(i), 0.3, 2) for i in range(10_000)) - 3000) < 150  # 3 standard deviations: 137
    report, _ = converted("messages", tmp_path / "few", path, max_records=4)
    assert report["kept"] == 4


# --- exclusion ---------------------------------------------------------------------------------------------------------------


def test_dhash_by_hand():
    # 9 x 8 pixels, so that nothing is resized: falling to the right everywhere but in the last row, which rises
    pixels = np.tile(np.arange(90, 0, -10, dtype=np.uint8), (8, 1))
    pixels[7] = pixels[7, ::-1]
    assert dhash(PIL.Image.fromarray(pixels)) == 0xFFFFFFFFFFFFFF00
    assert dhash(PIL.Image.new("RGB", (50, 50), "red")) is None  # nothing to compare


def changed(image: PIL.Image.Image) -> list[PIL.Image.Image]:
    return [
        image.resize((256, 256)), PIL.Image.open(io.BytesIO(as_bytes(image, "JPEG"))), PIL.ImageEnhance.Brightness(image).enhance(0.7),
        image.resize((30, 40)),
    ]  # fmt: skip


def test_dhash_knows_a_picture_again_and_no_other():
    seen = [picture(i, 120, 150) for i in range(40)]
    values = [dhash(image) for image in seen]
    for image, value in zip(seen[:10], values, strict=False):
        for other in changed(image):
            assert (dhash(other) ^ value).bit_count() <= 4
    distances = [(a ^ b).bit_count() for i, a in enumerate(values) for b in values[:i]]
    assert min(distances) > 4


def test_exclusion_by_id_and_by_picture(tmp_path):
    path = messages_file(tmp_path / "in", 8)
    bench = tmp_path / "bench"
    (bench / "images").mkdir(parents=True)
    (bench / "data.json").write_text(json.dumps([{"id": "m-1", "question": [{"text": "x", "image": "images/0.png"}]}]))
    (bench / "more.txt").write_text("m-2\n\n")
    picture(5).resize((300, 390)).save(bench / "images" / "0.jpg")
    side = min(picture(6).size)
    picture(6).crop((0, 6, side, 6 + side)).resize((256, 256)).save(bench / "images" / "1.png")  # the central square
    (bench / "images" / "2.png").write_bytes(b"broken")
    report, lines = converted("messages", tmp_path / "out", path, exclude=[bench])
    assert [line["id"] for line in lines] == ["m-0", "m-3", "m-4", "m-7"]
    assert report["skipped"] == {"excluded": 4}
    assert report["exclusion_problems"] == {"exclusion not read": 1}
    assert report["excluded_ids"] == 2
    (tmp_path / "nothing").mkdir()
    for wrong, message in (("nothing", "holds no ids and no pictures"), ("gone", "does not exist")):
        with pytest.raises(ValueError, match=message):
            converted("messages", tmp_path / "other", path, exclude=[tmp_path / wrong])


def test_exclusion_of_videos(tmp_path):
    video(tmp_path / "videos" / "v_one.mp4")
    (tmp_path / "val.json").write_text(json.dumps({"v_one": {"timestamps": [], "sentences": []}}))
    with pytest.raises(ValueError, match=r"nothing of .* was kept; skipped: .*'excluded': 1"):
        converted(
            "activitynet", tmp_path / "out", PUBLISHED / "activitynet.json", media=tmp_path / "videos", exclude=[tmp_path / "val.json"]
        )
    assert Exclusion({("", "one")}).reason("activitynet", ("v_one", "one"), ()) == "id one is in the exclusion list"


INTERLEAVEDBENCH = [
    {"id": "wikihow_next_step_0_000123", "image": ["wiki_images_test/000124_0_0.png"], "task_name": "wikihow_next_step",
     "conversations": [{"from": "human", "value": "Continue. <image>"}]},
    {"id": "activity_5", "image": ["activity/v_abc_1.png", "activity/v_-1_4567890_2/12.jpg"], "task_name": "activity_generation"},
    {"id": "storytelling_9", "image": ["vist/4567890.jpg", "images/881.png"], "task_name": "storytelling_generation"},
]  # fmt: skip
OPENING = [{"total_uid": "0901007", "meta_task_id": "9", "subtask_id": "1", "data_id": "7", "conversations": [
    {"output": [{"image": "0901007-o-0.jpg", "text": "Mix."}, {"image": "1.jpg", "text": None}]}]}]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "id", "excluded"),
    [
        ("wikihow", "000123", True),  # the article, as the record's id says
        ("wikihow", "123", True),
        ("wikihow", "000124", True),  # the article, as the picture's name says
        ("wikihow", "000124_0_0", True),
        ("wikihow", "000124_0_0.png", True),
        ("wikihow", "000125", False),
        ("messages", "000123", False),  # a number of another data set
        ("messages", "wikihow_next_step_0_000123", True),
        ("activitynet", "v_abc", True),
        ("activitynet", "v_-1_4567890", True),  # numbers in YouTube's own ids
        ("openstory", "-1_4567890", True),  # the same video in another data set
        ("activitynet", "v_abcd", False),
        ("vist", "4567890", True),  # a photograph
        ("emova", "4567890", False),
        ("vist", "881", False),
        ("vist", "7", False),  # OpenING's `data_id`
        ("messages", "7", False),
        ("messages", "1", False),
        ("comm", "0901007-o-0", True),
    ],
)
def test_what_benchmarks_say_of_their_sources(tmp_path, source, id, excluded):
    (tmp_path / "interleaved_bench.json").write_text(json.dumps(INTERLEAVEDBENCH))
    (tmp_path / "test_data.jsonl").write_text(json.dumps(OPENING[0]) + "\n")
    exclusion = Exclusion.load([tmp_path], Problems())
    assert (exclusion.reason(source, [id], ()) is not None) == excluded


def test_names_of_a_benchmarks_pictures(tmp_path):
    """Where its lists say nothing, a benchmark's picture files do."""
    for name in ("wiki_images_test/000123_0_0.png", "v_abc/7.png", "3.png", "image_4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (9, 9)).save(tmp_path / name)
    assert Exclusion.load([tmp_path], Problems()).ids == {
        ("wikihow", "000123_0_0.png"), ("wikihow", "000123_0_0"), ("wikihow", "000123"), ("wikihow", "123"), ("", "v_abc"), ("", "abc"),
    }  # fmt: skip


def test_numbers_name_their_source(tmp_path):
    """Records of ours, a list that is keyed, and a list of the user's: a number counts where its source is known, or the user says it."""
    lists = {"records.jsonl": '{"source": "emova", "id": "12"}', "keyed.json": '{"5": {"story_id": "6"}}', "own.txt": "33\n"}
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
    assert Exclusion.load([tmp_path], Problems()).ids == {("emova", "12"), ("vist", "6"), ("", "33")}


# --- records -----------------------------------------------------------------------------------------------------------------


def conversation(path: Path, loss: bool | None) -> Path:
    flag = {} if loss is None else {"loss": loss}
    messages = [
        {"role": "system", "content": "be brief ."}, {"role": "user", "content": "one"}, {"role": "assistant", "content": "two", **flag},
        {"role": "user", "content": "three"}, {"role": "assistant", "content": "four"},
    ]  # fmt: skip
    path.write_text(json.dumps({"messages": messages, "id": "c", "source": "chats", "license": "mit"}) + "\n")
    return path


def test_each_trained_answer_is_a_record(tmp_path):
    both = RowFile([conversation(tmp_path / "a.jsonl", None)], "rows")
    assert [(r.prompt.text, r.answer.text) for r in (both[0], both[1])] == [("be brief . one", "two"), ("be brief . one two three", "four")]
    assert (both[0].id, both[0].source, both[0].license) == ("c", "chats", "mit")
    assert both.lines.tolist() == [0, 0]  # one line: never on both sides of the split
    last = RowFile([conversation(tmp_path / "b.jsonl", False)], "rows")
    assert [last[i].answer.text for i in range(len(last))] == ["four"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}], "no answer is trained"),
        ([{"role": "user", "content": "a", "loss": True}], "`loss` is True at a user message"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": 1}], "true or false"),
        ([{"role": "assistant", "content": "b"}], r"roles are \['assistant'\]"),
        ([{"role": "user", "content": [{"type": "image", "image": "gone.png"}]}], r"gone\.png does not exist"),
    ],
)
def test_lines_that_are_no_records(tmp_path, messages, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: not a record: .*{message}"):
        open_source(str(tmp_path / "a.jsonl"))


def test_old_files_split_as_before(tmp_path):
    """Which records are for training, and which record a place has, must not change under runs that are resumed."""
    path = tmp_path / "a.jsonl"
    for count in (1, 2, 19, 20, 45):
        path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": str(i)}]}) + "\n\n" for i in range(count)))
        names = [str(i) for i in range(count)]
        train = [n for i, n in enumerate(names) if i % 20 != 19] if count >= 20 else names[: max(1, count - 1)]
        held_out = names[19::20] or names[-1:]
        for split, expected in (("train", train), ("validation", held_out)):
            source = open_source(str(path), split=split)
            assert [source[i].prompt.text for i in range(len(expected) + 1)] == [*expected, expected[0]]
            assert source.size == len(expected)
    assert open_source(str(path), 30).size == 29


def test_missing_pictures_far_down_are_found_when_the_file_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.data.rows.PICTURES_CHECKED", 2)
    path = messages_file(tmp_path, 6)
    (tmp_path / "5.png").write_bytes(b"broken")
    file = RowFile([path], "rows")
    with pytest.raises(ValueError, match=r"rows.jsonl:6: not a record: .*5\.png"):
        file[5]
    (tmp_path / "4.png").unlink()
    with pytest.raises(ValueError, match=r"rows.jsonl:5: not a record: .*4\.png does not exist"):
        RowFile([path], "rows")


def storyboard_records(tmp_path: Path) -> Path:
    """Documents in the tiny model's own words, through the converter."""
    source, folder = open_source("storyboard:interleaved", 24), tmp_path / "in"
    folder.mkdir()
    lines = []
    for index in range(24):
        record = source[index]
        parts = []
        for document, role in ((record.prompt, "user"), (record.answer, "assistant")):
            blocks = document.to_blocks()
            for place, block in enumerate(blocks):
                if block["type"] == "image":
                    name = f"{index}-{role}-{place}.png"
                    block["image"].save(folder / name)
                    blocks[place] = {"type": "image", "image": name}
            parts.append({"role": role, "content": blocks})
        lines.append(json.dumps({"id": f"s-{index}", "messages": parts}) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    converted("messages", tmp_path / "out", folder / "rows.jsonl")
    return tmp_path / "out" / "records.jsonl"


def test_converted_records_train(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    path = storyboard_records(tmp_path)
    config = warmup_config(tmp_path / "model", tmp_path / "run", max_steps=1, sources=[{"name": str(path), "weight": 1}])
    original = open_source("storyboard:interleaved", 24)
    converted_batch = encode(tiny_model, [open_source(str(path))[i] for i in range(4)], 0.0, 0, 0)
    direct = encode(tiny_model, [original[i] for i in range(4)], 0.0, 0, 0)
    assert torch.equal(converted_batch.text_ids, direct.text_ids)
    assert torch.equal(converted_batch.codes, direct.codes)
    assert torch.equal(converted_batch.completion_mask, direct.completion_mask)
    warmup(config)
    (line,) = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if line["step"] == 1]
    assert line["loss/text"] > 0
    assert line["loss/image"] > 0
    first, again = (Mixture(config.sources, 5).batch(3, 6) for _ in range(2))
    assert [r.id for r in first] == [r.id for r in again]


# --- inspect -------------------------------------------------------------------------------------------------------------------


def test_inspect_counts_and_shows(tiny_model, tmp_path):
    path = storyboard_records(tmp_path)
    lines = path.read_text().splitlines()
    extra = json.loads(lines[1])
    extra["messages"][1]["content"] = extra["messages"][1]["content"] * 40  # too long
    gone = {"id": "gone", "messages": [{"role": "user", "content": [{"type": "image", "image": "images/gone.png"}]}]}
    path.write_text("\n".join([*lines, json.dumps({**extra, "id": "<b>long"}), lines[0], json.dumps(gone), "{broken"]) + "\n")
    found = inspect_records(path, tiny_model, num_samples=30)
    assert found.problems.by_cause() == {"broken line": 1, "cannot be encoded": 1, "duplicate id": 1, "missing picture": 1}
    assert [p.where.rsplit(":", 1)[1] for p in found.problems.found] == ["25", "26", "27", "28"]
    assert (found.num_lines, found.num_records) == (27, 26)
    first = RowFile([tmp_path / "in" / "rows.jsonl"], "rows")[0]
    assert found.samples[0].num_tokens == len(tiny_model.encode_example(first.prompt, first.answer))  # without encoding its pictures
    assert summary(found)["tokens_per_record"]["max"] <= tiny_model.max_positions
    page = records_page(found)
    assert "&lt;b&gt;long" in page
    assert "<b>long" not in page
    shown = [segment for s in found.samples for part in (s.record.prompt, s.record.answer) for segment in part.segments[:40]]
    assert page.count("data:image/jpeg;base64,") == sum(hasattr(segment, "pixels") for segment in shown) > 60
    assert "more texts and pictures" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is loaded from elsewhere
    with pytest.raises(ValueError, match="does not exist"):
        inspect_records(tmp_path / "none.jsonl")


def test_empty_steps_are_left_out_and_reported(tmp_path):
    rows = [json.loads(line) for line in messages_file(tmp_path, 4).read_text().splitlines()]
    rows[1]["messages"][1]["content"].insert(0, {"type": "text", "text": ""})
    rows[2]["messages"][1]["content"].append({"type": "text", "text": " \n"})
    rows[3]["messages"][0]["content"] = [{"type": "text", "text": ""}, {"type": "image", "image": "3.png"}]  # no answer: no step
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inspect_records(tmp_path / "rows.jsonl")
    assert [(p.where.rsplit(":", 1)[1], p.cause, p.detail[:25]) for p in found.problems.found] == [
        ("2", "empty step", "block 0 of message 2 is a"), ("3", "empty step", "block 1 of message 2 is a"),
    ]  # fmt: skip
    report, lines = converted("messages", tmp_path / "out", tmp_path / "rows.jsonl")
    assert ([line["id"] for line in lines], report["skipped"]) == (["m-0", "m-3"], {"empty step": 2})


def test_commands(tmp_path):
    path, runner = messages_file(tmp_path / "in", 3), CliRunner()
    assert "activitynet" in runner.invoke(app, ["data", "kinds"]).stdout
    done = runner.invoke(app, ["data", "convert", "messages", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "3 records, 3 pictures" in done.stdout
    records = tmp_path / "out" / "records.jsonl"
    done = runner.invoke(app, ["data", "inspect", str(records), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "no problems found" in done.stdout
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    records.write_text(records.read_text() + "broken\n")
    done = runner.invoke(app, ["data", "inspect", str(records), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["problems"] == {"broken line": 1}
    done = runner.invoke(app, ["data", "convert", "nothing", str(path), "--out", str(tmp_path / "x")])
    assert "kind is 'nothing'; allowed are messages, activitynet" in str(done.exception)
