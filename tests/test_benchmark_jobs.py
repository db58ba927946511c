"""A job from data to table: killed at any moment, in shards, on a full disk, with items that cannot be asked; and its figures."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from rich.console import Console
from test_benchmarks_mmie import mmie_folder, record
from typer.testing import CliRunner

from diptych.cli import app
from diptych.cli.figures import show_benchmark, show_storyboard
from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.document import Document, Text
from diptych.evaluation import answers as answers_module
from diptych.evaluation.answers import Template, answer, plan
from diptych.evaluation.benchmark import Benchmark, Item, Score, StoredImage
from diptych.evaluation.fingerprint import of_items
from diptych.evaluation.jobs import Job, Settings, select
from diptych.evaluation.mmie import MMIE
from diptych.evaluation.sheets import count, figure, macro_average, read_scores, summarise, write_scores
from diptych.models import load_model
from diptych.models.fingerprint import BLOCK, BLOCKS, of_file, of_model
from diptych.models.storyboard import StoryboardModel
from diptych.worlds.storyboard.language import vocabulary

SAMPLED = SamplingParams(
    text=TextSampling(temperature=0.8), image=ImageSampling(temperature=0.7, guidance_scale=3.0), max_images=3, max_text_tokens=6
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return mmie_folder(tmp_path_factory.mktemp("mmie"))


def job(data: Path, out: Path, benchmark: Benchmark | None = None, **changes) -> Job:
    benchmark = benchmark or MMIE()
    own = {field.name for field in dataclasses.fields(Job)}
    given = {"model": "tiny", "batch_size": 4, **{k: v for k, v in changes.items() if k not in own}}
    settings = Settings(benchmark=benchmark.name, **given)
    return Job(benchmark, data, out, settings, **{"say": lambda line: None, **{k: v for k, v in changes.items() if k in own}})


def files(folder: Path, *parts: str) -> dict[str, bytes]:
    """All files but locks, by path; of some folders in it only."""
    places = [folder / part for part in parts] or [folder]
    found = [path for place in places for path in place.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((out / "answers").glob("batch_*.jsonl")) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(data, tiny_model, tmp_path_factory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert job(data, out).run(lambda: (tiny_model, SAMPLED)) is None
    return out


# --- answers -------------------------------------------------------------------------------------------------------------


def test_what_an_undisturbed_run_leaves(whole, data):
    assert sorted(path.name for path in whole.iterdir() if not path.name.startswith(".lock")) == [
        "answers", "config.yaml", "problems.json", "submission",
    ]  # fmt: skip
    lines = lines_of(whole)
    assert [line["id"] for line in lines] == [f"{kind}-{n:06d}" for kind in ("SA", "PBL", "MSR") for n in range(4)]
    pictures = [block["image"] for line in lines for block in line["blocks"] if block["type"] == "image"]
    assert len(pictures) > 5
    assert len(set(pictures)) == len(pictures)
    for path in pictures:
        assert PIL.Image.open(whole / "answers" / path).size == (96, 96)
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["sampling"] == SAMPLED.model_dump(mode="json")
    assert (config["benchmark"], config["model"], config["saved_side"], config["shards"]) == ("mmie", "tiny", 96, 1)
    assert config["data"]["folder"] == data.name
    assert config["versions"]["torch"]
    submitted = json.loads((whole / "submission" / "data.json").read_text())
    assert [line["id"] for line in submitted] == [line["id"] for line in lines]
    texts = [[b["text"] for b in line["blocks"] if b["type"] == "text"] for line in lines]
    assert [[part["text"] for part in line["answer"] if part["text"] is not None] for line in submitted] == texts
    assert sum(part["image"] is not None for line in submitted for part in line["answer"]) == len(pictures)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from test_benchmark_jobs import SAMPLED, job
from diptych.models import load_model
from diptych.models.storyboard import StoryboardModel

torch.set_num_threads(1)
data, model, root = Path(sys.argv[1]), load_model(sys.argv[2]), Path(sys.argv[3])

def child(out, moves):
    # dies at the given move of a finished file or folder to its place: an even one before it, an odd one just after
    left = [moves // 2]
    def dying(original):
        def move(self, target):
            left[0] -= 1
            if left[0] < 0 and moves % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(self, target)
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return move
    if moves >= 0:
        Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)
    job(data, out).run(lambda: (model, SAMPLED))
    os._exit(0)

def run(out, moves):
    pid = os.fork()
    if pid == 0:
        try:
            child(out, moves)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) == (moves >= 0), (moves, status)

for number, kills in enumerate(zip(sys.argv[4::2], sys.argv[5::2])):
    for moves in (*map(int, kills), -1):  # twice in the same folder, then to the end
        run(root / str(number), moves)
"""


