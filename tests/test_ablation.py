"""`diptych ablate`: statistics against tables, suites that build, a grid that survives a kill, pages that hold what was found."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import PIL.Image
import pydantic
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from diptych.ablation import documents, pages, runner, sentences, summary, trials, weak_rewards
from diptych.ablation.measures import MEASURES
from diptych.ablation.runner import grid, run_grid
from diptych.ablation.suite import Suite, evaluated_steps, load_suite, packaged_suites, variant_config
from diptych.ablation.summary import by_seed
from diptych.ablation.trials import Trial, run_trial
from diptych.cli import app
from diptych.config import Config, EvaluateConfig, GRPOConfig, PTXConfig, RewardConfig, SamplingParams, WarmupConfig, build
from diptych.document import Document, Image, Text, to_message
from diptych.report.intervals import Line, Point, Row, dot_chart, interval_chart
from diptych.runs import read_jsonl
from diptych.statistics import estimate, holm, incomplete_beta, paired, t_quantile, t_two_sided
from diptych.training.grpo import grpo

RECORDS = Path(__file__).parents[1] / "docs" / "results"
TINY = {
    "warmup.max_steps": 2, "warmup.batch_size": 2, "warmup.num_eval_records": 2, "warmup.sampling.max_text_tokens": 4, "grpo.max_steps": 4,
    "grpo.prompts_per_step": 2, "grpo.num_generations": 2, "grpo.num_minibatches": 1, "grpo.ptx": None, "grpo.sampling.max_text_tokens": 12,
    "grpo.sampling.max_images": 1, "evaluate.num_prompts": 3, "evaluate.num_retention": 2,
}  # fmt: skip
SUITE = {
    "title": "Tiny", "question": "Does anything happen?", "paper": "Nothing of the kind.", "base": {"changes": TINY}, "seeds": 1,
    "checkpoints": [2], "reference": "packaged", "measures": ["greedy/score", "sampled/score", "train/kl/text"],
    "variants": [
        {"name": "packaged", "label": "Packaged"},
        {"name": "outcome", "label": "Outcome <b>", "changes": {"grpo.advantages.credit": "outcome"}},
    ],
}  # fmt: skip


def suite_of(folder: Path, **updates) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **updates}))
    return path


def claims(better: str, worse: str) -> dict:
    return {"claims": [{"better": better, "worse": worse, "paper": "2 against 1"}]}


def changed_base(**updates) -> dict:
    return {"base": {"changes": {**TINY, **{key.replace("__", "."): value for key, value in updates.items()}}}}


def silent(step: int, total: int, said: str) -> None:
    pass


def console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=200), stream


# --- statistics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "wanted"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045), (120, 1.980)]
)  # fmt: skip
def test_t_quantiles_are_those_of_the_tables(degrees, wanted):
    assert t_quantile(0.975, degrees) == pytest.approx(wanted, abs=5e-4)
    assert t_two_sided(wanted, degrees) == pytest.approx(0.05, abs=2e-4)


def test_t_has_its_closed_forms():
    for t in (0.0, 0.3, 1.0, 7.0, 300.0):
        assert t_two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)  # Cauchy
        assert t_two_sided(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)


def test_t_is_the_integral_of_its_density():
    degrees, t, n = 7, 1.3, 20000
    scale = math.gamma(4) / (math.sqrt(7 * math.pi) * math.gamma(3.5))
    middle = sum(scale * (1 + (t * (i + 0.5) / n) ** 2 / degrees) ** -4 for i in range(n)) * t / n  # P(0 < T < 1.3)
    assert t_two_sided(t, degrees) == pytest.approx(1 - 2 * middle, abs=1e-9)


def test_incomplete_beta_by_hand():
    assert incomplete_beta(1, 1, 0.3) == pytest.approx(0.3)
    assert incomplete_beta(3, 1, 0.4) == pytest.approx(0.4**3)
    assert incomplete_beta(2, 3, 0.5) == pytest.approx(11 / 16)  # 12 * (1/8 - 2/24 + 1/64)
    assert incomplete_beta(2, 3, 0.9) + incomplete_beta(3, 2, 0.1) == pytest.approx(1)
    assert (incomplete_beta(2, 3, 0.0), incomplete_beta(2, 3, 1.0)) == (0, 1)
    with pytest.raises(ValueError, match="x between 0 and 1"):
        incomplete_beta(2, 3, 1.5)


def test_estimate_by_hand():
    found = estimate([1.0, 2.0, 3.0])  # s = 1, half = 4.3027 / sqrt(3)
    assert (found.n, found.mean) == (3, 2)
    assert found.high - 2 == pytest.approx(2.4841, abs=1e-4) == 2 - found.low
    alone = estimate([0.4])
    assert (alone.mean, alone.low, alone.high) == (0.4, None, None)
    with pytest.raises(ValueError, match="no values"):
        estimate([])


def test_paired_test_on_students_sleep_data():
    """Student (1908), as R's t.test(paired = TRUE) gives it: t = 4.0621, df = 9, p = 0.002833, interval 0.7001 to 2.4599."""
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    found = paired(second, first)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == (pytest.approx(0.7001142, abs=1e-6), pytest.approx(2.4598858, abs=1e-6))
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert paired(first, second).p == found.p


