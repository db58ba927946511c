"""Records that a model cannot take are named before the first step, or left out up to a share, the same way in every run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from family_data import SIZE
from test_family_training import common
from test_training import grpo_config, tiny_folder, warmup_config, weights  # noqa: F401 - a fixture

from diptych.config import GRPOConfig, MixtureSource, build
from diptych.data import Mixture
from diptych.data.conversation import Record
from diptych.document import STAND_IN, Document, Image, Text
from diptych.evaluation.answers import Template, _encode, _Refused
from diptych.models.base import TooLong
from diptych.runs import RunFolder
from diptych.training import admission
from diptych.training.admission import Bound
from diptych.training.experience import prompt_length
from diptych.training.grpo import grpo
from diptych.training.supervised import example_length
from diptych.training.warmup import warmup

LONG = "the ball grows " * 400


def records(path: Path, bad: dict[int, str], count: int = 60, answers: bool = False) -> str:
    rows = []
    for i in range(count):
        messages = [{"role": "user", "content": bad.get(i, "tell the story .")}]
        messages += [{"role": "assistant", "content": f"the ball grows {'at night ' * (i % 4)}"}] if answers else []
        rows.append({"messages": messages, "id": f"r{i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_prompt_that_does_not_fit_is_named_before_the_first_step(tiny_folder, tmp_path):  # noqa: F811
    name = records(tmp_path / "d.jsonl", {41: LONG})
    config = grpo_config(tiny_folder, tmp_path / "run", prompts=[{"name": name}])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of the 60 rows of .*d\.jsonl:42 \(id r41\): the prompt has \d+ positions"):
            grpo(config)
    assert not (tmp_path / "run" / "metrics.jsonl").read_text()
    for number, changes in enumerate(({"prompts": [{"name": records(tmp_path / "v.jsonl", {59: LONG})}], "eval_steps": 1},
                    {"ptx": {"sources": [{"name": records(tmp_path / "p.jsonl", {3: LONG}, answers=True)}], "coef": 1.0}})):  # fmt: skip
        with pytest.raises(ValueError, match=r"(v\.jsonl:60|p\.jsonl:4) \(id r(59|3)\): the prompt has"):
            grpo(grpo_config(tiny_folder, tmp_path / f"other{number}", **changes))


def test_a_prompt_that_leaves_no_room_for_the_longest_answer_is_named(tiny_folder, tmp_path):  # noqa: F811
    config = grpo_config(tiny_folder, tmp_path / "run", prompts=[{"name": records(tmp_path / "d.jsonl", {2: "ball " * 480})}])
    with pytest.raises(ValueError, match=r"d\.jsonl:3 \(id r2\): a prompt of \d+ positions and an answer of up to \d+ exceed"):
        grpo(config)


@pytest.mark.parametrize("stage", ["warmup", "grpo"])
def test_what_is_left_out_is_the_same_in_a_run_that_was_killed(tiny_folder, tmp_path, stage):  # noqa: F811
    name = records(tmp_path / "d.jsonl", {i: LONG for i in (1, 7, 8, 30, 31, 32)}, answers=True)
    found = []
    for run, steps in (("whole", (4,)), ("halves", (2, 4))):
        for max_steps in steps:
            settings = {"max_skipped_records": 0.1, "max_steps": max_steps}
            if stage == "warmup":
                warmup(warmup_config(tiny_folder, tmp_path / run, sources=[{"name": name}], batch_size=12, **settings))
            else:
                grpo(grpo_config(tiny_folder, tmp_path / run, prompts=[{"name": name}], **settings))
        found.append(weights(tmp_path / run / "checkpoints/step_4/model"))
        told = json.loads((tmp_path / run / "skipped.json").read_text())
        assert {line["id"] for line in told} == {"r1", "r7", "r8", "r30", "r31", "r32"}
        assert all(line["where"].startswith(name) and "positions" in line["detail"] for line in told)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    with pytest.raises(ValueError, match=r"6 of the 60 rows .* cannot be used, and max_skipped_records: 0\.05"):
        warmup(warmup_config(tiny_folder, tmp_path / "few", sources=[{"name": name}], max_skipped_records=0.05))


def test_what_was_found_is_remembered_for_the_same_data_and_lengths(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    name = records(tmp_path / "d.jsonl", {41: LONG})
    asked: list[str] = []
    right = admission._refused
    monkeypatch.setattr(admission, "_refused", lambda source, *rest: asked.append(source.name) or right(source, *rest))

    def run(**changes: Any) -> int:
        del asked[:]
        settings = {"prompts": [{"name": name}], "max_skipped_records": 0.5, "max_steps": 2, **changes}
        grpo(grpo_config(tiny_folder, tmp_path / "run", **settings))
        return len(asked)

    assert run() == 1
    assert run(max_steps=3) == 0
    file = tmp_path / "run" / "admitted_prompts.json"
    file.write_text(file.read_text()[:20])  # half-written by hand: found out again
    assert run(max_steps=4) == 1


def test_no_text_has_more_tokens_than_the_bound_says(models, family):
    """Seeded texts of every kind: what is said to fit does."""
    model, source = models[family], random.Random(0)
    pieces = ["a", " the ball", "\n", "é", "漢", "🙂", "<", "<s>", "  ", "０", "ﷺ", "x" * 40, "1234567890", "\u200d"]
    for limit in (60, 120, 400):
        bound = Bound(lambda record: example_length(model, record), limit)
        said = 0
        for _ in range(150):
            texts = ["".join(source.choice(pieces) for _ in range(source.randint(1, 25))) or "a" for _ in range(3)]
            prompt = Document((Text(texts[0]), *((STAND_IN,) if source.random() < 0.3 else ())))
            record = Record(prompt, Document((Text(texts[1]), STAND_IN, Text(texts[2]))), "s", {})
            if bound.fits(record):
                said += 1
                assert example_length(model, record) <= limit
        assert said > 0 or limit < 400


def test_stand_ins_are_as_long_as_pictures(models, family):
    """Emu3 reads pictures of any shape: a stand-in is as long as the smallest."""
    from family_data import picture

    model = models[family]
    real, stand_in = (Document((image, Text("the ball"))) for image in (Image(picture(0)), STAND_IN))
    answer, its_stand_in = (Document((Text("the ball"), image)) for image in (Image(picture(1)), STAND_IN))
    lengths = [len(model.encode_prompt(document)) for document in (real, stand_in)]
    assert lengths[1] < lengths[0] if family == "emu3" else lengths[1] == lengths[0]
    plain = Document((Text("a"),))
    assert len(model.encode_example(plain, answer)) == len(model.encode_example(plain, its_stand_in))
    assert SIZE


def test_a_prompt_that_only_shows_late_is_left_out_or_named(folders, tmp_path, monkeypatch):
    """Emu3 cannot read a picture of this shape, which nobody knows before it is opened."""
    import PIL.Image

    PIL.Image.new("RGB", (401, 2)).save(tmp_path / "wide.png")
    PIL.Image.new("RGB", (40, 20)).save(tmp_path / "good.png")
    rows = [[{"type": "image", "image": "wide.png" if i == 3 else "good.png"}, {"type": "text", "text": "the ball"}] for i in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"messages": [{"role": "user", "content": row}]}) + "\n" for row in rows))
    settings = {
        "prompts": [{"name": str(tmp_path / "d.jsonl")}], "rewards": [{"name": "toy_rewards:per_step"}], "num_generations": 2,
        "prompts_per_step": 8, **common(folders["emu3"], tmp_path / "run", "emu3", max_steps=2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"1 of the 8 rows .*d\.jsonl:4: .*401 x 2"):
        grpo(build(GRPOConfig, settings))
    grpo(build(GRPOConfig, {**settings, "max_skipped_records": 0.2, "output_dir": str(tmp_path / "other")}))
    (line,) = json.loads((tmp_path / "other" / "skipped.json").read_text())
    assert line["where"].endswith("d.jsonl:4")


def test_causes_of_an_evaluation_are_told_apart(models):
    model = models["janus"]
    params = model.default_sampling.model_copy(update={"max_text_tokens": 8})
    causes = []
    for text in ("the ball " * 1000, "half \ud83d", "the ball " * 45):
        with pytest.raises(_Refused) as caught:
            _encode(model, Document((Text(text),)), params.model_copy(update={"max_text_tokens": 470}), Template())
        causes.append(caught.value.args[0])
    assert causes == ["prompt too long", "prompt not encodable", "prompt too long"]
    with pytest.raises(TooLong):
        model.encode_prompt(Document((Text("the ball " * 1000),)))
    assert prompt_length(model, params, Record(Document((Text("a"),)), None, "s", {})) > 8


def test_nothing_is_gone_through_for_a_world_without_end(tmp_path, tiny_folder):  # noqa: F811
    config = warmup_config(tiny_folder, tmp_path / "run")
    mixture = Mixture([MixtureSource(name="storyboard:text")], 0)
    with RunFolder(tmp_path / "run", config) as run:
        admission.admit(mixture, lambda record: pytest.fail("asked"), 10, run, "x", {})