@pytest.mark.slow
def test_killed_twice_and_resumed_gives_the_same_bytes(whole, data, tiny_model, tmp_path):
    """SIGKILL before and after moves of finished files to their place. A run makes nine: the configuration, pictures and lines of three
    batches, the list of problems, the submission; a batch of which only the pictures are there makes one more, of the old ones away."""
    kills = [(0, 3), (5, 0), (7, 1), (16, 3)]
    tiny_model.save_pretrained(tmp_path / "model")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", KILLED, str(data), str(tmp_path / "model"), str(tmp_path / "runs")]
    command += [str(moves) for pair in kills for moves in pair]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    expected = files(whole, "answers", "submission")
    for number in range(len(kills)):
        out = tmp_path / "runs" / str(number)
        assert files(out, "answers", "submission") == expected
        assert not list(out.rglob(".tmp-*"))


def test_two_shards_are_one_run(whole, data, tiny_model, tmp_path):
    said: list[str] = []
    opened: list[int] = []

    def opener():
        opened.append(1)
        return tiny_model, SAMPLED

    first = job(data, tmp_path, shard=(0, 2), say=said.append)
    assert first.run(opener) is None
    assert sorted(path.name for path in (tmp_path / "answers").glob("*.jsonl")) == ["batch_000000.jsonl", "batch_000002.jsonl"]
    assert said == ["2 of 3 batches are answered; the shard that ends last does the rest"]
    assert not (tmp_path / "submission").exists()
    with pytest.raises(ValueError, match=r"different: shard"):
        job(data, tmp_path, shard=(1, 3)).run(opener)
    assert job(data, tmp_path, shard=(1, 2), say=said.append).run(opener) is None
    assert "python main.py" in said[1]
    assert len(opened) == 2
    assert files(tmp_path, "answers", "submission") == files(whole, "answers", "submission")
    assert job(data, tmp_path).run(lambda: pytest.fail("all is answered")) is None  # without --shard: what is left, here nothing


def test_an_answer_depends_on_its_item_alone(whole, data, tiny_model, tmp_path):
    """Not on batches, on what else is asked, or on the order: the same words and, up to rounding, the same pictures."""
    expected = {line["id"]: line for line in lines_of(whole)}
    job(data, tmp_path / "one", batch_size=1, ids=("MSR-000002", "SA-000001")).run(lambda: (tiny_model, SAMPLED))
    found = lines_of(tmp_path / "one")
    assert [line["id"] for line in found] == ["SA-000001", "MSR-000002"]
    for line in found:
        other = expected[line["id"]]
        assert [b.get("text") for b in line["blocks"]] == [b.get("text") for b in other["blocks"]]
        for mine, theirs in zip(line["blocks"], other["blocks"], strict=True):
            if mine["type"] == "image":
                a, b = (np.asarray(PIL.Image.open(out / "answers" / block["image"]), dtype=int)
                        for out, block in ((tmp_path / "one", mine), (whole, theirs)))  # fmt: skip
                assert abs(a - b).max() <= 1


def test_several_answers_to_one_item_differ_and_are_numbered(tiny_model):
    item = Item("x", Document((Text("a red ball"),)), "c", {}, max_images=1, num_answers=3)
    (batch,) = plan([(5, item)], 16)
    assert [(task.index, task.number) for task in batch] == [(5, 0), (5, 1), (5, 2)]
    found = answer(tiny_model, batch, SAMPLED, 0, Template())
    assert len({one.document.text for one in found if one.document}) == 3
    assert all(one.max_images == 1 and len(one.document.images) <= 1 for one in found if one.document)
    again = answer(tiny_model, [batch[2]], SAMPLED, 0, Template())[0]
    assert again.document is not None
    assert again.document.text == found[2].document.text  # type: ignore[union-attr]


def test_batches_hold_one_kind_each():
    items = [Item(str(n), Document(()), "", {}, max_images=(None, 0)[n % 2], num_answers=2) for n in range(4)]
    found = [[(task.index, task.number) for task in batch] for batch in plan(list(enumerate(items)), 3)]
    assert found == [[(0, 0), (0, 1), (2, 0)], [(2, 1)], [(1, 0), (1, 1), (3, 0)], [(3, 1)]]