def test_differences_without_spread_are_not_tested():
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1
    assert paired([1.5, 2.5], [1.0, 2.0]).p is None
    assert paired([1.0], [0.0]).p is None
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])


def test_holm_by_hand():
    # sorted 0.005 0.01 0.03 0.04, times 4 3 2 1: 0.02 0.03 0.06 and 0.04, which may not be smaller than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.7]) == [1, None, 1]  # 0.6 * 2 is cut at 1
    assert holm([]) == []


# --- suites --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", packaged_suites())
def test_packaged_suites_build_every_variant(name):
    short, suite = load_suite(name)
    assert short == name
    entries = grid(suite, range(2))
    assert len(entries) == 2 * len(suite.variants)
    for entry in entries:
        config = variant_config(suite, entry.variant, entry.seed)
        assert config.grpo.num_generations * config.grpo.prompts_per_step == 48
        assert config.grpo.num_threads == config.warmup.num_threads == 1
        assert config.grpo.seed == config.warmup.seed == entry.seed
        steps = evaluated_steps(suite, config)
        assert steps[-1] == config.grpo.max_steps
        if entry.trial.stage == "grpo":
            assert all(step % entry.trial.settings["grpo"]["save_steps"] == 0 for step in steps[:-1])
    assert len(suite.paper) > 30
    assert suite.question.endswith("?")


def test_suites_share_cells_and_warmups():
    entries = {name: grid(load_suite(name)[1], range(2)) for name in ("rewards", "credit", "stages")}
    key = {name: {(e.variant.name, e.seed): e.trial.key for e in found} for name, found in entries.items()}
    assert key["rewards"][("process", 1)] == key["credit"][("process_half_step", 1)] == key["stages"][("grpo", 1)]
    assert key["rewards"][("format_text_image", 0)] == key["credit"][("outcome", 0)] != key["credit"][("outcome", 1)]
    assert key["stages"][("base", 0)] == key["stages"][("base", 1)]  # no seed enters it
    warmups = {trials.warmup_trial(e.trial).key for e in entries["credit"]}
    assert warmups == {key["stages"][("warmup", seed)] for seed in (0, 1)}


DEFAULTS = Path(__file__).parent / "data" / "defaults.json"


def defaults(cls: type[Config]) -> dict[str, Any]:
    """Setting -> its default, as JSON."""
    fields = {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items() if not field.is_required()}
    return {name: json.loads(pydantic.TypeAdapter(Any).dump_json(value)) for name, value in fields.items()}


def test_a_default_that_changes_makes_other_cells():
    """A trial is named by what differs from the defaults: another default needs another `trials.DEFAULTS`. A setting that is new is added
    here (`DEFAULTS.write_text(json.dumps(now, indent=1))`) and changes no trial."""
    now = {cls.__name__: defaults(cls) for cls in (WarmupConfig, GRPOConfig, EvaluateConfig, SamplingParams, PTXConfig, RewardConfig)}
    stored = json.loads(DEFAULTS.read_text())
    assert stored.pop("DEFAULTS") == trials.DEFAULTS
    assert now == stored


def test_a_trial_is_named_by_what_differs_from_the_defaults():
    _, suite = load_suite("credit")
    trial = grid(suite, [0])[-1].trial
    assert trial.settings["defaults"] == trials.DEFAULTS
    assert "code_cache" not in trial.settings["grpo"]
    assert "label" not in trial.settings["grpo"]["rewards"][0]
    again = build(GRPOConfig, {**trial.settings["grpo"], "output_dir": "o"})
    assert trials._said(again, {"output_dir", "model"}) == trial.settings["grpo"]


def test_other_packaged_weights_make_other_trials_where_they_are_used(tmp_path, monkeypatch):
    """A package that is added, or trained again, leaves trials alone that neither train with it nor are asked by it."""
    monkeypatch.setattr(trials, "packaged_folder", lambda name: tmp_path / name)

    def trained(name: str, weights: bytes) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        trials._hash_of.cache_clear()

    def hashes() -> list[str]:
        return [trials.packaged_weights({"grpo": {"rewards": [{"name": name}]}}) for name in ("format", "next_picture")]

    trained("storyboard", b"1")
    alone = hashes()
    assert alone[0] == alone[1]
    trained("next_picture", b"1")
    added = hashes()
    assert (added[0] == alone[0], added[1] == alone[1]) == (True, False)
    trained("storyboard", b"2")
    assert not set(hashes()) & set(added)


def test_changes_come_after_the_base_and_overrides_before_the_variant(tmp_path):
    _, suite = load_suite(str(suite_of(tmp_path)), ["--grpo.advantages.credit", "mixed", "--grpo.optim.lr=1e-5"])
    credit = {v.name: variant_config(suite, v, 0).grpo.advantages.credit for v in suite.variants}
    assert credit == {"packaged": "mixed", "outcome": "outcome"}
    config = variant_config(suite, suite.variants[0], 3)
    assert (config.grpo.optim.lr, config.warmup.max_steps, config.grpo.ptx, config.seed) == (1e-5, 2, None, 3)


