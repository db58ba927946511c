"""Trackers are told what the run's folder holds, and can neither stop nor slow a training, nor change what it learns."""

from __future__ import annotations

import json
import logging
import sqlite3
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import grpo_config, tiny_folder, warmup_config, weights  # noqa: F401 - a fixture

from diptych.config import GRPOConfig, WarmupConfig, build, load_config
from diptych.pictures import image_data_address
from diptych.runs import RunFolder, read_jsonl
from diptych.trackers import Trackers, background, kinds
from diptych.trackers.documents import document_rows, html_page, markdown_table, picture_grid
from diptych.training.grpo import checkpoint_of, grpo
from diptych.training.warmup import warmup


def block(red: int) -> dict[str, Any]:
    return {"type": "image", "image": image_data_address(PIL.Image.new("RGB", (6, 4), (red, 0, 0)))}


def record(text: str, group: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "prompt": [{"type": "text", "text": "tell <b>it</b>"}], "answer": [{"type": "text", "text": text}, block(200)], "group": group,
        "steps": [{"a": 0.5}, {"a": 1.0, "b": float("nan")}], "document": {"whole": 2.0}, "reward": 2.75, "advantages": [0.25, None],
        **changes,
    }  # fmt: skip


def trackers(folder: Path, *names: str, step: int = 0, **options: Any) -> Trackers:
    return Trackers(names, folder, step, project="p", options=options, settings={"optim.lr": 0.5})


# --- settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [("none", ()), ("wandb", ("wandb",)), ("wandb, trackio", ("wandb", "trackio")), (["mlflow", "mlflow"], ("mlflow",)), ([], ())],
)
def test_one_tracker_or_several(given, expected):
    assert load_config(GRPOConfig, "grpo", {"report_to": given}).report_to == expected


def test_trackers_on_the_command_line():
    given = ["--report_to", "wandb,tensorboard", "--tracker_options.wandb.entity", "us", "--tracker_project", "tales"]
    config = load_config(WarmupConfig, "warmup", given)
    assert (config.report_to, config.tracker_project) == (("wandb", "tensorboard"), "tales")
    assert config.tracker_options == {"wandb": {"entity": "us"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"report_to": "paper"}, "report_to.*tensorboard"), ({"tracker_options": {"wandb": {"mode": "offline"}}}, "does not name"),
     ({"report_to": "wandb", "tracker_options": {"wandb": {"API_key": "x7"}}}, "hold a secret")],
)  # fmt: skip
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        load_config(GRPOConfig, "grpo", settings)
    assert "x7" not in str(error.value)


def test_a_run_of_an_older_version_is_resumed(tiny_folder, tmp_path):  # noqa: F811
    config = warmup_config(tiny_folder, tmp_path / "run")
    with RunFolder(tmp_path / "run", config):
        pass
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("report_to: []", "report_to: none").replace("  tracker_project: diptych\n", ""))
    with RunFolder(tmp_path / "run", config) as run:
        assert run.config.report_to == ()


