"""The live view in a real browser, on runs that grow meanwhile."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from browser import chromium, opened
from test_live import lines, record, run_folder, saved
from test_training import grpo_config, tiny_folder  # noqa: F401 - a fixture

from diptych.listening import listen
from diptych.report.live.server import address, build
from diptych.runs import atomic_text
from diptych.training.grpo import grpo

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    with listen("127.0.0.1", 0) as listening:
        server = uvicorn.Server(uvicorn.Config(build([folder]), log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield address(listening, "127.0.0.1")
        finally:
            server.should_exit = True
            thread.join()


def curve_label(page: Any, title: str) -> str:
    return page.locator(".chart", has=page.get_by_role("heading", name=title, exact=True)).locator("svg").get_attribute("aria-label")


@pytest.mark.slow
def test_a_run_that_trains_meanwhile(browser, tiny_folder, tmp_path):  # noqa: F811
    with served(tmp_path) as url, opened(browser, url) as page:
        page.get_by_text("No run yet").wait_for()
        config = grpo_config(tiny_folder, tmp_path / "run", eval_steps=2, num_eval_prompts=2)
        training = threading.Thread(target=grpo, args=(config,))
        training.start()
        page.locator("#name", has_text="run").wait_for()
        page.get_by_text("4 / 4").first.wait_for(timeout=60_000)
        training.join()
        page.locator("#state", has_text="finished").wait_for()
        page.locator("#step", has_text="step 4").wait_for()  # the newest documents are shown by themselves
        assert page.locator(".group .member").count() == 4
        assert page.locator(".member img").count() == sum(
            block["type"] == "image"
            for text in (tmp_path / "run" / "samples" / "step_4.jsonl").read_text().splitlines()
            for block in json.loads(text)["answer"]
        )
        assert "step 4: weighted sum" in curve_label(page, "Training reward")
        assert "step 4: toy_rewards:per_step" in curve_label(page, "Rewards of held-out prompts, greedy")


def test_curves_and_documents_come_while_one_looks(browser, tmp_path):
    folder = run_folder(tmp_path / "one", steps=4, max_steps=100)
    saved(
        folder / "samples", 4, record("first tale"), record("second tale", reward=2.0, steps=[{"format": 2.0}, {}], advantages=[-0.5, 1.25])
    )
    run_folder(tmp_path / "two", steps=9, max_steps=100)
    with served(tmp_path) as url, opened(browser, f"{url}#run=one") as page:
        page.get_by_text("first tale").wait_for()
        assert "step 4: policy 0.4" in curve_label(page, "Loss")
        with (folder / "metrics.jsonl").open("a") as stream:
            stream.write(lines(range(5, 8)) + '{"step": 8, "lo')
        saved(folder / "samples", 7, record("third tale"))
        page.get_by_text("third tale").wait_for()
        assert page.locator("#facts").get_by_text("7 / 100").count() == 1
        assert "step 7: policy 0.7" in curve_label(page, "Loss")

        page.keyboard.press("[")
        page.get_by_text("second tale").wait_for()
        best = page.locator(".member", has_text="second tale")
        assert "the best" in best.locator("h5").inner_text()
        assert "format +0.50" in best.locator(".why").inner_text()
        assert best.locator(".step.text .down").inner_text() == "▼ −0.50"
        assert best.locator(".step.image .up").inner_text() == "▲ +1.25"
        assert not page.locator("#newest").is_checked()
        table = page.locator(".group table").inner_text()
        assert "watches" in table
        assert "advantage of pictures" in table

        page.keyboard.press("/")
        page.keyboard.type("FIRST")
        page.locator("#found", has_text="1 document in 1 group").wait_for()
        assert page.locator(".member.other").count() == 1
        page.locator("#text").fill("third")
        page.locator("#found", has_text="0 documents").wait_for()
        page.locator("#all").check()
        page.locator("#found", has_text="1 document in 1 group").wait_for()
        page.locator("#text").fill("")
        page.locator("#reward").select_option("format")
        page.locator("#low").fill("1.5")
        page.locator("#found", has_text="1 document in 1 group").wait_for()
        assert page.locator(".member:not(.other)", has_text="second tale").count() == 1

        page.locator(".run", has_text="two").get_by_label("lay over").check()
        page.locator("#key", has_text="two").wait_for()
        page.locator(".chart svg[aria-label*='policy of two 0.9']").wait_for()
        assert page.locator(".chart").filter(has_text="Loss").first.locator("polyline").count() == 4
        assert "with=two" in page.evaluate("location.hash")
        page.locator(".chart svg").first.focus()
        page.keyboard.press("Home")
        assert ", step 1: policy of one 0.1, policy of two 0.1" in curve_label(page, "Loss")

        atomic_text(folder / "metrics.jsonl", lines(range(1, 4)))  # resumed from step 3
        (folder / "samples" / "step_7.jsonl").unlink()
        page.locator("#facts", has_text="3 / 100").wait_for()
        page.keyboard.press("End")
        page.locator(".chart svg[aria-label*='policy of one 0.3']").wait_for()


def test_what_a_model_writes_runs_nothing(browser, tmp_path):
    folder = run_folder(tmp_path / "<img src=x onerror='window.hacked=1'>")
    (folder / "rewards.json").write_text(json.dumps([{"name": "format", "about": HOSTILE}]))
    saved(
        folder / "samples", 4, record(HOSTILE, HOSTILE, steps=[{HOSTILE: 1.0}, {}], document={HOSTILE: 0.5}, extra={HOSTILE: HOSTILE}),
        record("b", HOSTILE, answer=[{"type": "image", "image": "javascript:window.hacked=1"}]),
    )  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, f"rewards/{HOSTILE}/mean": 1.0, HOSTILE: 2.0}) + "\n")
    with served(tmp_path) as url, opened(browser, f"{url}#run={HOSTILE}") as page:
        page.locator(".member").first.wait_for()
        page.locator("#others summary").click()
        page.locator("#other-charts .chart").wait_for()
        assert HOSTILE in page.locator(".member").first.inner_text()
        assert HOSTILE in page.locator(".prompt").inner_text()
        assert page.evaluate("window.hacked") is None
        assert page.locator("main script, main img[src=x], nav img").count() == 0


def test_alerts_lead_to_their_curves(browser, tmp_path):
    folder = run_folder(tmp_path / "run", parity_bound=1e-3)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "parity/text_max": 1e-6, "parity/image_max": 7e-4}) + "\n" for n in (1, 2))
    )
    with served(tmp_path) as url, opened(browser, url) as page:
        page.get_by_role("alert").get_by_text("parity/image_max reached 0.0007 at step 1, 70% of parity_bound (0.001)").wait_for()
        page.get_by_role("button", name="Show curve").click()
        assert "replayed" in page.locator(".chart.marked h4").inner_text()
        assert page.title().startswith("(1) run")
        assert page.locator(".badge").inner_text() == "1 alert"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways(browser, tmp_path, scheme):
    for name in ("a-long-name-of-a-run-that-goes-on-and-on-and-on-without-a-space", "b"):
        saved(run_folder(tmp_path / name) / "samples", 2, *[record("wordwithoutspaces" * 9) for _ in range(8)])
    with served(tmp_path) as url, opened(browser, url, viewport={"width": 360, "height": 740}, color_scheme=scheme) as page:
        page.locator(".member").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        colours = page.evaluate("[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]")
        assert (sum(map(int, colours[0][4:-1].split(","))) > sum(map(int, colours[1][4:-1].split(",")))) == (scheme == "light")