def second(name: str = "b", **settings) -> dict:
    return {"variants": [SUITE["variants"][0], {"name": name, "label": "B", **settings}]}


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (changed_base(grpo__max_stepz=3), r"variant 'packaged': wrong configuration .*grpo\.max_stepz: unknown key; allowed are: model, "),
        (second(changes={"grpo.optim.lrr": 1}), r"variant 'b'.*grpo\.optim\.lrr: unknown key; allowed are: name, lr"),
        (second(changes={"grpo.rewards.7.weight": 1}), "allowed are 0 to 2"),
        (second(changes={"grpo.rewards.0.name": "no"}), "unknown reward 'no'"),
        (second(), "'packaged' and 'b' have the same settings"),
        (second("packaged"), "two variants have the same name"),
        (second(stage="warmup", changes={"grpo.optim.lr": 1}), r"stops at warmup, so grpo\.optim\.lr would have no effect"),
        (changed_base(grpo__seed=1), "grpo.seed is set by the grid; use --seeds"),
        (changed_base(max_steps=1), "max_steps: not a setting of the demo; allowed are leaves such as grpo.max_steps"),
        ({"refrence": "packaged"}, "refrence: unknown key; allowed are: title, question, paper, base"),
        ({"reference": "nobody"}, "reference 'nobody' is no variant; allowed are: packaged, outcome"),
        ({"measures": ["greedy/scores"]}, "unknown measures greedy/scores; allowed are: greedy/score"),
        ({"checkpoints": [0]}, "steps count from 1"),
        (claims("outcome", "nobody"), "claim 'outcome' above 'nobody': give two different ones of: packaged, outcome"),
        (claims("outcome", "outcome"), "claim 'outcome' above 'outcome': give two different ones"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, monkeypatch, updates, message):
    monkeypatch.chdir(tmp_path)
    path = suite_of(tmp_path, **updates)
    result = CliRunner().invoke(app, ["ablate", str(path)])
    assert isinstance(result.exception, ValueError)
    assert re.search(message, str(result.exception), re.S), result.exception
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.yaml"]


def test_the_command_lists_suites_and_explains_itself():
    assert "Example:" in CliRunner().invoke(app, ["ablate", "--help"]).output
    listed = CliRunner().invoke(app, ["ablate", "--list"]).output
    assert all(name in listed for name in packaged_suites())
    assert "no suite 'nothing'; give a .yaml file or one of: aggregation, " in str(CliRunner().invoke(app, ["ablate", "nothing"]).exception)


# --- trials ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_trial() -> Trial:
    suite = Suite.model_validate(SUITE)
    return grid(suite, [0])[0].trial