def test_a_full_disk_leaves_nothing_half_written(whole, data, tiny_model, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    save, write = PIL.Image.Image.save, Path.write_text

    def no_picture(self, path, *args):
        if "000001" in str(path):
            Path(path).write_bytes(b"half")
            raise full
        return save(self, path, *args)

    def no_lines(self, text, *args, **kwargs):
        if "batch_000001" in self.name:
            write(self, text[:10])
            raise full
        return write(self, text, *args, **kwargs)

    for target, name, fault in ((PIL.Image.Image, "save", no_picture), (Path, "write_text", no_lines)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, fault)
            with pytest.raises(ValueError, match="no space left while writing"):
                job(data, tmp_path).run(lambda: (tiny_model, SAMPLED))
        assert [path.name for path in sorted((tmp_path / "answers").glob("*.jsonl"))] == ["batch_000000.jsonl"]
        assert not list(tmp_path.rglob(".tmp-*"))
    job(data, tmp_path).run(lambda: (tiny_model, SAMPLED))
    assert files(tmp_path, "answers", "submission") == files(whole, "answers", "submission")


def test_a_damaged_batch_is_named(data, tiny_model, whole, tmp_path):
    job(data, tmp_path).run(lambda: (tiny_model, SAMPLED))
    path = tmp_path / "answers" / "batch_000001.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    with pytest.raises(ValueError, match=r"batch_000001.jsonl is damaged \(it holds other answers\); delete it"):
        job(data, tmp_path).run(lambda: (tiny_model, SAMPLED))
    path.unlink()
    job(data, tmp_path).run(lambda: (tiny_model, SAMPLED))
    assert files(tmp_path, "answers") == files(whole, "answers")


# --- what reaches the model ----------------------------------------------------------------------------------------------


def test_references_never_reach_the_model(data, tiny_model, tmp_path, monkeypatch):
    """The reference of every record says "boat" and has a green picture; questions have 0 to 2 pictures of other colours."""
    assert "boat" in vocabulary()
    seen, original = [], answers_module.sample

    def watched(model, rows, *args, **kwargs):
        seen.extend(rows)
        return original(model, rows, *args, **kwargs)

    monkeypatch.setattr(answers_module, "sample", watched)
    job(data, tmp_path).run(lambda: (tiny_model, SAMPLED))
    length = tiny_model.image_spec.length
    assert len(seen) == 12
    for place, row in enumerate(seen):
        n = place % 4
        begins = int((row.text_ids == tiny_model.image_spec.begin_id).sum())
        assert begins == (0, 1, 2, 1)[n]
        assert len(row) < 20 + length * begins
        words = tiny_model.decode_text(row.text_ids.tolist())
        assert "ball" in words
        assert "boat" not in words
    assert "boat" in (tmp_path / "submission" / "data.json").read_text()  # where it belongs
    assert not any("boat" in json.dumps(line["prompt"]) for line in lines_of(tmp_path))


def test_the_template_stands_around_the_prompt():
    picture = StoredImage(b"")
    around = Template("before ", " behind").around
    assert tuple(around(Document((Text("a"),)))) == (Text("before a behind"),)
    assert tuple(around(Document((picture, Text("a"), picture)))) == (Text("before "), picture, Text("a"), picture, Text(" behind"))
    assert tuple(around(Document(()))) == (Text("before  behind"),)
    assert tuple(Template().around(Document((picture,)))) == (picture,)


def test_items_that_cannot_be_asked_are_counted_and_stop_nobody(tiny_model, tmp_path):
    """The tiny model's context is 512: an answer with 3 pictures needs 24 words and 3 * 10 positions, one without 6 words."""
    long, longer, longest = ("ball " * n for n in (480, 490, 512))
    records = [record(f"SA-{n}", (text, None)) for n, text in enumerate((long, longer, longest))]
    records += [record("PBL-3", ("a", "images/broken.png")), record("MSR-4", ("a ball", None)), record("PBL-5", ("a", "images/none.png"))]
    records += [record("MSR-6", ("ball " * 506, None))]  # fits itself, but no text of 6 words behind it
    assert 506 < len(tiny_model.encode_prompt(Document((Text("ball " * 506),)))) < 512
    folder = mmie_folder(tmp_path / "in", records)
    (folder / "images/broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    job(folder, out).run(lambda: (tiny_model, SAMPLED))
    lines = {line["id"]: line for line in lines_of(out)}
    prompt = len(tiny_model.encode_prompt(Document((Text(long),))))
    fits = max(n for n in range(4) if prompt + (n + 1) * 6 + n * len(tiny_model.image_spec.layout) <= 512)
    assert 0 < fits < 3
    assert (lines["SA-0"]["max_images"], lines["SA-0"]["lowered"]) == (fits, True)
    assert lines["SA-1"]["lowered"] is True
    assert (lines["MSR-4"]["max_images"], lines["MSR-4"]["lowered"]) == (3, False)
    assert [lines[id].get("unanswered") for id in ("SA-2", "MSR-6", "PBL-3")] == [
        "prompt too long",
        "prompt too long",
        "unreadable picture",
    ]
    report = json.loads((out / "problems.json").read_text())
    assert report["causes"] == {"prompt too long": 2, "missing picture": 1, "unreadable picture": 1}
    places = [("data.json[5]", "PBL-5"), ("item 2", "SA-2"), ("item 3", "PBL-3"), ("item 5", "MSR-6")]
    assert [(p["where"], p["id"]) for p in report["problems"]] == places
    submitted = json.loads((out / "submission" / "data.json").read_text())
    assert [line["id"] for line in submitted] == ["SA-0", "SA-1", "MSR-4"]
    (tmp_path / "result.json").write_text(json.dumps([{"id": i, "gpt_feedback": "### Score 3"} for i in ("SA-0", "SA-1", "MSR-4")]))
    result = job(folder, out, official=tmp_path / "result.json").run(lambda: pytest.fail("all is answered"))
    assert result is not None
    assert result["counts"]["items_left_out"] == {"missing picture": 1}
    assert result["counts"]["unanswered"] == {"prompt too long": 2, "unreadable picture": 1}
    assert (result["counts"]["items"], result["counts"]["scored"], result["counts"]["fewer_images_allowed"]) == (6, 3, 2)
    # SA: 3, 3 and one that could not be asked: 50 % of what was scored, 6 / 18 = 33.33 % with it
    assert (result["table"]["SA"]["value"], result["table"]["SA"]["missing_as_lowest"]) == (50.0, 33.33)
    assert (result["table"]["PBL"]["value"], result["table"]["PBL"]["missing"]) == (None, 1)
    with pytest.raises(ValueError, match=r"item 2: prompt too long"):
        job(mmie_folder(tmp_path / "two", records[:3]), tmp_path / "strict", strict=True).run(lambda: (tiny_model, SAMPLED))


def test_saved_pictures_are_square_and_no_larger_than_the_judge_can_read(data, tiny_model, tmp_path, monkeypatch):
    job(data, tmp_path / "small", image_size=40, limit=4).run(lambda: (tiny_model, SAMPLED))
    assert {PIL.Image.open(path).size for path in (tmp_path / "small").rglob("0*.png")} == {(40, 40)}
    with pytest.raises(ValueError, match="image_size is 513; mmie's judge loses text to larger pictures, so 512"):
        job(data, tmp_path / "large", image_size=513).run(lambda: pytest.fail("checked before"))
    monkeypatch.setattr(MMIE, "max_side", 50)
    job(data, tmp_path / "capped", limit=4).run(lambda: (tiny_model, SAMPLED))
    assert {PIL.Image.open(path).size for path in (tmp_path / "capped").rglob("0*.png")} == {(50, 50)}
    assert yaml.safe_load((tmp_path / "capped" / "config.yaml").read_text())["saved_side"] == 50


# --- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 2}, {"prefix": "x"}, {"limit": 3}, {"ids": ("SA-000001",)}, {"dtype": "float32"}]
)
def test_another_setting_in_the_same_folder_is_refused_by_name(whole, data, change):
    with pytest.raises(ValueError, match=rf"other settings \(different: {next(iter(change))}\)\. Choose another --out"):
        job(data, whole, **change).run(lambda: pytest.fail("refused before"))


def test_other_data_and_other_sampling_of_the_model_are_refused(whole, data, tiny_model, tmp_path):
    other = mmie_folder(tmp_path / data.name, [record("SA-1", ("x", None))])
    with pytest.raises(ValueError, match=r"different: data: how many items, their texts or records, their pictures\)"):
        job(other, whole).run(lambda: pytest.fail("refused before"))
    out = tmp_path / "out"
    job(data, out, limit=1).run(lambda: (tiny_model, SAMPLED))
    (out / "answers" / "batch_000000.jsonl").unlink()
    with pytest.raises(ValueError, match=r"different: sampling\)"):
        job(data, out, limit=1).run(lambda: (tiny_model, SAMPLED.greedy()))


def test_two_processes_do_not_answer_the_same_shard(data, tiny_model, tmp_path):
    for outer, other in ((None, None), (None, (1, 2)), ((1, 2), None), ((1, 2), (1, 2))):

        def opener(other=other):
            with pytest.raises(ValueError, match="another process is answering"):
                job(data, tmp_path, shard=other).run(lambda: pytest.fail("locked"))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            job(data, tmp_path, shard=outer).run(opener)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_selecting_items():
    items = [Item(id, Document(()), "", {}) for id in "abcd"]
    assert [(i, item.id) for i, item in select(items, 2, None)] == [(0, "a"), (1, "b")]
    assert [(i, item.id) for i, item in select(items, None, ["d", "b"])] == [(1, "b"), (3, "d")]
    with pytest.raises(ValueError, match="1 of 2 ids are not in the benchmark, such as 'x'"):
        select(items, None, ["a", "x"])
    with pytest.raises(ValueError, match="give one"):
        select(items, 1, ["a"])


def test_the_hash_of_the_data_is_of_what_is_asked_and_of_the_references():
    one = Item("a", Document((Text("q"),)), "c", {"r": 1})
    changes = [
        {"id": "b"},
        {"prompt": Document((Text("p"),))},
        {"prompt": Document((StoredImage(b""),))},
        {"prompt": Document((StoredImage(b"x"),))},
        {"category": "d"},
        {"record": {}},
    ]
    found = [of_items([item]) for item in (one, *(dataclasses.replace(one, **change) for change in changes))]
    assert len({tuple(each.values()) for each in found}) == 7
    assert of_items([one]) == of_items([dataclasses.replace(one)])


# --- the same model and the same data ------------------------------------------------------------------------------------


@pytest.fixture
def other_model(tiny_model) -> StoryboardModel:
    """The same sizes, one weight another."""
    found = StoryboardModel(tiny_model.config, tiny_model.tokenizer)
    found.load_state_dict(tiny_model.state_dict())
    with torch.no_grad():
        found.lm_head.weight[3, 5] += 1
    return found.eval()


def test_answers_of_two_models_are_never_mixed(data, tiny_model, other_model, tmp_path):
    """The folder of the model is overwritten between two shards, and when all is answered; its name stays the same."""
    folder, out = tmp_path / "model", tmp_path / "out"
    tiny_model.save_pretrained(folder)

    def run(opened, **changes):
        return job(data, out, model=str(changes.pop("model", folder)), **changes).run(opened)

    def never():
        return pytest.fail("refused before")

    run(lambda: (tiny_model, SAMPLED), shard=(0, 2))
    other_model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"different: model: its files model\.safetensors are not those that answered before\)"):
        run(never, shard=(1, 2))
    tiny_model.save_pretrained(folder)
    run(lambda: (tiny_model, SAMPLED), shard=(1, 2))
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"different: model: its files config\.json are not"):
        run(never)
    shutil.rmtree(folder)
    run(never)  # of a model that is gone, all answers are there
    other_model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"different: model: its files model\.safetensors are not"):
        run(never)
    with pytest.raises(ValueError, match=r"different: model: .*model there, .*elsewhere here"):
        run(never, model=tmp_path / "elsewhere")


