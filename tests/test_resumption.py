"""A run is resumed with what it began with: inputs are known by their content, settings by what was set; one process trains in a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_data import picture
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import grpo_config, tiny_folder, warmup_config, weights  # noqa: F401 - a fixture
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import GRPOConfig, WarmupConfig, build
from diptych.models import load_model
from diptych.resumption import leaves, set_keys
from diptych.rewards import base
from diptych.runs import RunFolder, read_jsonl
from diptych.training.checkpoints import restore
from diptych.training.grpo import grpo
from diptych.training.inputs import own_code
from diptych.training.optim import make_optimizer
from diptych.training.warmup import warmup

WORDS = "the small red ball grows at night"


def records(path: Path, count: int = 24, pictures: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        answer: list[dict[str, Any]] = [{"type": "text", "text": " ".join(WORDS.split()[: 2 + i % 5])}]
        if pictures:
            picture(i % 3).save(path.parent / f"p{i % 3}.png")
            answer.append({"type": "image", "image": f"p{i % 3}.png"})
        messages = [{"role": "user", "content": "tell the story ."}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "id": f"r{i}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def shifted(folder: Path) -> None:
    file = folder / "model.safetensors"
    changed = {name: value + 0.1 if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})


def stopped(config: Any, run: Any, at: int = 2) -> None:
    """A run that was killed behind its checkpoint `at`."""
    run(config)
    for step in (Path(config.output_dir) / "checkpoints").glob("step_*"):
        if int(step.name.removeprefix("step_")) > at:
            shutil.rmtree(step)


def refused_after_a_change(file: Path, config: GRPOConfig, told: str) -> None:
    before = file.read_text()
    file.write_text(before + "\n")
    with pytest.raises(ValueError, match=told):
        grpo(config)
    file.write_text(before)


# --- inputs --------------------------------------------------------------------------------------------------------------


def test_other_data_is_refused_and_the_same_elsewhere_is_not(tiny_folder, tmp_path):  # noqa: F811
    data = records(tmp_path / "data" / "d.jsonl", pictures=True)
    config = warmup_config(tiny_folder, tmp_path / "run", sources=[{"name": str(data)}], max_steps=4)
    stopped(config, warmup)
    text = data.read_text()
    changes = {
        "rows": (data, records, r"data .*d\.jsonl \(24 rows then, 5 now, changed: d\.jsonl"),
        "same size": (data, lambda path, _: path.write_text(text.replace("story", "stony")), r"data .*d\.jsonl \(changed: d\.jsonl\)"),
        "picture": (data.parent / "p1.png", lambda path, _: picture(7).save(path), r"data .*d\.jsonl \(changed: pictures\)"),
    }
    for path, change, told in changes.values():
        before = path.read_bytes()
        change(path, 5)
        with pytest.raises(ValueError, match=rf"was trained on other inputs: {told}.*Put back what was there.*delete .*inputs\.json"):
            warmup(config)
        path.write_bytes(before)
    data.touch()
    warmup(config)  # the same content


def test_other_base_models_are_refused(tiny_folder, tmp_path):  # noqa: F811
    model = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    full = grpo_config(model, tmp_path / "full")
    adapter = grpo_config(model, tmp_path / "adapter", lora={"r": 2})
    for config in (full, adapter):
        stopped(config, grpo)
    adapter_folder = Path(shutil.copytree(tmp_path / "adapter/checkpoints/step_2/model", tmp_path / "start"))
    behind = grpo_config(adapter_folder, tmp_path / "behind", lora={"r": 2})
    stopped(behind, grpo)
    shifted(model)
    for config, file in ((full, "model.safetensors"), (adapter, "model.safetensors"), (behind, "base/model.safetensors")):
        with pytest.raises(ValueError, match=rf"other inputs: model .* \(changed: {file}\)"):
            grpo(config)
    (Path(full.output_dir) / "inputs.json").unlink()
    grpo(full)  # who says so may go on


def test_a_base_that_is_not_needed_may_be_gone(tiny_folder, tmp_path):  # noqa: F811
    model = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    config = warmup_config(model, tmp_path / "run", max_steps=4)
    stopped(config, warmup)
    shutil.rmtree(model)
    warmup(config)
    assert (tmp_path / "run/checkpoints/step_4").is_dir()


def test_other_rewards_are_refused(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("")
    (tmp_path / "parts" / "deep.py").write_text("FACTOR = 1.0\n")
    (tmp_path / "helper_of_mine.py").write_text("def size(text):\n    from parts.deep import FACTOR\n    return FACTOR * len(text)\n")
    (tmp_path / "reward_of_mine.py").write_text(
        "import json\nfrom helper_of_mine import size\n\ndef r(completions, words='', **_):\n"
        "    return [size(c[-1]['content'][0].get('text', '')) for c in completions]\n"
    )
    (tmp_path / "words.txt").write_text("a\n")
    config = grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "reward_of_mine:r", "options": {"words": "words.txt"}}])
    stopped(config, grpo)
    for file in ("reward_of_mine.py", "helper_of_mine.py", "parts/deep.py", "words.txt"):
        refused_after_a_change(tmp_path / file, config, rf"other inputs: reward reward_of_mine:r \(changed: .*{Path(file).name}\)")
    grpo(config)


def test_files_of_one_name_in_several_folders_are_told_apart(tiny_folder, tmp_path):  # noqa: F811
    for folder in "xy":
        records(tmp_path / "data" / folder / "records.jsonl", pictures=True)
    name = str(tmp_path / "data" / "*" / "records.jsonl")
    config = warmup_config(tiny_folder, tmp_path / "run", sources=[{"name": name}], max_steps=4)
    stopped(config, warmup)
    for folder in "xy":
        file = tmp_path / "data" / folder / "records.jsonl"
        before = file.read_text()
        file.write_text(before.replace("small", "large"))
        with pytest.raises(ValueError, match=rf"changed: {folder}/records\.jsonl\)"):
            warmup(config)
        file.write_text(before)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    elsewhere = Path(shutil.move(tmp_path / "run", tmp_path / "run elsewhere"))
    moved = [{"name": str(tmp_path / "moved" / "*" / "records.jsonl")}]
    with pytest.raises(ValueError, match=r"different: sources\.0\.name\)"):
        warmup(warmup_config(tiny_folder, elsewhere, sources=moved, max_steps=4))
    shutil.move(tmp_path / "moved", tmp_path / "data")
    warmup(config.model_copy(update={"output_dir": str(elsewhere)}))  # a run's own folder may be moved


def test_files_named_anywhere_in_options_are_known(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    for file in ("a.txt", "lex/deep/b.txt", "c.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("1")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "reward_in_lib.py").write_text(
        "from pathlib import Path\n\ndef r(completions, files, lexicon_dir, more, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    options = {"files": ["a.txt"], "lexicon_dir": "lex", "more": {"deep": ["c.txt", 3, None]}}
    config = grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "reward_in_lib:r", "options": options}])
    stopped(config, grpo)
    for file, told in (("a.txt", r"files\.0 a\.txt"), ("lex/deep/b.txt", "lexicon_dir lex"), ("c.txt", r"more\.deep\.0 c\.txt"),
                       ("lib/reward_in_lib.py", "reward_in_lib.py")):  # fmt: skip
        refused_after_a_change(tmp_path / file, config, rf"reward reward_in_lib:r \(changed: {told}\)")
    grpo(config)


def test_what_a_reward_writes_is_no_input(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for folder in ("logs", "many"):
        (tmp_path / folder).mkdir()
    for number in range(1100):
        (tmp_path / "many" / str(number)).write_text("")
    (tmp_path / "writes.py").write_text(
        "from pathlib import Path\n\ndef r(completions, log_dir, data, **_):\n"
        "    Path(log_dir, str(len(list(Path(log_dir).iterdir())))).write_text('x')\n"
        "    Path(data, 'more').write_text('x')\n    return [float(len(str(c))) for c in completions]\n"
    )
    config = grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "writes:r", "options": {"log_dir": "logs", "data": "many"}}])
    stopped(config, grpo)
    grpo(config)


def test_code_is_followed_through_imports_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "own" / "deep"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (tmp_path / "own" / "a.py").write_text("import torch, json\nfrom . import b\nfrom .deep import c\nimport lone\n")
    (tmp_path / "own" / "b.py").write_text("def f():\n    import own.deep.d\n")
    (package / "d.py").write_text("from ..up import x\nfrom .. import side\n")
    for name in ("up", "side"):
        (tmp_path / "own" / f"{name}.py").write_text("")
    for name in ("c", "unused"):
        (package / f"{name}.py").write_text("")
    (tmp_path / "lone.py").write_text("from own.a import x\n")
    found = {path.relative_to(tmp_path.resolve()).as_posix() for path in own_code("own.a")}
    (tmp_path / "own" / f"fast{EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    (tmp_path / "own" / "late.py").write_text("")
    (tmp_path / "lone.py").write_text("from own.a import x\nimport own.fast\nimportlib.import_module('own.late')\n")
    found = {path.relative_to(tmp_path.resolve()).as_posix() for path in own_code("own.a")}
    assert found == {
        "own/__init__.py", f"own/fast{EXTENSION_SUFFIXES[0]}", "own/late.py",
        "own/a.py", "own/b.py", "own/deep/__init__.py", "own/deep/c.py", "own/deep/d.py", "lone.py",
        "own/up.py", "own/side.py",
    }  # fmt: skip


# --- settings ------------------------------------------------------------------------------------------------------------


def test_a_finished_run_goes_on_as_if_it_had_been_longer(tiny_folder, tmp_path, caplog):  # noqa: F811
    whole = grpo_config(tiny_folder, tmp_path / "whole", max_steps=6)
    grpo(whole)
    short = grpo_config(tiny_folder, tmp_path / "run", max_steps=4)
    grpo(short)
    with caplog.at_level(logging.WARNING):
        grpo(short.model_copy(update={"max_steps": 6}))
    assert "resumes after step 4 with other settings: max_steps 4 -> 6" in caplog.text
    one, two = (weights(tmp_path / name / "checkpoints/step_6/model") for name in ("whole", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["config"]["max_steps"] == 6
    assert stored["history"] == [{"step": 4, "changed": {"max_steps": [4, 6]}}]
    with pytest.raises(ValueError, match=r"has done 6 steps already, and max_steps is 4; ask for 6 or more"):
        grpo(short)


def test_a_falling_schedule_is_that_of_today(tiny_folder):  # noqa: F811
    def made(max_steps: int, steps: int, state: Any = None) -> Any:
        model = load_model(tiny_folder)
        optimizer, schedule = make_optimizer(model, config.optim, max_steps)
        if state:
            restore(model, optimizer, schedule, state, Path("unused"))
        for _ in range(steps):
            schedule.step()
        return optimizer, schedule

    config = warmup_config(tiny_folder, Path("unused"), optim={"lr": 1.0, "schedule": "linear", "warmup_steps": 2})
    optimizer, schedule = made(10, 10)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    for max_steps, rate in ((10, 0.0), (20, 1 - 8 / 18)):
        again, later = made(max_steps, 0, state)
        assert [group["lr"] for group in again.param_groups] == pytest.approx([rate] * len(again.param_groups))
        assert later.get_last_lr() == pytest.approx([rate] * len(again.param_groups))
        straight, _ = made(max_steps, 10)
        assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in straight.param_groups]


def test_settings_that_change_no_result_may_change(tiny_folder, tmp_path):  # noqa: F811
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=4)
    stopped(config, grpo)
    other = {"micro_batch_size": 3, "rollout_batch_size": 1, "save_steps": 1, "logging_steps": 2, "report_to": ("tensorboard",),
             "background_rewards": True, "max_missing_rewards": 0.5, "gradient_checkpointing": True, "device": "cpu"}  # fmt: skip
    grpo(config.model_copy(update=other))
    for name, value in {"seed": 1, "num_generations": 2, "prompts_per_step": 1, "loss_type": "dapo", "dtype": "float32"}.items():
        with pytest.raises(ValueError, match=rf"other settings \(different: {name}\).*These may change: .*micro_batch_size"):
            grpo(config.model_copy(update={**other, name: value}))


def test_where_a_judge_is_may_change_and_what_it_is_may_not(tiny_folder, tmp_path):  # noqa: F811
    def options(**changes: Any) -> GRPOConfig:
        given = {"base_url": "http://localhost:1/v1", "model": "a", "retries": 0, "timeout_seconds": 1, **changes}
        return grpo_config(tiny_folder, tmp_path / "run", rewards=[{"name": "llm_text_critic", "options": given}])

    free = base.changeable_options([(r, base.load_reward(r.name)) for r in options().rewards])
    with RunFolder(tmp_path / "run", options(), free):
        pass
    with RunFolder(tmp_path / "run", options(base_url="http://other:2/v1", concurrency=3), free) as run:
        assert run.config.rewards[0].options["base_url"] == "http://other:2/v1"
    with pytest.raises(ValueError, match=r"different: rewards\.0\.options\.model\)"), RunFolder(tmp_path / "run", options(model="b"), free):
        pass


def test_what_was_set_is_compared_and_a_younger_default_is_not(tiny_folder, tmp_path):  # noqa: F811
    file = tmp_path / "run" / "config.yaml"
    config = grpo_config(tiny_folder, tmp_path / "run")

    def goes_on(config: GRPOConfig) -> GRPOConfig:
        with RunFolder(tmp_path / "run", config) as run:
            return run.config

    def edited(change: Any) -> None:
        stored = yaml.safe_load(file.read_text())
        change(stored)
        file.write_text(yaml.safe_dump(stored))

    goes_on(config)
    edited(lambda s: (s["config"].pop("max_skipped_records"), s["config"]["rewards"][0].pop("label"), s["config"].pop("eval_steps")))
    assert goes_on(config) == config  # saved before there were these settings
    edited(lambda s: (s["config"].pop("max_skipped_records"), s.pop("set")))
    assert goes_on(config) == config  # and before it was noted what was set
    edited(lambda s: s["config"]["advantages"].update(normalize="group"))  # as if that had been the default then
    for _ in range(3):  # and at every later start
        assert goes_on(config).advantages.normalize == "group"
    with pytest.raises(ValueError, match=r"different: advantages\.normalize\)"):
        goes_on(config.model_copy(update={"advantages": config.advantages.model_copy(update={"normalize": "step"})}))
    bare = grpo_config(tiny_folder, tmp_path / "run", lora={})
    assert "lora" in set_keys(bare)
    edited(lambda s: (s["config"].update(lora=bare.model_dump(mode="json")["lora"]), s.update(set=sorted(set_keys(bare)))))
    with pytest.raises(ValueError, match=r"different: lora"):
        goes_on(build(GRPOConfig, {**config.model_dump(exclude_unset=True), "lora": None}))
    with pytest.raises(ValueError, match=r"different: lora"):
        goes_on(config)
    edited(lambda s: (s["config"].update(lora=None), s.update(set=sorted(set_keys(config)))))
    edited(lambda s: s["config"].update(a_setting_of_tomorrow=1))
    with pytest.raises(ValueError, match=r"(?s)this version cannot resume: .*a_setting_of_tomorrow: unknown key"):
        goes_on(config)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        goes_on(config)


def test_keys_by_hand():
    sources = [{"name": "a"}, {"name": "b", "weight": 2}]
    config = build(WarmupConfig, {"output_dir": "o", "max_steps": 1, "optim": {"lr": 1}, "sources": sources})
    assert set_keys(config) == {"output_dir", "max_steps", "optim.lr", "sources.0.name", "sources.1.name", "sources.1.weight"}
    found = leaves(config)
    assert (found["optim.betas"], found["sources.0.weight"], found["lora"]) == ([0.9, 0.95], 1.0, None)


# --- one at a time -------------------------------------------------------------------------------------------------------


def test_two_starts_of_one_folder_do_not_write_through_each_other(tiny_folder, tmp_path):  # noqa: F811
    config = warmup_config(tiny_folder, tmp_path / "run")
    warmup(config.model_copy(update={"max_steps": 2}))
    script = (
        "import sys, time\nfrom diptych.config import WarmupConfig, build\nfrom diptych.runs import RunFolder\nimport json\n"
        "with RunFolder(sys.argv[1], build(WarmupConfig, json.loads(sys.argv[2]))):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run"), config.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=r"another process is training in .*run; wait for it, or choose another output_dir"):
            warmup(config)
        assert CliRunner().invoke(app, ["view", str(tmp_path / "run")]).exit_code == 0  # looking is free
        other.kill()  # -9
    warmup(config)
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run", config):
        raise ZeroDivisionError
    warmup(config)  # a fault leaves no lock


# --- logs ----------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_locked_is_trained_in_with_a_warning(tiny_folder, tmp_path, monkeypatch, caplog):  # noqa: F811
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), RunFolder(tmp_path / "run", warmup_config(tiny_folder, tmp_path / "run")):
        assert "cannot be locked ([Errno 37] No locks available): start no other run in it" in caplog.text


@pytest.mark.parametrize("content", ["[]", "{", '{"model x": 3}'])
def test_damaged_inputs_are_named(tiny_folder, tmp_path, content):  # noqa: F811
    config = warmup_config(tiny_folder, tmp_path / "run", max_steps=2)
    warmup(config)
    (tmp_path / "run" / "inputs.json").write_text(content)
    with pytest.raises(ValueError, match=r"inputs\.json"):
        warmup(config.model_copy(update={"max_steps": 3}))


def test_events_are_there_once_after_a_resume(tiny_folder, tmp_path):  # noqa: F811
    config = warmup_config(tiny_folder, tmp_path / "run", report_to="tensorboard", max_steps=5, save_steps=3)
    stopped(config, warmup, at=3)
    warmup(config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/text")] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