@pytest.fixture(scope="module")
def finished(tiny_trial, tmp_path_factory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("ablations")
    return root, run_trial(root, tiny_trial, silent)


def numbers(found: dict) -> dict:
    return {key: value for key, value in found.items() if key not in ("seconds", "versions")}


def test_a_trial_is_evaluated_at_its_checkpoints(finished, tiny_trial):
    root, found = finished
    assert list(found["points"]) == ["2", "4"]
    for values in found["points"].values():
        assert set(values) >= {"greedy/score", "sampled/document", "retention/understanding", "train/kl/text", "train/rewards/format/mean"}
        assert all(m in MEASURES or m.startswith("train/rewards/") for m in values)
    assert set(found["parity"]) == {"text_max", "image_max"}
    assert set(found["seconds"]) == {"grpo", "evaluation"}
    run = tiny_trial.folder(root) / "run"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_4"]  # and its optimizer is gone
    assert [p.name for p in (run / "checkpoints" / "step_4").iterdir()] == ["model"]
    assert (tiny_trial.folder(root) / "summary.json").stat().st_size < 10_000


def test_evaluating_within_a_training_does_not_change_it(finished, tiny_trial, tmp_path):
    root, _ = finished
    model, _ = trials.trained_warmup(root, tiny_trial, silent)
    grpo(build(GRPOConfig, {**tiny_trial.settings["grpo"], "model": model, "output_dir": str(tmp_path / "plain")}))
    times = ("seconds/rollout", "step_time")
    plain, ours = (
        [{k: v for k, v in line.items() if k not in times} for line in read_jsonl(run / "metrics.jsonl")]
        for run in (tmp_path / "plain", tiny_trial.folder(root) / "run")
    )
    assert plain == ours


def test_a_killed_trial_resumes_and_nothing_is_evaluated_twice(finished, tiny_trial, tmp_path, monkeypatch):
    real, seen = trials.evaluate_model, []
    monkeypatch.setattr(trials, "warmup", lambda *_: pytest.fail("the warm-up is there"))
    (tmp_path / "warmups").symlink_to(finished[0] / "warmups")

    def stopped(source, *arguments):
        seen.append(Path(source).parent.name)
        if len(seen) in (1, 3):  # while step 2, and then while step 4, is evaluated
            raise KeyboardInterrupt
        return real(source, *arguments)

    monkeypatch.setattr(trials, "evaluate_model", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_trial(tmp_path, tiny_trial, silent)
    found = run_trial(tmp_path, tiny_trial, silent)
    assert seen == ["step_2", "step_2", "step_4", "step_4"]
    assert numbers(found) == numbers(finished[1])
    assert run_trial(tmp_path, tiny_trial, silent) == found  # finished: read back
    assert len(seen) == 4


def test_two_workers_share_one_warmup(tiny_trial, tmp_path, monkeypatch):
    calls = []

    def slow(config, progress):
        calls.append(config.output_dir)
        time.sleep(0.3)
        progress(config.max_steps, config.max_steps, {"loss/text": 0.0})
        Path(trials.checkpoint_of(config)).mkdir(parents=True)

    monkeypatch.setattr(trials, "warmup", slow)
    other = Trial({**tiny_trial.settings, "evaluate": {**tiny_trial.settings["evaluate"], "num_prompts": 5}})
    found: list = []
    workers = [
        threading.Thread(target=lambda c=trial: found.append(trials.trained_warmup(tmp_path, c, silent))) for trial in (tiny_trial, other)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(calls) == 1
    assert found[0] == found[1]


def test_a_trial_of_other_settings_is_refused(finished, tiny_trial, tmp_path):
    folder = tiny_trial.folder(tmp_path)
    tiny_trial.prepare(tmp_path)
    (folder / "summary.json").write_text(json.dumps(finished[1]))
    assert tiny_trial.summary(tmp_path) == finished[1]
    stored = json.loads((folder / "settings.json").read_text())
    stored["grpo"]["optim"]["lr"] = 1.0
    (folder / "settings.json").write_text(json.dumps(stored))
    for call in (tiny_trial.summary, tiny_trial.prepare, lambda root: run_trial(root, tiny_trial, silent)):
        with pytest.raises(ValueError, match=r"was changed \(grpo\.optim\.lr\).*Delete .* to run it again"):
            call(tmp_path)
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match="nothing says what"):
        tiny_trial.summary(tmp_path)


# --- the grid ------------------------------------------------------------------------------------------------------------


def ablate(folder: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "diptych", "ablate", str(folder / "tiny.yaml"), "--output-dir", str(folder / "out"), *arguments]


def until(condition, seconds: float = 200) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_grid_goes_on_and_a_failed_cell_stops_nobody(tmp_path):
    failing = {"name": "failing", "label": "Failing", "changes": {"grpo.rewards": [{"name": "toy_rewards:raises"}]}}
    suite_of(tmp_path, variants=[failing, *SUITE["variants"][:1]], checkpoints=[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    _, suite = load_suite(str(tmp_path / "tiny.yaml"))
    failing_trial, trial = (entry.trial for entry in grid(suite, [0]))
    root = tmp_path / "out"
    warmup_summary = trials.warmup_trial(trial).folder(root) / "summary.json"
    evaluation = trial.folder(root) / "evaluation" / "step_1.json"
    first = subprocess.Popen(ablate(tmp_path, "--jobs", "1"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(evaluation.is_file)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with (trial.folder(root) / "lock").open("w") as lock:  # its worker ends with it
        until(lambda: not _held(lock))
    assert not (trial.folder(root) / "summary.json").exists()
    times = warmup_summary.stat().st_mtime_ns, evaluation.stat().st_mtime_ns

    second = subprocess.run(ablate(tmp_path, "--jobs", "1"), env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 1
    said = re.sub(r"\s+", " ", second.stdout)
    assert "failed: failing, seed 0" in said
    assert "ConnectionError: the judge is not there" in said
    assert "Traceback" not in second.stderr
    assert "Packaged: score, greedy" in said
    assert "Failing: not finished, or failed, for seed 0." in said
    assert (warmup_summary.stat().st_mtime_ns, evaluation.stat().st_mtime_ns) == times
    assert (trial.folder(root) / "summary.json").is_file()
    assert not (failing_trial.folder(root) / "summary.json").exists()
    record = json.loads((root / "tiny" / "results.json").read_text())
    assert [variant["seeds"] for variant in record["variants"]] == [[], [0]]
    assert record["variants"][1]["steps"] == [0, 1, 4]


def _held(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


# --- records and pages ---------------------------------------------------------------------------------------------------


def pretend(root: Path, entries: list[runner.Entry], score=lambda entry, step: 0.5) -> None:
    """Finished trials with made-up numbers."""
    for entry in entries:
        for trial in {trials.warmup_trial(entry.trial).key: trials.warmup_trial(entry.trial), entry.trial.key: entry.trial}.values():
            steps = trial.settings["steps"] if trial is entry.trial else [0]
            points = {str(s): {"greedy/score": score(entry, s), "sampled/score": 0.25, "train/kl/text": 0.001234} for s in steps}
            trial.prepare(root)
            found = {
                "cell": trial.key,
                "seed": entry.seed,
                "points": points,
                "parity": {"text_max": 1e-5},
                "seconds": {"grpo": 60},
                "versions": {"torch": "2"},
            }
            (trial.folder(root) / "summary.json").write_text(json.dumps(found))


def by_hand(entry: runner.Entry, step: int) -> float:
    """packaged: 40, 42, 44 % at the end; outcome 3, 5, 4 points more, and more than that mean at step 2 already."""
    if step == 0:
        return 0.1
    if entry.variant.name == "packaged":
        return 0.30 if step == 2 else 0.40 + 0.02 * entry.seed
    return 0.43 if step == 2 else 0.40 + 0.02 * entry.seed + (0.03, 0.05, 0.04)[entry.seed]


@pytest.fixture
def record(tmp_path) -> summary.Record:
    name, suite = load_suite(str(suite_of(tmp_path)), ["--grpo.optim.lr", "1e-5"])
    entries = grid(suite, range(3))
    pretend(tmp_path / "out", entries, by_hand)
    return summary.collect(name, suite, entries, tmp_path / "out", ["--grpo.optim.lr", "1e-5"])


def test_the_table_by_hand(record):
    packaged, outcome = record["table"]
    final = packaged["final"]["greedy/score"]  # 0.40 0.42 0.44: s = 0.02, half = 4.3027 * 0.02 / sqrt(3) = 0.04968
    assert (final["n"], final["mean"]) == (3, 0.42)
    assert (final["low"], final["high"]) == (pytest.approx(0.37032, abs=1e-5), pytest.approx(0.46968, abs=1e-5))
    difference = outcome["difference"]["greedy/score"]  # 0.03 0.05 0.04: mean 0.04, s = 0.01, t = 0.04 / (0.01 / sqrt(3)) = 6.9282
    assert difference["mean"] == pytest.approx(0.04)
    assert difference["p"] == pytest.approx(1 - 6.9282 / math.sqrt(2 + 6.9282**2), abs=1e-5)  # two degrees of freedom
    assert outcome["p_holm"] == difference["p"]  # one test
    assert "p" not in outcome["difference"]["sampled/score"]
    assert packaged["difference"] == {}
    assert outcome["reaches"] == {"step": 2, "of": 4}  # 0.43 >= 0.42
    assert packaged["reaches"] == {"step": 4, "of": 4}


def test_no_variant_reaches_what_is_higher_than_it(record):
    first, second = record["variants"]
    assert summary.reaches(first, second, "greedy/score") == {"step": None, "of": 4}
    assert summary.reaches(first, second, "train/kl/text") is None  # less KL is not reaching


def test_only_common_seeds_are_compared(record):
    outcome = record["variants"][1]
    outcome["seeds"] = [0, 2]
    outcome["values"] = {m: [rows[0], rows[2]] for m, rows in outcome["values"].items()}
    row = summary.table(record)[1]
    assert row["final"]["greedy/score"]["n"] == row["difference"]["greedy/score"]["n"] == 2
    assert row["difference"]["greedy/score"]["mean"] == pytest.approx(0.035)  # 0.03 and 0.04
    assert "Outcome <b>: not finished, or failed, for seed 1." in sentences.caveats(record)


def test_intervals_of_shares_end_at_0_and_1(tmp_path):
    name, suite = load_suite(str(suite_of(tmp_path)))
    entries = grid(suite, range(2))
    pretend(tmp_path, entries, lambda entry, step: (0.0, 1.0)[entry.seed])
    final = summary.collect(name, suite, entries, tmp_path)["table"][0]["final"]["greedy/score"]
    assert (final["mean"], final["low"], final["high"]) == (0.5, 0, 1)


def test_one_seed_has_no_interval_and_says_so(tmp_path):
    name, suite = load_suite(str(suite_of(tmp_path)))
    entries = grid(suite, [0])
    pretend(tmp_path, entries, by_hand)
    record = summary.collect(name, suite, entries, tmp_path)
    assert record["table"][0]["final"]["greedy/score"]["low"] is None
    assert record["table"][1]["p_holm"] is None
    text = " ".join((*sentences.caveats(record), *sentences.findings(record)))
    assert "One seed: no interval and no test." in text
    assert "+3.0 against Packaged (one seed: this may be chance)" in text
    assert "One seed: no interval" in pages.suite_page(record)


def test_the_page_holds_what_the_record_holds(record, tmp_path):
    pages.write(record, tmp_path / "tiny")
    assert json.loads((tmp_path / "tiny" / "results.json").read_text()) == json.loads(json.dumps(record))
    page = (tmp_path / "tiny" / "report.html").read_text()
    for sentence in sentences.findings(record):
        assert sentence.replace("<b>", "&lt;b&gt;") in page
    assert "Outcome <b>" not in page
    for row in record["table"]:
        for measure, final in row["final"].items():
            assert f">{MEASURES[measure].show(final['mean'])}<" in page
    assert "42.0" in page
    assert "37.0 to 47.0" in page
    assert "+4.0 (+1.5 to +6.5)" in page
    assert page.count("<svg") == 1 + len(record["measures"])
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    assert "grpo.advantages.credit: &quot;outcome&quot;" in page
    assert "grpo.optim.lr: 1e-05" in page
    assert all(key in page for variant in record["variants"] for key in variant["cells"])
    assert not re.search(r'(src|href)="', page)  # one self-contained file
    shown, stream = console()
    pages.show(record, shown)
    assert "+4.0" in stream.getvalue()


def test_words_and_p_values(record):
    packaged, outcome = sentences.findings(record)
    assert packaged == "Packaged: score, greedy 42.0 (37.0 to 47.0)."
    assert outcome == (
        "Outcome <b>: score, greedy 46.0 (39.4 to 52.6); +4.0 against Packaged (+1.5 to +6.5; p = 0.020: a difference). "
        "It reaches the final value of Packaged by step 2 (50 % of its 4 steps)."
    )
    assert sentences.p_text(0.0004) == "below 0.001"


def test_measures_beside_the_first_are_told_where_their_interval_is_off_zero(record):
    outcome = record["variants"][1]
    outcome["values"]["sampled/score"] = [
        [row[0], row[1], 0.15 + 0.01 * seed] for seed, row in enumerate(outcome["values"]["sampled/score"])
    ]
    record["table"] = json.loads(json.dumps(summary.table(record)))
    _, said = sentences.findings(record)  # -0.10 -0.09 -0.08: mean -0.09, s = 0.01, half = 4.3027 * 0.01 / sqrt(3) = 0.02484
    assert said.endswith(" Not tested, with an interval on one side of zero: score, sampled -9.0 (-11.5 to -6.5).")


def test_where_warmups_differ_the_words_tell_what_grpo_added(record):
    outcome = record["variants"][1]
    assert all("before GRPO" not in said for said in sentences.findings(record))  # all start at 10 %
    outcome["values"]["greedy/score"] = [[0.2, *row[1:]] for row in outcome["values"]["greedy/score"]]
    packaged, other = sentences.findings(record)
    assert "42.0 (37.0 to 47.0); 10.0 before GRPO, which added +32.0 (+27.0 to +37.0)" in packaged  # 0.30 0.32 0.34: half 0.04968
    assert "; 20.0 before GRPO, which added +26.0 (+19.4 to +32.6)" in other  # 0.23 0.27 0.28: s = 0.02646, half = 0.06572
    outcome["seeds"], outcome["values"] = [1], {m: [rows[1]] for m, rows in outcome["values"].items()}
    unknown = {**outcome, "name": "third", "label": "Third", "steps": [2, 4]}  # its warm-up was not evaluated
    unknown["values"] = {m: [row[1:] for row in rows] for m, rows in outcome["values"].items()}
    record["variants"].append(unknown)
    record["table"] = json.loads(json.dumps(summary.table(record)))
    _, one_seed, third = sentences.findings(record)
    assert "; 20.0 before GRPO, which added +27.0. " in one_seed
    assert "before GRPO" not in third


@pytest.mark.parametrize(
    ("better", "noise", "order", "shown"),
    [
        ("outcome", 0, "the same", "+4.0 (+1.5 to +6.5)"),
        ("packaged", 0, "the opposite", "-4.0 (-6.5 to -1.5)"),
        ("outcome", 0.05, "not shown", "+4.0 (-7.4 to +15.4)"),  # 0.08 0.05 -0.01: s = 0.0458258, half = 4.3027 * s / sqrt(3) = 0.11384
    ],
)
def test_what_the_paper_says_is_answered(tmp_path, better, noise, order, shown):
    worse = {"outcome": "packaged", "packaged": "outcome"}[better]
    name, suite = load_suite(str(suite_of(tmp_path, **claims(better, worse))))
    entries = grid(suite, range(3))
    by_chance = {0: noise, 1: 0, 2: -noise}
    pretend(tmp_path / "out", entries, lambda e, s: by_hand(e, s) + (by_chance[e.seed] if e.variant.name == "outcome" else 0))
    record = summary.collect(name, suite, entries, tmp_path / "out")
    (verdict,) = sentences.verdicts(record)
    assert (verdict.order, verdict.paper, verdict.shown) == (order, "2 against 1", f"score, greedy {shown}")
    folder = tmp_path / "docs"
    documents.publish(record, folder)
    text = documents.results_document(folder)
    assert f"| {verdict.better} above {verdict.worse} | 2 against 1 | {verdict.shown} | {order} | Tiny |" in text
    assert f"- {verdict.sentence}" in text
    assert ("this differs from the paper" in verdict.sentence) == (order == "the opposite")
    record["claims"][0]["measure"] = record["measures"][1]
    (other,) = sentences.verdicts(record)
    assert other.shown.startswith(MEASURES[record["measures"][1]].label)
    record["claims"][0] |= {"measure": None, "step": 2}
    (early,) = sentences.verdicts(record)
    at_2 = [by_seed({v["name"]: v for v in record["variants"]}[name], "greedy/score", 2) for name in (better, worse)]
    gap = 100 * sum(at_2[0][seed] - at_2[1][seed] for seed in at_2[0]) / 3
    assert early.shown.startswith(f"score, greedy at step 2 {gap:+.1f} (")


@pytest.mark.parametrize(
    ("more", "message"),
    [({"measure": "greedy/taste"}, "unknown measures greedy/taste"), ({"step": 3}, r"step 3, none of its checkpoints \[2\]")],
)
def test_a_claim_about_what_is_not_measured_is_refused(tmp_path, more, message):
    told = {"claims": [{**claims("outcome", "packaged")["claims"][0], **more}]}
    with pytest.raises(ValueError, match=message):
        load_suite(str(suite_of(tmp_path, **told)))


def test_a_claim_about_what_is_not_finished_is_open(record):
    record["claims"] = claims("outcome", "packaged")["claims"]
    record["variants"][1]["values"] = {}
    (verdict,) = sentences.verdicts(record)
    assert (verdict.order, verdict.shown) == ("not run", "")


def test_the_document_is_written_from_committed_records_only(record, tmp_path):
    folder = tmp_path / "docs" / "results"
    with pytest.raises(ValueError, match="holds no records"):
        documents.results_document(folder)
    documents.publish(record, folder)
    result = CliRunner().invoke(app, ["ablate", "--docs", str(folder)])
    assert result.exit_code == 0, result.exception
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "| Packaged (reference) | 3 | 42.0 (37.0 to 47.0) | 25.0 (25.0 to 25.0) | 0.00123 (0.00123 to 0.00123) | – | 4 |" in text
    assert "`diptych ablate tiny --seeds 3 --grpo.optim.lr 1e-5`" in text
    (shared,) = re.findall("All variants: recipe `demo` with `(.*)`, one thread.", text)
    said = dict(part.split(": ") for part in re.split(r", (?=\w+\.)", shared))
    assert said == {key: json.dumps(value) for key, value in {**TINY, "grpo.optim.lr": 1e-5}.items()}
    assert "All variants: recipe `demo`, one thread." in documents.suite_section({**record, "base": {"recipe": "demo", "changes": {}}})
    assert str(tmp_path) not in (folder / "tiny.json").read_text() + text
    stored = json.loads((folder / "tiny.json").read_text())
    stored["table"][0]["final"]["greedy/score"]["mean"] = 0.9
    (folder / "tiny.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="is not what its numbers give"):
        documents.results_document(folder)


def test_the_committed_document_is_up_to_date():
    assert documents.results_document(RECORDS) == RECORDS.with_suffix(".md").read_text()


@pytest.mark.parametrize("name", sorted(path.stem for path in RECORDS.glob("*.json")))
def test_a_committed_record_is_of_its_suite_as_it_is_now(name):
    """Else the command that is printed below its table would run something else."""
    record = json.loads((RECORDS / f"{name}.json").read_text())
    _, suite = load_suite(record["suite"], record["overrides"])
    assert (suite.title, suite.reference, list(suite.measures)) == (record["title"], record["reference"], record["measures"])
    assert suite.base.model_dump() == record["base"]
    assert [(v.name, v.label, v.stage, v.changes) for v in suite.variants] == [
        (v["name"], v["label"], v["stage"], v["changes"]) for v in record["variants"]
    ]


def test_changed_settings_are_told_and_make_other_cells(tmp_path):
    runs = []
    for rate in (1e-4, 1e-4, 2e-4):
        name, suite = load_suite(str(suite_of(tmp_path, **changed_base(grpo__optim__lr=rate))))
        entries = grid(suite, range(2))
        pretend(tmp_path / "out", entries, lambda entry, step, rate=rate: 1000 * rate)
        shown, stream = console()
        assert run_grid(name, suite, entries, tmp_path / "out", 1, shown) == {}
        record = summary.collect(name, suite, entries, tmp_path / "out")
        runs.append((stream.getvalue(), record["table"][0]["final"]["greedy/score"]["mean"], record["variants"][0]["cells"]))
    printed, scores, keys = zip(*runs, strict=True)
    assert "settings changed" not in printed[0] + printed[1]
    assert "packaged: settings changed since the last run (grpo.optim.lr 0.0001 -> 0.0002); its trials are run anew" in printed[2]
    assert scores == (0.1, 0.1, 0.2)  # never mixed
    assert keys[0] == keys[1]
    assert not set(keys[0]) & set(keys[2])
    assert all((tmp_path / "out" / "cells" / key / "summary.json").is_file() for key in keys[0])


def test_every_row_of_the_document_has_as_many_columns_as_its_head(record):
    """Labels such as |replayed - sampled| hold the sign that separates columns."""
    section = documents.suite_section(record | {"measures": [*record["measures"], "parity/image_max"]})
    rows = [line.replace("\\|", "") for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == len(record["variants"]) + 2
    assert "replayed - sampled" in rows[0]
    assert len({row.count("|") for row in rows}) == 1


def test_measures_of_one_chart_are_told_by_step(record):
    """Means over the three seeds: outcome has 0.1 before GRPO, 0.43 at step 2 and 0.46 at the end; what was not measured is a dash."""
    section = documents.suite_section(record | {"overlays": [["greedy/score", "sampled_reward/text_likelihood"], ["greedy/score"]]})
    _, outcome = section.split("at each evaluated step (means of 3 seeds, without intervals):")[1:]
    rows = [line for line in outcome.splitlines() if line.startswith("|")]
    assert rows == [
        "| step | score, greedy | reward: text likelihood, sampled |",
        "|---|---|---|",
        "| 0 | 10.0 | – |",
        "| 2 | 43.0 | – |",
        "| 4 | 46.0 | – |",
    ]
    assert "at each evaluated step" not in documents.suite_section(record)


def test_nothing_finished_is_no_record(tmp_path):
    name, suite = load_suite(str(suite_of(tmp_path)))
    with pytest.raises(ValueError, match="no trial of suite 'tiny' is finished yet; run diptych ablate tiny"):
        summary.collect(name, suite, grid(suite, [0]), tmp_path / "out")


def test_mixed_versions_are_told(record):
    record["made_with"].append({"torch": "3", "cpu": "another"})
    printed = " ".join(sentences.caveats(record))
    assert "different versions of torch: 2, 3" in printed
    assert "different versions of cpu: another, none" in printed


# --- charts and rewards --------------------------------------------------------------------------------------------------


def test_charts_stay_readable_with_one_wide_interval():
    lines = [Line("a", "red", [Point(0, 40, 39, 41), Point(10, 50, -400, 500)]), Line("b & c", "blue", [Point(0, 42), Point(10, 44)], True)]
    root = ElementTree.fromstring(re.search(r"<svg.*</svg>", interval_chart("A & B", lines, bounds=(0, 100)), re.S)[0])
    ticks = [float(e.text) for e in root.iter("text") if e.get("text-anchor") == "end" and e.text != "step"]
    assert 30 <= min(ticks) < max(ticks) <= 60
    assert len([e for e in root.iter("line") if e.get("stroke") == "red"]) == 2  # whiskers, where there is an interval
    assert len(list(root.iter("circle"))) == 4
    assert interval_chart("none", []) == dot_chart("none", []) == ""


def test_dots_stand_on_their_side_of_zero():
    chart = dot_chart("d", [Row("less", "red", Point(0, -2, -3, -1), "-2"), Row("more", "blue", Point(0, 1, 0.5, 1.5), "+1")])
    root = ElementTree.fromstring(re.search(r"<svg.*</svg>", chart, re.S)[0])
    zero = next(float(e.get("x1")) for e in root.iter("line") if e.get("stroke") == "var(--soft)")
    less, more = (float(e.get("cx")) for e in root.iter("circle"))
    assert less < zero < more


def picture(value: int) -> Image:
    return Image(PIL.Image.new("RGB", (96, 96), (value, 30, 60)))


def test_weak_rewards_are_functions_of_the_content(monkeypatch):
    values = {"a": 0.9, "b": 0.4}
    monkeypatch.setattr(
        weak_rewards, "image_text",
        lambda completions: [[None, values[c[-1]["content"][0]["text"]]] for c in completions],
    )  # fmt: skip
    answers = [[to_message("assistant", Document((Text(t), picture(v))))] for t, v in (("a", 10), ("a", 11), ("b", 10), ("a", 10))]
    noisy = weak_rewards.noisy_image_text(answers)
    assert noisy == weak_rewards.noisy_image_text(answers)
    assert all(row[0] is None for row in noisy)
    assert noisy[0] == noisy[3]
    noise = [2 * row[1] - values[t] for row, t in zip(noisy, "aaba", strict=True)]
    assert all(0 <= n <= 1 for n in noise)
    assert len({round(n, 6) for n in noise}) == 3  # another picture or another text is another number
    assert weak_rewards.coarse_image_text(answers) == [[None, 1.0], [None, 1.0], [None, 0.0], [None, 1.0]]


def test_weaker_likelihoods_keep_what_is_missing_and_what_says_nothing(monkeypatch):
    said = [[None, 0.9], [None, 0.4], [None, math.nan], [None, None]]
    monkeypatch.setattr(weak_rewards.ImageLikelihood, "__call__", lambda self, *_: [list(row) for row in said])
    answers = [[to_message("assistant", Document((Text("a"), picture(v))))] for v in (10, 10, 11, 11)]
    noisy, coarse = (object.__new__(kind)([], answers) for kind in (weak_rewards.NoisyImageLikelihood, weak_rewards.CoarseImageLikelihood))
    assert [row[1] for row in coarse[:2]] == [1.0, 0.0]
    noise = [2 * noisy[i][1] - said[i][1] for i in (0, 1)]
    assert noise[0] == pytest.approx(noise[1])  # the same picture and text
    assert 0 <= noise[0] <= 1
    for values in (noisy, coarse):
        assert math.isnan(values[2][1])
        assert [row[0] for row in values] + values[3] == [None] * 6


def test_under_torchrun_it_says_to_run_without(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="ablate starts its own processes"):
        run_grid("x", None, [], tmp_path, 1, None)