def test_a_model_that_is_moved_is_the_same_model(data, whole, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "one")
    job(data, tmp_path / "out", model=str(tmp_path / "one"), shard=(0, 2)).run(lambda: (tiny_model, SAMPLED))
    (tmp_path / "one").rename(tmp_path / "two")
    job(data, tmp_path / "out", model=str(tmp_path / "two"), shard=(1, 2)).run(lambda: (tiny_model, SAMPLED))
    assert files(tmp_path / "out", "answers") == files(whole, "answers")
    submitted = json.loads((tmp_path / "out" / "submission" / "data.json").read_text())
    assert {line["model"] for line in submitted} == {str(tmp_path / "one")}  # whichever process comes last


def test_pictures_that_are_exchanged_are_other_data_and_a_moved_folder_is_not(whole, tiny_model, tmp_path):
    """Of the same name, size and even number of bytes."""
    folder = mmie_folder(tmp_path / "in")
    job(folder, tmp_path / "out", shard=(0, 2)).run(lambda: (tiny_model, SAMPLED))
    moved = folder.rename(tmp_path / "elsewhere")
    kept = (moved / "images" / "b.png").read_bytes()
    PIL.Image.new("RGB", (20, 14), "lime").save(moved / "images" / "b.png")
    with pytest.raises(ValueError, match=r"different: data: their pictures\)"):
        job(moved, tmp_path / "out", shard=(1, 2)).run(lambda: pytest.fail("refused before"))
    (moved / "images" / "b.png").write_bytes(kept)
    job(moved, tmp_path / "out", shard=(1, 2)).run(lambda: (tiny_model, SAMPLED))
    assert files(tmp_path / "out", "answers") == files(whole, "answers")


