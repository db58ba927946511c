"""The benchmarks run at toy size, and sizes that need a GPU are built at least without memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diptych.worlds.storyboard.scene import Event, Scene, Thing

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_every_check_for_a_gpu_runs_at_its_quick_size(tmp_path):
    """Two of them; `--quick` alone runs all."""
    names = ["grpo in bfloat16, weights in float32", "text to image"]
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--quick", "--out", str(tmp_path), "--only", *names]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout[-2000:]
    rows = json.loads(found.stdout.splitlines()[-1])["rows"]
    assert [(row["name"], row["result"]) for row in rows] == [(name, "passed") for name in names]
    late = subprocess.run([*command, "--seconds", "1"], capture_output=True, text=True, timeout=240)
    assert {row["result"] for row in json.loads(late.stdout.splitlines()[-1])["rows"]} == {"skipped: no time left"}


def test_tasks_runs_at_its_quick_size():
    found = subprocess.run(
        [sys.executable, str(BENCHMARKS / "tasks.py"), "--quick", "--threads", "1"], capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stderr[-2000:]
    line = json.loads(found.stdout.splitlines()[-1])
    assert line["found"]["made worse"]["text_to_image"]["accuracy"] < line["found"]["packaged"]["text_to_image"]["accuracy"] == 1
    assert line["found"]["made worse"]["understanding"]["accuracy"] == 1


def test_real_size_runs_on_toys():
    command = [sys.executable, str(BENCHMARKS / "real_size.py"), "--quick", "--group", "2", "--images", "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert [row["model"] for row in report["rows"]] == ["toy janus", "toy emu3", "toy chameleon", "toy vila_u"]
    for row in report["rows"]:
        assert row["codes"] == 2 * 1 * 16 * (4 if row["model"] == "toy vila_u" else 1)  # documents, pictures, positions, depth
        assert row["first_ratio_gap"] <= 1e-4


@pytest.mark.parametrize("script", ["rollout", "update"])
def test_comparisons_run_and_report(script):
    """`update.py` asserts by itself that both sides have the same loss."""
    sizes = ["--repeats", "1", "--prompts", "1", "--group", "2", "--images", "1", "--words", "4"]
    command = [sys.executable, str(BENCHMARKS / f"{script}.py"), *sizes]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["name"] == script
    assert report["ratio"] > 0
    assert report["limit"] > 0
    assert len(report["ours"]) == len(report["theirs"]) == 1


def test_reading_keeps_rows_as_they_are():
    command = [sys.executable, str(BENCHMARKS / "data_reading.py"), "--quick"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])
    assert len(report["probes"]) == 12
    assert {row["ours"] for row in report["probes"]} == {"same"}
    assert [row["rows"] for row in report["times"]] == [2000, 200]
    assert all(row["limit"] > 0 and row["ours_open"] > 0 for row in report["times"])


def test_mistakes_that_a_critic_must_see(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from text_rewards import mistakes

    ball, box = Thing("ball", "red", "small"), Thing("box", "blue", "big")
    before = Scene("night", (ball, None, box))
    event = Event("paint", "ball", colour="green")
    after = event.apply(before)
    told = dict(mistakes(np.random.default_rng(0), event, before, after))
    assert told["nothing happened"] == before
    assert told["all of them"] == Scene("night", (Thing("ball", "green", "small"), None, Thing("box", "green", "big")))
    assert told["one fact"] not in (before, after)
    moved = Event("move", "ball", place="middle")
    assert set(dict(mistakes(np.random.default_rng(0), moved, before, moved.apply(before)))) == {"one fact", "nothing happened"}


def test_rewards_of_texts_are_measured_by_mistake():
    found = subprocess.run([sys.executable, str(BENCHMARKS / "text_rewards.py"), "--quick"], capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout.splitlines()[-1])["rewards"]
    for told in report.values():
        kinds = told["kinds"].values()
        preferred = sum(kind["pairs"] * kind["right_preferred"] for kind in kinds)
        assert preferred == pytest.approx(told["right_preferred"] * sum(kind["pairs"] for kind in kinds))
    assert report["text_critic"]["right_preferred"] > 0.85
    assert report["text_likelihood"]["right_preferred"] > 0.99


@pytest.mark.parametrize(("size", "billions"), [("janus-pro-1b", 2.08), ("janus-pro-7b", 7.41), ("vila-u-7b", 7.62)])
def test_release_sizes_have_the_releases_parameters(size, billions, tmp_path, monkeypatch):
    """VILA-U: 7.998 B of the release, less SigLIP's text tower, last layer and head, and with codebooks as buffers."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _shapes import random_model

    model = random_model(size, torch.device("meta"), tmp_path / "toy")
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert model.image_spec.num_positions * model.image_spec.depth == {"janus-pro-1b": 576, "janus-pro-7b": 576, "vila-u-7b": 1024}[size]