def test_what_is_not_installed_is_named_with_its_extra(tiny_folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(kinds.importlib.util, "find_spec", lambda _: None)
    for name, package in (("wandb", r"diptych\[wandb\]"), ("comet_ml", "comet-ml")):
        with pytest.raises(ValueError, match=f"report_to={name} needs .* pip install '{package}'"):
            warmup(warmup_config(tiny_folder, tmp_path / name, report_to=name))
        assert not (tmp_path / name).exists()


# --- documents -----------------------------------------------------------------------------------------------------------


def test_documents_as_rows():
    columns, rows = document_rows([record("x"), record("y", 1, answer=[{"type": "text", "text": "y"}], steps=[{}], advantages=[1.0])])
    assert columns == ["group", "member", "prompt", "document", "reward", "a", "b", "whole", "picture 1"]
    assert rows[0][:6] == [1, 1, "tell <b>it</b>", "x [picture 1]", 2.75, 0.75]
    assert np.isnan(rows[0][6])
    assert rows[1][:2] == [2, 1]
    assert rows[1][5:] == [None, None, 2.0, None]
    assert rows[0][8].size == (6, 4)


def test_markup_in_a_document_is_text():
    hostile = "<script>alert(1)</script> | ![x](http://y) `z`"
    table, page = markdown_table([record(hostile)]), html_page(3, [record(hostile, answer=[{"type": "text", "text": hostile}] * 2)])
    assert "<script" not in table + page
    assert "&lt;script&gt;" in page
    assert r"\!\[x\]\(http://y\)" in table
    assert table.splitlines()[-1].count(" | ") == 6  # the cells of the row, and no more
    assert "javascript:" not in html_page(
        1, [record("x", answer=[{"type": "text", "text": "x"}, {"type": "image", "image": "javascript:0"}])]
    )


def test_pictures_of_a_group_stand_in_rows():
    grid = picture_grid([record("x", answer=[block(10), block(20)]), record("y", answer=[block(30)])])
    assert grid is not None
    assert grid.size == (6 + 4 + 6, 4 + 4 + 4)
    assert [grid.getpixel(at) for at in ((0, 0), (10, 0), (0, 8), (10, 8))] == [(10, 0, 0), (20, 0, 0), (30, 0, 0), (255, 255, 255)]
    assert picture_grid([record("x", answer=[])]) is None


# --- the trackers themselves ---------------------------------------------------------------------------------------------


def test_tensorboard_has_metrics_documents_and_pictures(tmp_path):
    for step, steps in ((0, (1, 2, 3)), (1, (2, 3))):  # the second goes on behind step 1
        tracker = trackers(tmp_path, "tensorboard", step=step)
        for at in steps:
            tracker.log(at, {"loss": at + step / 10})
        tracker.documents(3, [record("a tale"), record("b", 1)])
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.1), (3, 3.1)]
    assert set(events.Tags()["images"]) == {"documents/group 1", "documents/group 2"}
    (picture,) = [e for e in events.Images("documents/group 1") if e.step == 3][-1:]
    assert (picture.width, picture.height) == (6, 4)
    text = events.Tensors("documents/group 1/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "a tale" in text
    assert "+0.25, –" in text
    assert "optim.lr" in events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_records(file: Path) -> Iterator[Any]:
    """What a .wandb file holds: LevelDB's log format behind 7 bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := -at % 32768) < 7:  # the rest of a block, too short for a header
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_writes_its_offline_file(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install 'diptych[wandb]'")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    for step, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # resumed behind step 2: 3 is not told again
        tracker = trackers(tmp_path, "wandb", step=step, wandb={"mode": "offline"})
        for at in steps:
            tracker.log(at, {"loss": float(at)})
        tracker.documents(steps[-1], [record("a tale"), record("no picture", answer=[{"type": "text", "text": "b"}] * 2)])
        tracker.close()
    found: list[Any] = []
    deadline = time.monotonic() + 10
    while sum(entry.HasField("exit") for entry in found) < 2 and time.monotonic() < deadline:  # a process of its own writes them
        found = [entry for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for entry in wandb_records(file)]
        time.sleep(0.05)
    lines = [{item.key or "/".join(item.nested_key): item.value_json for item in entry.history.item} for entry in found]
    assert [(line["_step"], line["loss"]) for line in lines if "loss" in line] == [(str(n), f"{n}") for n in (1, 2, 3, 4)]
    assert sum("documents" in key for line in lines for key in line) >= 4
    assert {entry.run.run_id for entry in found if entry.run.run_id} == {json.loads((tmp_path / "trackers.json").read_text())["run"]}
    assert "optim.lr" in str([entry.config for entry in found] + [entry.run.config for entry in found])
    media = sorted(tmp_path.glob("wandb/offline-run-*/files/media"))
    pages = [next(folder.glob("html/documents*.html")).read_text() for folder in media]
    tables = [next(folder.glob("table/documents_table*.json")).read_text() for folder in media]
    assert all("a tale" in page and "data:image/png;base64," in page for page in pages)
    assert all("a tale" in table for table in tables)
    assert len(pages) == len(tables) == 2
    staged = [file.read_bytes() for file in (tmp_path / "data" / "artifacts").rglob("*") if file.is_file()]
    assert sum(content.startswith(b"\x89PNG") for content in staged) == 2  # the tables' pictures


def test_trackio_keeps_its_database(tmp_path, monkeypatch):
    assert "trackio" not in sys.modules  # it looks where its files are when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "t"))
    pytest.importorskip("trackio", reason="pip install 'diptych[trackio]'")
    for step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = trackers(tmp_path, "trackio", step=step)
        for at in steps:
            tracker.log(at, {"loss": float(at)})
        tracker.documents(steps[-1], [record("a tale")])
        tracker.close()
    database = sqlite3.connect(tmp_path / "t" / "p.db")
    found = [(step, json.loads(metrics)) for step, metrics in database.execute("select step, metrics from metrics order by step")]
    assert [(step, metrics["loss"]) for step, metrics in found if "loss" in metrics] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert "a tale" in json.dumps([metrics for _, metrics in found])
    assert list((tmp_path / "t" / "media").rglob("*.png"))
    assert b"optim.lr" in database.execute("select config from configs").fetchone()[0]


def test_mlflow_keeps_documents_as_artifacts(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install 'diptych[mlflow]'")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    for step, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = trackers(tmp_path, "mlflow", step=step)
        for at in steps:
            tracker.log(at, {"loss": float(at)})
        tracker.documents(steps[-1], [record("a tale")])
        tracker.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4]
    assert run.data.params == {"optim.lr": "0.5"}
    assert {f.path for f in client.list_artifacts(run.info.run_id, "documents")} == {"documents/step_3.html", "documents/step_4.html"}


# --- trackers that do not work -------------------------------------------------------------------------------------------


class Stub:
    """accelerate's interface; every call is noted."""

    name = "wandb"

    def __init__(self, project: str, **options: Any) -> None:
        self.options = options

    def start(self) -> None: ...
    def store_init_configuration(self, values: dict[str, Any]) -> None: ...
    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...
    def finish(self) -> None: ...


@pytest.fixture
def stub(monkeypatch):
    """Puts a class in the place of a tracker of accelerate's."""
    monkeypatch.setattr(kinds, "KINDS", {})

    def put(cls: type[Stub]) -> None:
        monkeypatch.setattr(kinds, "tracker_class", lambda _: cls)
        monkeypatch.setattr(background, "tracker_class", lambda _: cls)

    return put


@pytest.mark.parametrize("where", ["start", "store_init_configuration", "log", "finish"])
@pytest.mark.parametrize("error", [ConnectionError, SystemExit])
def test_a_tracker_that_fails_is_told_once(stub, tmp_path, caplog, where, error):
    def fail(*_: Any, **__: Any) -> None:
        raise error("no such host")

    stub(type("Failing", (Stub,), {where: fail}))
    with caplog.at_level(logging.WARNING):
        tracker = trackers(tmp_path, "wandb")
        for step in range(5):
            tracker.log(step + 1, {"loss": 1.0})
        tracker.close()
    (told,) = [r.getMessage() for r in caplog.records if "no such host" in r.getMessage()]
    assert f"tracker wandb {'cannot start' if where in ('start', 'store_init_configuration') else 'failed'}" in told
    assert ("missed 5" in caplog.text) == (where == "log")


def test_a_tracker_that_fails_for_a_while_has_the_rest(stub, tmp_path):
    had = []

    class Flaky(Stub):
        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            if step == 2:
                raise ConnectionError
            had.append(step)

    stub(Flaky)
    tracker = trackers(tmp_path, "wandb")
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    assert had == [1, 3]


def test_a_resumed_run_sends_what_its_tracker_does_not_have(stub, tmp_path):
    had: list[Any] = []
    stub(
        type(
            "Noting", (Stub,), {"log": lambda _, values, step=None: had.append(step), "start": lambda self: had.append(self.options["id"])}
        )
    )
    for begin, steps in ((0, (1, 2, 3)), (2, (3, 4)), (0, (1, 2, 3, 4, 5))):
        tracker = trackers(tmp_path, "wandb", step=begin)
        for step in steps:
            tracker.log(step, {"loss": 1.0})
        tracker.close()
    run = json.loads((tmp_path / "trackers.json").read_text())["run"]
    assert had == [run, 1, 2, 3, run, 4, run, 5]


def test_a_tracker_that_hangs_loses_what_it_cannot_take(stub, tmp_path, caplog, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(background, "PATIENCE", 0.2)
    monkeypatch.setattr(background, "MAX_WAITING", 10)
    stub(type("Hanging", (Stub,), {"log": lambda *_, **__: release.wait()}))
    with caplog.at_level(logging.WARNING):
        tracker = trackers(tmp_path, "wandb")
        began = time.monotonic()
        for step in range(500):
            tracker.log(step + 1, {"loss": 1.0})
            tracker.documents(step + 1, [record("x")])
        assert time.monotonic() - began < 5
        (worker,) = tracker._workers
        assert worker.waiting.qsize() <= 10
        assert sum(1 for item in list(worker.waiting.queue) if item and item[0] == "documents") <= background.MAX_DOCUMENTS
        tracker.close()
        assert time.monotonic() - began < 5
    release.set()
    assert caplog.text.count("takes too long") == 1
    assert "is left behind" in caplog.text


def test_a_damaged_state_begins_a_new_run(stub, tmp_path, caplog):
    stub(Stub)
    for content in ("{", "[]", '{"run": 3, "trackers": {}}', '{"run": "a", "trackers": []}'):
        (tmp_path / "trackers.json").write_text(content)
        trackers(tmp_path, "wandb").close()
    trackers(tmp_path, "wandb").close()
    assert "trackers.json is damaged" in caplog.text


@pytest.mark.parametrize("fault", ["fails", "hangs"])
def test_the_weights_are_the_same_with_and_without(stub, tiny_folder, tmp_path, monkeypatch, fault):  # noqa: F811
    monkeypatch.setattr(background, "PATIENCE", 0.1)
    release = threading.Event()

    class Bad(Stub):
        def log(self, values: dict[str, Any], step: int | None = None) -> None:
            if fault == "hangs":
                release.wait()
            raise ConnectionError

    stub(Bad)
    plain, tracked = (
        grpo_config(tiny_folder, tmp_path / name, report_to=to, max_steps=2) for name, to in (("plain", "none"), ("tracked", "wandb"))
    )
    for config in (plain, tracked):
        grpo(config)
    release.set()
    before, after = (weights(Path(checkpoint_of(config))) for config in (plain, tracked))
    assert all(torch.equal(before[name], after[name]) for name in before)
    logged = [read_jsonl(Path(config.output_dir) / "metrics.jsonl") for config in (plain, tracked)]
    lines = [[{k: v for k, v in line.items() if "seconds" not in k and k != "step_time"} for line in one] for one in logged]
    assert lines[0] == lines[1]


def test_a_run_that_fails_still_tells_what_it_had(stub, tmp_path):
    had = []
    stub(type("Noting", (Stub,), {"log": lambda _, values, step=None: had.append(step), "finish": lambda _: had.append("end")}))
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 9, "optim": {"lr": 1e-3}, "report_to": "wandb",
                "sources": [{"name": "storyboard:interleaved", "weight": 1.0}]}  # fmt: skip

    def broken() -> None:
        with RunFolder(tmp_path / "run", build(WarmupConfig, settings)) as run:
            run.truncate_logs(0)
            run.log(1, {"loss": 1.0})
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        broken()
    assert had == [1, "end"]
