"""The live view's server: what it reads while a training writes, what it finds, and what it never shows."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from starlette.testclient import TestClient
from test_training import grpo_config, tiny_folder  # noqa: F401 - a fixture
from typer.testing import CliRunner

from diptych.cli import app
from diptych.listening import listen
from diptych.report.live.documents import MOST_GROUPS, Documents, Search
from diptych.report.live.folders import Runs
from diptych.report.live.metrics import Metrics, thinned
from diptych.report.live.server import build
from diptych.runs import atomic_text, read_jsonl
from diptych.training.grpo import grpo

PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
REWARDS = [{"name": "format", "label": None, "weight": 1.0, "modality": "both"},
           {"name": "taste", "label": "watcher", "weight": 0.0, "modality": "image"}]  # fmt: skip


def lines(steps: range, **values: Any) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 10, **values}) + "\n" for step in steps)


def run_folder(folder: Path, steps: int = 5, **settings: Any) -> Path:
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(lines(range(1, steps + 1)))
    (folder / "config.yaml").write_text(yaml.safe_dump({"config": {"max_steps": 10, "rewards": REWARDS, **settings}}))
    return folder


def record(text: str, prompt: str = "tell it", **changes: Any) -> dict[str, Any]:
    return {
        "prompt": [{"type": "text", "text": prompt}], "answer": [{"type": "text", "text": text}, {"type": "image", "image": PIXEL}],
        "steps": [{"format": 1.0}, {"watcher": 0.25}], "document": {}, "group": 0, "reward": 1.0, "advantages": [0.5, None], **changes,
    }  # fmt: skip


def saved(folder: Path, step: int, *records: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"step_{step}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))


# --- metrics that grow ---------------------------------------------------------------------------------------------------


def test_an_unfinished_line_is_read_when_it_is_whole(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file)
    metrics.refresh()
    assert metrics.num_lines == 0  # there is no file yet
    text = lines(range(1, 4))
    for end in range(len(text) + 1):
        file.write_text(text[:end]) if end == 0 else file.open("a").write(text[end - 1])
        metrics.refresh()
        assert metrics.num_lines == text[:end].count("\n")
    assert metrics.curve("loss")[0].tolist() == [1, 2, 3]
    assert metrics.curve("loss")[1].tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_only_what_is_new_is_sent(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(range(1, 4)))
    metrics = Metrics(file)
    metrics.refresh()
    first = metrics.since(None, 0)
    assert first["whole"]
    assert first["series"]["loss"] == [[1, 2, 3], [0.1, 0.2, 0.3]]
    with file.open("a") as stream:
        stream.write(lines(range(4, 6), rare=1.0) + '{"step": 6, "los')
    metrics.refresh()
    second = metrics.since(first["generation"], first["step"])
    assert not second["whole"]
    assert second["series"] == {"loss": [[4, 5], [0.4, 0.5]], "rare": [[4, 5], [1.0, 1.0]]}
    assert metrics.since(first["generation"], second["step"])["series"] == {}


@pytest.mark.parametrize("kept", [2, 9])
def test_a_run_that_is_resumed_is_read_again(tmp_path, kept):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(range(1, 9)))
    metrics = Metrics(file)
    metrics.refresh()
    before = metrics.generation
    atomic_text(file, lines(range(1, kept + 1), resumed=1.0))
    metrics.refresh()
    assert metrics.generation != before
    assert metrics.last_step == metrics.num_lines == kept
    assert metrics.since(before, 8)["whole"]


def test_a_file_that_was_written_over_in_place_is_read_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(range(1, 5)))
    metrics = Metrics(file)
    metrics.refresh()
    with file.open("r+") as stream:
        stream.write(lines(range(1, 9), other=2.0))
    metrics.refresh()
    assert metrics.curve("other")[0].tolist() == list(range(1, 9))
    assert metrics.num_lines == 8


def test_damaged_lines_and_values_that_are_not_finite(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": NaN, "name": "x"}\n{"step": 2, "lo\n[]\nnull\n{"loss": 3}\n{"step": 3, "loss": 0.5}\n')
    metrics = Metrics(file)
    metrics.refresh()
    assert metrics.since(None, 0)["series"] == {"loss": [[1, 3], [None, 0.5]]}
    assert metrics.curve("loss")[0].tolist() == [3]


def test_thinning_keeps_outliers_and_the_last_point():
    steps, values = np.arange(10_000), np.sin(np.arange(10_000) / 300)
    values[1234], values[4321], values[77] = 9.0, -9.0, np.nan
    kept, seen = thinned(steps, values, 100)
    assert len(kept) <= 100
    assert {1234, 4321, 9999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert np.array_equal(seen, values[kept])
    assert len(thinned(steps[:100], values[:100], 100)[0]) == 100
    assert len(thinned(steps, np.full(10_000, np.nan), 100)[0]) == 1


def test_thousands_of_steps_stay_fast(tmp_path):
    names = {f"rewards/r{n}/mean": n / 3 for n in range(40)}
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines(range(1, 10_001), **names))
    metrics = Metrics(file)
    metrics.refresh()
    whole = metrics.since(None, 0)
    assert len(json.dumps(whole)) < 1_000_000
    with file.open("a") as stream:
        stream.write(lines(range(10_001, 10_003), **names))
    began = time.perf_counter()
    metrics.refresh()
    new = metrics.since(whole["generation"], whole["step"])
    assert time.perf_counter() - began < 0.5  # all of it takes longer
    assert len(json.dumps(new)) < 10_000


# --- documents -----------------------------------------------------------------------------------------------------------


def members(found: dict[str, Any]) -> list[tuple[int, int, bool]]:
    """(step, number, found) of every member."""
    return [(group["step"], one["number"], one["found"]) for group in found["groups"] for one in group["members"]]


def test_documents_are_searched_by_text_and_reward(tmp_path):
    saved(tmp_path, 5, record("a Red ball"), record("b", reward=None, steps=[{"format": float("nan")}, {}]), record("c", group=1))
    saved(tmp_path, 10, record("d", steps=[{"format": 0.0}, {"format": 0.5}]))
    documents = Documents(tmp_path)
    assert documents.saved() == [5, 10]
    assert members(documents.find(Search(), step=5)) == [(5, 0, True), (5, 1, True), (5, 0, True)]
    assert members(documents.find(Search("rEd BA"))) == [(5, 0, True), (5, 1, False)]  # the whole group, with what was found
    assert members(documents.find(Search(reward="format", high=0.3))) == [(10, 0, True)]
    assert members(documents.find(Search(reward="format", low=0.9), step=5)) == [(5, 0, True), (5, 1, False), (5, 0, True)]
    assert members(documents.find(Search("tell", "reward", 1.0, 1.0), step=5))[1] == (5, 1, False)  # a missing value is in no range
    assert members(documents.find(Search("nothing"))) == []
    assert members(documents.find(Search(), step=7)) == []
    assert [group["group"] for group in documents.find(Search(), step=5)["groups"]] == [0, 1]
    (first, second) = documents.find(Search(), step=5)["groups"][0]["members"]
    assert first["advantages"] == [0.5, None]
    assert first["means"] == {"format": 1.0, "watcher": 0.25, "reward": 1.0}
    assert second["steps"] == [{"format": None}, {}]
    assert "format" not in second["means"]


def test_many_groups_come_in_parts(tmp_path):
    for step in range(1, 31):
        saved(tmp_path, step, record("x"), record("y"))
    documents, steps, before = Documents(tmp_path), [], None
    while True:
        found = documents.find(Search(), before=before)
        steps += [group["step"] for group in found["groups"]]
        assert len(found["groups"]) <= MOST_GROUPS
        if found["more"] is None:
            break
        before = found["more"]
    assert steps == list(range(30, 0, -1))


def test_records_of_before_groups_were_noted(tmp_path):
    old = [{key: value for key, value in record(text, prompt).items() if key not in ("group", "reward", "advantages")}
           for text, prompt in (("a", "p"), ("b", "p"), ("c", "q"))]  # fmt: skip
    saved(tmp_path, 1, *old)
    saved(tmp_path, 2, {"prompt": old[0]["prompt"], "answer": old[0]["answer"]})  # a warm-up's
    found = Documents(tmp_path).find(Search())["groups"]
    assert [(group["step"], group["group"], len(group["members"])) for group in found] == [(2, 0, 1), (1, 0, 2), (1, 1, 1)]
    assert found[0]["members"][0]["advantages"] == []


def test_a_file_that_changed_is_read_again_and_half_a_line_is_left_out(tmp_path):
    documents = Documents(tmp_path)
    saved(tmp_path, 1, record("before"))
    assert members(documents.find(Search("before"))) == [(1, 0, True)]
    (tmp_path / "step_1.jsonl").write_text(json.dumps(record("after")) + "\n" + json.dumps(record("cut"))[:50])
    os.utime(tmp_path / "step_1.jsonl", ns=(1, 1))
    assert members(documents.find(Search())) == [(1, 0, True)]
    assert members(documents.find(Search("after"))) == [(1, 0, True)]
    assert members(documents.find(Search("before"))) == []


@pytest.mark.parametrize(
    "address",
    ["http://example.com/x.png", "javascript:alert(1)", "data:image/svg+xml;base64,AAAA", "data:text/html,x", 7, None, "file:///etc/passwd",
     'data:image/png;base64,AA" onerror="x'],
)  # fmt: skip
def test_no_other_address_than_a_picture_itself_is_given_to_a_browser(tmp_path, address):
    saved(tmp_path, 1, record("x", answer=[{"type": "image", "image": address}, 3, {"type": "text"}]))
    (member,) = Documents(tmp_path).find(Search())["groups"][0]["members"]
    assert [block["type"] for block in member["answer"]] == ["text"] * 3


# --- runs and their folders ----------------------------------------------------------------------------------------------


def test_all_runs_of_folders_are_found(tmp_path):
    for name in ("a/one", "a/deep/er/two", "b/a"):
        run_folder(tmp_path / name)
    (tmp_path / "a/one/checkpoints/step_1").mkdir(parents=True)
    (tmp_path / "a/one/checkpoints/step_1/metrics.jsonl").write_text("")
    assert list(Runs([tmp_path / "a"]).all()) == ["deep/er/two", "one"]
    assert list(Runs([tmp_path / "a/one"]).all()) == ["one"]
    assert sorted(Runs([tmp_path / "a/one", tmp_path / "b", tmp_path / "a"]).all()) == ["a/deep/er/two", "a/one", "b/a", "one"]
    run_folder(tmp_path / "c/a")
    assert sorted(Runs([tmp_path / "b/a", tmp_path / "c/a"]).all()) == ["a", "a (2)"]


def test_a_run_that_begins_later_appears(tmp_path, monkeypatch):
    monkeypatch.setattr("diptych.report.live.folders.LOOK_AGAIN_SECONDS", 0.0)
    runs = Runs([tmp_path])
    assert runs.all() == {}
    run_folder(tmp_path / "new")
    (first,) = runs.all().values()
    assert runs.all()["new"] is first


def test_what_lies_outside_is_never_read(tmp_path):
    secret = run_folder(tmp_path / "secret")
    saved(secret / "samples", 1, record("secret"))
    inside = run_folder(tmp_path / "given" / "run")
    (tmp_path / "given" / "link").symlink_to(secret)
    (tmp_path / "given" / "half").mkdir()
    (tmp_path / "given" / "half" / "metrics.jsonl").symlink_to(secret / "metrics.jsonl")
    (inside / "samples" / "step_3.jsonl").symlink_to(secret / "samples" / "step_1.jsonl")
    client = TestClient(build([tmp_path / "given"]))
    assert [run["id"] for run in client.get("/api/runs").json()] == ["run"]
    assert client.get("/api/runs").json()[0]["saved"] == []
    for id in ("../secret", "run/../../secret", "link", "half", str(secret), "/etc", "", "run\0", "..\\secret", "%2e%2e/secret"):
        for path in ("/api/series", "/api/documents", "/settings"):
            assert client.get(path, params={"run": id}).status_code == 404, id
    assert client.get("/api/documents", params={"run": "run", "step": 3}).json()["groups"] == []
    for path in ("/live.py", "/server.py", "/%2e%2e/style.css", "/..%2fstyle.css", "/style.css", "/live.css/../../style.css"):
        assert client.get(path).status_code == 404, path


def test_the_state_of_a_run(tmp_path):
    folder = run_folder(tmp_path / "run", logging_steps=2)
    (run,) = Runs([tmp_path]).all().values()
    assert (run.summary()["state"], run.summary()["step"], run.summary()["max_steps"]) == ("training", 5, 10)
    os.utime(folder / "metrics.jsonl", (time.time() - 100,) * 2)
    assert run.summary()["state"] == "quiet"
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(lines(range(6, 8), step_time=50.0))
    os.utime(folder / "metrics.jsonl", (time.time() - 100,) * 2)
    assert run.summary()["state"] == "training"  # its steps are long
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(lines(range(8, 11)))
    assert run.summary()["state"] == "finished"
    assert [(reward["key"], reward["weight"]) for reward in run.summary()["rewards"]] == [("format", 1.0), ("watcher", 0.0)]
    (folder / "config.yaml").write_text("{ half")
    assert run.summary()["max_steps"] is None
    (folder / "metrics.jsonl").unlink()
    assert run.summary()["step"] == 0


# --- the server ----------------------------------------------------------------------------------------------------------


def test_pages_say_what_a_browser_may_do(tmp_path):
    run_folder(tmp_path / "run")
    client = TestClient(build([tmp_path]))
    for path in ("/", "/live.js", "/live.css", "/api/runs", "/nowhere"):
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    page = client.get("/").text
    assert "http" not in page.replace("http-equiv", "")  # nothing from elsewhere
    assert "<script>" not in page
    assert " style=" not in page
    assert " on" not in page.split("<body>")[0]
    assert [client.post(path).status_code for path in ("/", "/api/runs")] == [405, 405]


def test_scripts_never_make_markup_of_text():
    folder = Path(__file__).parents[1] / "src" / "diptych" / "report" / "live"
    for script in folder.glob("*.js"):
        text = script.read_text()
        found = [word for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(") if word in text]
        assert not found, script


@pytest.mark.parametrize("query", ["step=x", "step=-1", "low=nan", "high=inf", f"text={'x' * 300}"])
def test_wrong_questions(tmp_path, query):
    run_folder(tmp_path / "run")
    assert TestClient(build([tmp_path])).get(f"/api/documents?run=run&{query}").status_code == 422


def test_another_name_that_leads_here_is_refused(tmp_path):
    client = TestClient(build([tmp_path], ["127.0.0.1", "localhost"]), base_url="http://localhost")
    assert client.get("/api/runs").status_code == 200
    assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 400


def test_what_cannot_be_served_is_said(tmp_path):
    absent = CliRunner().invoke(app, ["view", str(tmp_path / "no"), "--serve", "--port", "0"])
    assert "no such folder" in str(absent.exception)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        used = CliRunner().invoke(app, ["view", str(tmp_path), "--serve", "--port", str(port)])
        assert f"cannot listen at 127.0.0.1:{port}: something listens there already: give another --port" in str(used.exception)
    with pytest.raises(ValueError, match="not one of this machine's"):
        listen("203.0.113.1", 0)


def test_without_the_extra_its_name_is_told(tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("diptych.report.live")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = CliRunner().invoke(app, ["view", str(tmp_path), "--serve"])
    assert "--serve needs fastapi, which is not installed: pip install 'diptych[serve]'" in str(result.exception)


def test_static_pages_of_several_runs(tmp_path):
    for name in ("a", "b"):
        saved(run_folder(tmp_path / name) / "samples", 2, record(f"tale {name}"))
    result = CliRunner().invoke(app, ["view", str(tmp_path / "a"), str(tmp_path / "b")])
    assert result.exit_code == 0
    assert all(f"tale {name}" in (tmp_path / name / "report.html").read_text() for name in "ab")


# --- what a training saves -----------------------------------------------------------------------------------------------


def test_saved_documents_have_the_advantages_they_were_trained_with(tiny_folder, tmp_path):  # noqa: F811
    rewards = [{"name": "toy_rewards:per_step", "modality": "image"}]
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=1, rewards=rewards, sample_groups=2, advantages={"discount": 0.0})
    grpo(config)
    records = read_jsonl(tmp_path / "run" / "samples" / "step_1.jsonl")
    assert [record["group"] for record in records] == [0] * 4 + [1] * 4
    for group in (records[:4], records[4:]):
        for record in group:
            kinds = [block["type"] for block in record["answer"]]
            assert len(record["advantages"]) == len(kinds)
            assert all(value == 0 for value, kind in zip(record["advantages"], kinds, strict=True) if kind == "text")
        for step in range(max(len(record["answer"]) for record in group)):
            same = [(record["steps"][step], record["advantages"][step]) for record in group
                    if len(record["answer"]) > step and record["answer"][step]["type"] == "image"]  # fmt: skip
            values = np.array([said["toy_rewards:per_step"] for said, _ in same])
            assert len(values) < 2 or np.corrcoef(values, [a for _, a in same])[0, 1] == pytest.approx(1.0) or np.ptp(values) < 1e-4
    said = [np.mean([v for step in record["steps"] for v in step.values()]) for record in records]
    assert [record["reward"] for record in records] == pytest.approx(said, abs=1e-3)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["reward"] == pytest.approx(np.mean(said), abs=1e-3)
