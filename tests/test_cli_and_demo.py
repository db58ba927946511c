"""The command as a user meets it: help with examples, clear errors and exit codes, and the whole demo at a small size."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from diptych import demo as demo_module
from diptych.cli import app
from diptych.config import DemoConfig, load_config
from diptych.demo import run_demo
from diptych.document import Document
from diptych.evaluation.storyboard import Judged
from diptych.report import demo_page, run_page
from diptych.report.charts import line_chart
from diptych.runtime import rng as make_rng
from diptych.worlds.storyboard.oracle import judge
from diptych.worlds.storyboard.tasks import make_task
from diptych.worlds.storyboard.world import TERSE


def diptych(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "diptych", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "warmup",
        "grpo",
        "generate",
        "evaluate storyboard",
        "evaluate mmie",
        "evaluate ueval",
        "evaluate compare",
        "merge",
        "doctor",
        "view",
        "pretrain",
    ],
)
def test_every_command_has_help_with_an_example(command):
    result = CliRunner().invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grpo", "grpo", "--num_generatoins", "4"), "num_generatoins: unknown key; allowed are: model, output_dir"),
        (("warmup", "nothing.yaml"), "recipe 'nothing.yaml' does not exist"),
        (("grpo", "grpo", "--num_minibatches", "7"), "num_minibatches=7 does not divide the rollout batch"),
        (("generate", "hello", "--model", "no/such/folder"), "no model at 'no/such/folder'"),
        (("generate", "hello", "--image", "broken.png"), "cannot read image 'broken.png'"),
        (("generate", "hello", "--out", "a.pdf"), "allowed endings are .html and .json"),
        (("view", "."), "holds no run"),
    ],
)
def test_errors_are_one_clear_line_and_exit_1(tmp_path, arguments, message):
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    result = diptych(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert message in re.sub(r"\s+", " ", result.stderr)
    assert "Traceback" not in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["broken.png"]  # nothing half-written


def test_broken_data_is_named_with_file_and_line(tmp_path):
    data = tmp_path / "data.jsonl"
    arguments = ("warmup", "warmup", "--output_dir", "run", "--sources.0.name", "data.jsonl", "--max_steps", "1")
    data.write_text("")
    assert "data set data.jsonl is empty" in diptych(*arguments, cwd=tmp_path).stderr
    data.write_text('{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n{"messages": oops}\n')
    result = diptych(*arguments, cwd=tmp_path)
    assert "data.jsonl:2: not a record" in result.stderr
    assert result.returncode == 1


def test_generate_writes_a_document(tmp_path):
    out = tmp_path / "answer.json"
    result = diptych("generate", "draw this . on the left a small red ball , at night .", "--out", str(out))
    assert result.returncode == 0, result.stderr
    document = Document.from_blocks(json.loads(out.read_text()))
    assert document.images[0].pixels.size == (96, 96)


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume_and_exits_130(tmp_path):
    command = [sys.executable, "-m", "diptych", "warmup", "warmup", "--output_dir", "run", "--num_threads", "1"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.time() + 100
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "run the same command again to resume" in " ".join(output.split())
    assert "Traceback" not in output


def test_ctrl_c_inside_generated_code_exits_130_too(tmp_path):
    """`python -m` of CPython remembers an interrupt that passed through `exec` of a string, and dies of it at the very end."""
    (tmp_path / "interrupted.py").write_text(
        "import sys\nfrom diptych.cli.app import app, main\n"
        "@app.command()\ndef stop(): exec('raise KeyboardInterrupt')\n"
        "@app.command()\ndef other(): pass\n"
        "sys.argv = ['diptych', 'stop']\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 130
    assert "run the same command again to resume" in result.stdout


@pytest.mark.parametrize("recipe", [[], ["demo"]])
def test_demo_takes_settings_with_and_without_a_recipe(recipe):
    result = diptych("demo", *recipe, "--evaluate.num_prompt", "3", "--seed", "1")
    assert result.returncode != 0
    assert "num_prompt: unknown key" in result.stderr.replace("\n", " ")


def test_one_outlier_does_not_flatten_a_chart():
    points = [(float(x), 0.1 * (x % 3)) for x in range(20)]
    chart = line_chart("KL", [("text", "red", [*points[:9], (9.0, 1e6), *points[10:]])])
    labels = [float(part.split("<")[0]) for part in chart.split('text-anchor="end">')[1:4]]
    assert max(labels) < 1


def test_the_whole_demo_at_a_small_size(tmp_path):
    config = load_config(
        DemoConfig, "demo",
        ["--output_dir", str(tmp_path / "demo"), "--warmup.max_steps", "6", "--warmup.batch_size", "4", "--warmup.num_eval_records", "6",
         "--warmup.num_threads", "1", "--grpo.num_threads", "1", "--grpo.max_steps", "2", "--grpo.prompts_per_step", "2",
         "--grpo.num_generations", "4", "--grpo.micro_batch_size", "8", "--evaluate.num_prompts", "9",
         "--evaluate.num_retention", "6", "--evaluate.batch_size", "9", "--control.changes", '{"rewards.1.weight": 0}'],
    )  # fmt: skip
    console = Console(file=(tmp_path / "out.txt").open("w", buffering=1), width=160)
    results = run_demo(config, console)
    stored = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert set(stored) >= {"checkpoints", "retention", "num_prompts", "seconds", "versions"}
    assert list(stored["labels"]) == list(stored["checkpoints"]) == ["base", "warmup", "control", "grpo"]
    for name in stored["labels"]:
        for mode in ("greedy", "sampled"):
            row = stored["checkpoints"][name][mode]
            for rate in ("format", "text", "image", "given", "order", "document", "score"):
                low, high = row[f"{rate}_ci"]
                assert 0 <= low <= row[rate] <= high <= 1
    kinds = stored["greedy_by_kind"]["base"]
    assert sum(row["prompts"] for row in kinds.values()) == 9
    assert all(kind in (tmp_path / "out.txt").read_text() for kind in kinds)
    assert set(stored["seconds"]) == {"warmup", "grpo", "control", "evaluation", "total"}
    assert set(stored["retention"]) == {"text_to_image", "understanding", "editing"}
    first = stored["greedy_by_picture"]["warmup"][0]
    assert first["pictures"] == 9
    configs = [yaml.safe_load((tmp_path / "demo" / name / "config.yaml").read_text())["config"] for name in ("grpo", "control")]
    assert [config["rewards"][1]["weight"] for config in configs] == [1, 0]
    assert configs[0]["model"] == configs[1]["model"]
    assert stored["checkpoints"]["base"]["greedy"]["document"] == 0  # it cannot interleave
    assert stored["parity"]["image_max"] <= 1e-4
    assert stored["parity"]["text_max"] <= 1e-4
    assert stored["parity"]["first_ratio_gap"] <= 1e-4
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "<script" not in page
    assert all(f"</i>{curve}<" in page for curve in ("format", "text_likelihood"))  # one for each reward that spoke
    assert all(f"<td>{kind}</td><td>{row['prompts']}</td>" in page for kind, row in kinds.items())
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', page)  # one self-contained file
    assert page.count('class="task card"') == 6
    assert "rewards" in run_page(tmp_path / "demo" / "grpo").lower()

    # prompts behind the first six are shown where the verdict changed
    def example(*right: bool) -> dict:
        answers = {
            n: {"answer": [], "steps": [], "document": {"oracle/whole document": r}}
            for n, r in zip(("base", "warmup", "control", "grpo"), (right[0], *right), strict=True)
        }
        return {"family": "story", "prompt": [{"type": "text", "text": f"told {right}"}], "answers": answers}

    assert "Where the verdict changed" not in page
    same, won, lost = example(False, True, True), example(False, False, True), example(True, True, False)
    page = demo_page(stored, [won, *[same] * 5, same, won, same, lost], tmp_path / "demo")
    first, changed = page.split("Where the verdict changed")
    assert [part.count('class="task card"') for part in (first, changed)] == [6, 2]
    assert "The first 2 prompts after those above" in changed
    # a second run finds everything done and leaves the same numbers
    again = run_demo(config, console)
    assert again["checkpoints"] == results["checkpoints"]
    # of a folder whose evaluations lack the pictures, they are made again
    old = tmp_path / "demo" / "evaluation" / "base.json"
    old.write_text(json.dumps({key: value for key, value in json.loads(old.read_text()).items() if key != "greedy_by_picture"}))
    assert run_demo(config, console)["greedy_by_picture"] == results["greedy_by_picture"]


def test_what_is_counted_of_each_picture():
    """The second picture of every document repeats the first one, so it is wrong given the first, and the third may be right again."""
    config = load_config(DemoConfig, "demo", {"grpo.rewards": [{"name": "next_picture", "modality": "image"}], "control": None})
    tasks = [make_task(make_rng(4, i), "test", "story", TERSE) for i in range(6)]
    answers = []
    for task in tasks:
        segments = list(task.truth.document().segments)
        segments[3] = segments[1]
        answers.append(Document(tuple(segments)))
    verdicts = judge(answers, [task.truth for task in tasks])
    judged = [Judged(*parts) for parts in zip(tasks, answers, verdicts, strict=True)]
    first, second, *_ = demo_module._by_picture(judged, demo_module._rewards(judged, config.grpo), config)
    assert (first["pictures"], first["right"], first["given"]) == (6, 1.0, 1.0)
    assert (second["pictures"], second["right"], second["given"]) == (6, 0.0, 0.0)
    assert first["rewards"]["next_picture"] > second["rewards"]["next_picture"] + 0.2


def test_doctor_exits_with_1_on_problems_and_prints_json(tmp_path):
    healthy = diptych("doctor", "--model", "storyboard", "--json")
    assert healthy.returncode == 0
    assert json.loads(healthy.stdout)["problems"] == []
    (tmp_path / "config.json").write_text("{}")
    broken = diptych("doctor", "--model", str(tmp_path))
    assert broken.returncode == 1
    assert "known families are" in re.sub(r"\s+", " ", broken.stdout)
    assert "packaged demo" in diptych("doctor").stdout