def test_an_adapter_is_known_by_its_own_files_and_those_of_its_base(tiny_model, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model.save_pretrained(base)
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    (adapter / "diptych_adapter.json").write_text(json.dumps({"base": {"source": str(base)}, "train_in_full": []}))
    first = of_model(str(adapter), fetch=False)
    assert {"adapter_model.safetensors", "base/config.json", "base/model.safetensors"} <= first["files"].keys()
    (base / "README.md").write_text("words")
    assert of_model(str(adapter), fetch=False) == first
    (base / "tokenizer.json").write_text("{}")
    second = of_model(str(adapter), fetch=False)
    assert {name for name in first["files"] if first["files"][name] != second["files"][name]} == {"base/tokenizer.json"}
    (adapter / "adapter_model.safetensors").write_bytes(b"b")
    assert of_model(str(adapter), fetch=False)["hash"] not in (first["hash"], second["hash"])
    shutil.rmtree(base)
    assert of_model(str(adapter), fetch=False) is None


def test_a_hub_repository_is_known_by_its_commit_when_it_is_opened(data, tiny_model, tmp_path, monkeypatch):
    snapshots, asked = tmp_path / "models--org--name" / "snapshots", []
    for commit in ("aaaa", "bbbb"):
        tiny_model.save_pretrained(snapshots / commit)
    (snapshots / "bbbb" / "config.json").write_text((snapshots / "bbbb" / "config.json").read_text() + "\n")
    head = ["aaaa"]
    monkeypatch.setattr("diptych.models.loading._from_hub", lambda name: asked.append(name) or snapshots / head[0])
    job(data, tmp_path / "out", model="org/name", shard=(0, 2)).run(lambda: (tiny_model, SAMPLED))
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["fingerprint"]["commit"] == "aaaa"
    head[0] = "bbbb"
    with pytest.raises(ValueError, match=r"its files config\.json are not those that answered before, commit aaaa there, bbbb here"):
        job(data, tmp_path / "out", model="org/name", shard=(1, 2)).run(lambda: pytest.fail("refused before"))
    asked.clear()
    job(data, tmp_path / "out", model="org/name", shard=(0, 2)).run(lambda: pytest.fail("this shard is answered"))
    assert not asked
    job(data, tmp_path / "out", model=str(snapshots / "aaaa"), shard=(1, 2)).run(lambda: (tiny_model, SAMPLED))


def test_a_large_file_is_known_by_samples_of_it(tmp_path):
    path, size = tmp_path / "weights.safetensors", 4 * BLOCKS * BLOCK
    content = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)

    def changed(*places: int) -> str:
        other = content.copy()
        other[list(places)] ^= 1
        path.write_bytes(other.tobytes())
        return of_file(path)

    plain = changed()
    assert len({plain, changed(0), changed(BLOCK - 1), changed(size - 1), changed(*range(size // 2, size // 2 + 4 * BLOCK))}) == 5
    assert changed() == plain
    path.write_bytes(content[:-1].tobytes())
    assert of_file(path) != plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": (2, 2)}, r"shard is 2/2; allowed are 0/N to N-1/N"),
        ({"judge": {"base_url": "http://x/v1", "model": "m"}}, "--judge has no effect: mmie is scored by --official"),
        ({"official": Path("none.json")}, "--official 'none.json' is no file"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        job(tmp_path / "none", tmp_path / "out", **changes).run(lambda: pytest.fail("refused before"))


# --- scoring -------------------------------------------------------------------------------------------------------------


class Fake(Benchmark):
    """Two aspects; the judge finds one of them only at the second time."""

    name, aspects, scale, scored_by = "fake", ("a", "b"), (1.0, 5.0), ("judge",)
    asked = 0

    def read(self, folder, problems):
        return [Item(str(n), Document((Text("a red ball"),)), "c", {}, max_images=0) for n in range(3)]

    def submit(self, items, answers, folder, model):
        (folder / "x").write_text("x")

    def how_to_score(self, data, submission):
        return "give a judge"

    def score(self, items, answers, scoring):
        if scoring.judge is None:
            return None
        self.asked += 1
        late = 3.0 if self.asked > 1 else None
        return [Score(item.id, "c", {"a": 2.0, "b": late}, cause="" if late else "timeout") for item in items]

    def table(self, scores):
        return {"b": [score.values["b"] for score in scores]}


def test_what_a_judge_left_missing_is_asked_again_and_another_judge_is_refused(tiny_model, tmp_path):
    fake, said = Fake(), []

    def run(**judge):
        given = {"judge": {"base_url": "http://localhost/v1", **judge}} if judge else {}
        return job(tmp_path, tmp_path, fake, say=said.append, **given).run(lambda: (tiny_model, SAMPLED))

    assert run() is None
    assert said == ["give a judge"]
    assert not (tmp_path / "scoring.json").exists()
    with pytest.raises(ValueError, match="unknown key"):
        run(model="m", api_key="secret")
    first = run(model="m")
    assert first["counts"]["missing"] == {"timeout": 3}
    assert first["aspects"]["b"]["all"]["missing_as_lowest"] == 1.0
    for other in ({"model": "other"}, {"model": "m", "revision": "other"}):
        with pytest.raises(ValueError, match=r"scored with something else \(different: judge\)"):
            run(**other)
    assert run()["table"] == {"b": [None] * 3}  # shown, not asked
    second = run(model="m", concurrency=2)  # how patient to be may change
    assert second["table"] == {"b": [3.0] * 3}
    assert second["scored_with"]["judge"] == {"model": "m"}
    assert run(model="m") == second
    assert fake.asked == 2
    assert [s.values for s in read_scores(tmp_path / "scores.jsonl")] == [{"a": 2.0, "b": 3.0}] * 3
    assert "secret" not in "".join(path.read_text() for path in tmp_path.glob("*.*"))


def test_the_command_from_data_to_table(data, tiny_model, tmp_path):
    """As a user calls it, with the family's own sampling; the judge's file is made from the submission by the scorer's rules."""
    tiny_model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    command = ["evaluate", "mmie", str(data), "--model", str(tmp_path / "model"), "--out", str(out), "--batch-size", "6",
               "--max-images", "2", "--max-text-tokens", "5", "--suffix", " with pictures", "--device", "cpu"]  # fmt: skip
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert "python main.py --input_dir" in first.output.replace("\n", " ")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["sampling"]["text"]["temperature"] == 0.0  # the packaged family's release samples greedily
    assert config["sampling"]["image"]["guidance_scale"] == load_model(tmp_path / "model").default_sampling.image.guidance_scale
    assert (config["sampling"]["max_images"], config["suffix"]) == (2, " with pictures")
    assert lines_of(out)[0]["prompt"] == [{"type": "text", "text": "a red ball 0 with pictures"}]
    submitted = json.loads((out / "submission" / "data.json").read_text())
    feedback = [{"id": line["id"], "gpt_feedback": f"### Score\n{n % 6}"} for n, line in enumerate(submitted)]
    (tmp_path / "eval_result.json").write_text(json.dumps(feedback))
    second = CliRunner().invoke(app, [*command, "--official", str(tmp_path / "eval_result.json")])
    assert second.exit_code == 0, second.output
    result = json.loads((out / "result.json").read_text())
    # scores are 0..5 twice over: SA 0 1 2 3, PBL 4 5 0 1, MSR 2 3 4 5; AVG 2.5 / 6
    assert [result["table"][name]["value"] for name in ("SA", "PBL", "MSR", "AVG")] == [25.0, 41.67, 58.33, 41.67]
    low, high = result["table"]["AVG"]["ci"]
    assert low < 41.67 < high
    assert "parse rate: 1" in second.output
    before = files(out)
    assert CliRunner().invoke(app, [*command, "--official", str(tmp_path / "eval_result.json")]).exit_code == 0
    assert files(out) == before
    (tmp_path / "eval_result.json").write_text(json.dumps(feedback[:-1]))
    changed = CliRunner().invoke(app, [*command, "--official", str(tmp_path / "eval_result.json")])
    assert isinstance(changed.exception, ValueError)
    assert "scored with something else (different: official)" in str(changed.exception)


# --- sheets --------------------------------------------------------------------------------------------------------------


def test_a_sheet_comes_back_as_it_was_and_a_broken_line_is_named(tmp_path):
    scores = [Score("é", "c", {"a": None, "b": 2.0}, 1, "timeout", {"n": 3.0}), Score("y", "d", {})]
    write_scores(tmp_path / "s.jsonl", scores)
    assert read_scores(tmp_path / "s.jsonl") == scores
    first = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    assert first == {"id": "é", "answer": 1, "category": "c", "values": {"a": None, "b": 2.0}, "cause": "timeout", "facts": {"n": 3.0}}
    (tmp_path / "s.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(ValueError, match=r"s.jsonl:1 is no line of a score sheet"):
        read_scores(tmp_path / "s.jsonl")
    assert count(scores) == {"answers": 2, "scored": 1, "missing": {"timeout": 1}}


def test_figures_by_hand():
    groups = {"a": [[1.0, 2.0], [None, 3.0]], "b": [[10.0]], "c": [[None]]}
    # a: (1 + 2 + 3) / 3 = 2; micro over a and b: 16 / 4 = 4; with 0 for missing: 16 / 6
    assert figure({"a": groups["a"]}, 0.0)["value"] == 2.0
    micro = figure(groups, 0.0, needs_all=False)
    assert (micro["value"], micro["scored"], micro["missing"], micro["missing_as_lowest"]) == (4.0, 4, 2, 2.6667)
    # macro of a and b: (2 + 10) / 2 = 6; with c and 0 for missing: (6 / 4 + 10 + 0) / 3
    assert figure({k: groups[k] for k in "ab"}, 0.0, macro_average)["value"] == 6.0
    assert figure(groups, 0.0, macro_average) == {"value": None, "ci": None, "scored": 4, "missing": 2, "missing_as_lowest": 3.8333}
    assert figure({"b": groups["b"]}, 0.0)["ci"] is None  # of one unit nothing can be estimated
    assert figure({"b": groups["b"]}, 0.0, factor=100 / 6, digits=1)["value"] == 166.7
    assert figure({}, 0.0)["value"] is None


def test_intervals_against_the_normal_approximation():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 900)
    low, high = figure({"all": [[float(v)] for v in values]}, 0.0)["ci"]
    half = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - half, abs=0.006)  # the error of a 2.5 % quantile of 2000 draws is about 0.002
    assert high == pytest.approx(values.mean() + half, abs=0.006)
    # two equal answers to each item are no more evidence than one
    doubled = figure({"all": [[float(v)] * 2 for v in values]}, 0.0)["ci"]
    assert doubled == pytest.approx([low, high], abs=1e-9)
    # strata: each group keeps its size, so a difference between groups widens nothing
    apart = {"a": [[float(v)] for v in values[:450]], "b": [[float(v) + 100] for v in values[450:]]}
    wide = figure(apart, 0.0)["ci"]
    assert wide[1] - wide[0] == pytest.approx(high - low, abs=0.012)


def test_a_summary_is_of_each_aspect_and_category():
    scores = [Score("x", "c", {"a": 1.0}), Score("y", "c", {"a": None}), Score("z", "d", {"a": 4.0, "b": 5.0})]
    found = summarise(scores, ("a", "b"), 1.0)
    assert list(found["a"]) == ["all", "c", "d"]
    assert (found["a"]["all"]["value"], found["a"]["all"]["missing_as_lowest"]) == (2.5, 2.0)
    assert (found["a"]["c"]["value"], found["a"]["c"]["missing"]) == (1.0, 1)
    assert found["b"]["all"]["scored"] == 1  # where an aspect does not apply, nothing is missing


def test_the_table_is_for_reading():
    """Figures of any depth in rows, what else a benchmark says below, with nothing dropped."""
    figure = {"value": 24.14, "ci": [17.24, 31.03], "scored": 29, "missing": 1, "missing_as_lowest": 23.33}
    unknown = {"value": None, "ci": None, "scored": 0, "missing": 2, "missing_as_lowest": 0.0}
    mean = {"value": 1e-05, "missing_as_lowest": 2.0, "ci": None}
    table = {
        "AVG": figure,
        "mean": mean,
        "tasks": {"a_b": {"average": {**unknown, "accuracy": 50.0}, "unit": "per cent"}},
        "parse_rate": 0.5,
    }
    stream = io.StringIO()
    show_benchmark(Console(file=stream, width=120), "toy", {"table": table, "counts": {"answers": 31, "missing": {"refused": 3}}})
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in stream.getvalue().splitlines() if line.startswith("│")]
    assert rows == [
        ["AVG", "24.14", "17.24 to 31.03", "29", "1", "23.33"],
        ["mean", "1e-05", "–", "–", "–", "2"],
        ["tasks / a b / average (accuracy 50)", "–", "–", "0", "2", "0"],
    ]
    assert stream.getvalue().splitlines()[-4:] == ["tasks / a b / unit: per cent", "parse rate: 0.5", "answers: 31", "missing / refused: 3"]


@pytest.mark.parametrize(("telling", "swapped"), [("full", "order"), ("terse", "given")])
def test_storyboards_table_is_in_per_cent_and_in_order(telling, swapped):
    rates = {name: number / 10 for number, name in enumerate(("format", "text", "image", swapped, "score", "document"))}
    rates |= {f"{name}_ci": [value / 2, 1.0] for name, value in list(rates.items())}
    stream = io.StringIO()
    skills = {"text_to_image": {"accuracy": 0.985, "accuracy_ci": [0.97, 1.0]}}
    kinds = {"story, 3 pictures": {"prompts": 7, **rates}}
    found = {"greedy": rates, "sampled": rates, "greedy_by_kind": kinds, "retention": skills}
    show_storyboard(Console(file=stream, width=120), found, telling)
    row = next(line for line in stream.getvalue().splitlines() if "greedy" in line)
    cells = ["0.0 [0, 100]", "10.0 [5, 100]", "20.0 [10, 100]", "30.0 [15, 100]", "40.0 [20, 100]", "50.0 [25, 100]"]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["greedy", *cells]
    row = next(line for line in stream.getvalue().splitlines() if "story, 3 pictures" in line)
    tens = ["0.0", "10.0", "20.0", "30.0", "40.0", "50.0"]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["story, 3 pictures", "7", *tens]
    assert stream.getvalue().splitlines()[-1] == "text to image: 98.5 % [97, 100]"
