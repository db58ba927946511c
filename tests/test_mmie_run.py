"""A whole run in MMIE's layout on the packaged model, by the command: killed twice while answers are written, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml
from test_benchmark_jobs import files, lines_of

from diptych.document import Document, Text
from diptych.runtime import rng
from diptych.worlds.storyboard.conversations import make_turn

NUM_RECORDS, BATCH = 200, 50
KINDS = (("SA", "draw"), ("PBL", "describe"), ("MSR", "question"))


def parts(document: Document, stem: str, folder: Path) -> list[dict[str, Any]]:
    """Each text with the picture behind it, pictures saved in `images/`."""
    found: list[dict[str, Any]] = []
    for number, segment in enumerate(document):
        if isinstance(segment, Text):
            found.append({"text": segment.text, "image": None})
            continue
        name = f"images/{stem}_{number}.png"
        segment.pixels.save(folder / name)
        if found and found[-1]["image"] is None:
            found[-1]["image"] = name
        else:
            found.append({"text": None, "image": name})
    return found


def world_in_mmies_layout(folder: Path, num_records: int) -> Path:
    """Turns of the packaged world that its model can answer (captions to draw, pictures to speak of), as MMIE/MMIE lays its own out."""
    (folder / "images").mkdir(parents=True)
    random, records = rng(1, 0), []
    for number in range(num_records):
        category, kind = KINDS[number % len(KINDS)]
        id = f"{category}-{number:06d}"
        question, answer = make_turn(random, kind, "test")
        reference = parts(answer, f"{id}_gt", folder)
        records.append({"id": id, "question": parts(question, id, folder), "answer": [], "model": "gt", "gt_answer": reference})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def start(data: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "diptych", "evaluate", "mmie", str(data), "--model", "storyboard", "--out", str(out)]
    options = ["--batch-size", str(BATCH), "--max-images", "2", "--max-text-tokens", "12", "--temperature", "1", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return said


def kill_while_writing(process: subprocess.Popen, out: Path, batch: int) -> None:
    """SIGKILL as soon as anything of this batch is on the disk: its pictures are written before its lines."""
    until = time.monotonic() + 280
    answers = out / "answers"
    while not any(list(place.glob(f"*{batch:06d}*")) for place in (answers, answers / "images")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_200_records_killed_twice_and_resumed_give_the_same_files(tmp_path):
    data = world_in_mmies_layout(tmp_path / "data", NUM_RECORDS)
    said = finish(start(data, tmp_path / "whole"))
    assert "python main.py --input_dir" in said.replace("\n", " ")

    out = tmp_path / "killed"
    for batch in (1, 2):
        kill_while_writing(start(data, out), out, batch)
        whole = sorted((out / "answers").glob("batch_*.jsonl"))
        assert batch <= len(whole) < NUM_RECORDS // BATCH
        assert not (out / "submission").exists()
    finish(start(data, out))

    expected = files(tmp_path / "whole", "answers", "submission")
    assert files(out, "answers", "submission") == expected
    assert not list(out.rglob(".tmp-*"))
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (tmp_path / "whole", out)]
    assert configs[0] == configs[1]
    lines = lines_of(out)
    assert Counter(line["id"].split("-")[0] for line in lines) == {"SA": 67, "PBL": 67, "MSR": 66}
    assert not any("unanswered" in line for line in lines)
    drawn = [block["image"] for line in lines for block in line["blocks"] if block["type"] == "image"]
    assert len(drawn) > 60  # the packaged model draws nearly all of the 67 captions
    assert {PIL.Image.open(out / "answers" / path).size for path in drawn} == {(96, 96)}
    submitted = json.loads((out / "submission" / "data.json").read_text())
    assert [line["id"] for line in submitted] == [line["id"] for line in lines]
    asked = [part["image"] for line in submitted for part in line["question"] if part["image"]]
    assert asked  # some questions have pictures
    assert all((out / "submission" / path).is_file() for path in asked)
