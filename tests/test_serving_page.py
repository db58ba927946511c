"""The page, in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import os
import re
import shutil
import time

import PIL.Image
import pytest
from served import drawing, serving

from diptych.document import Document, Image, Text
from diptych.forms import AnswerForm
from diptych.pictures import open_image
from diptych.runtime import generator
from diptych.sampling.engine import sample

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium, or name one in the variable CHROMIUM"),
]
STORY = "tell the story . in the middle a big red ball , in the meadow . first snow falls , then the ball turns purple ."
EVIL = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


@pytest.fixture(scope="module")
def models():
    return {"base": drawing("storyboard"), EVIL: drawing("storyboard_terse")}


@pytest.fixture(scope="module")
def server(models):
    with serving(models) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    context = browser.new_context(color_scheme="dark", viewport={"width": 1280, "height": 900})
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else problems.append(request.url))
    page.goto(server.url)
    yield page
    assert problems == []
    assert page.title() == "Diptych"
    context.close()


def finished(page, count=1):
    page.locator("article .foot button").nth(3 * count - 1).wait_for(timeout=60_000)


def test_a_document_is_written_compared_kept_and_saved(page, browser, models, tmp_path):
    page.get_by_label("Prompt", exact=True).fill(STORY)
    page.get_by_label("Compare with").select_option(EVIL)
    page.get_by_label("Seed").fill("11")
    page.keyboard.press("Control+Enter")
    finished(page)
    answers = page.locator("article .answer")
    assert answers.count() == 2
    for place, model in enumerate(models.values()):
        params = model.default_sampling
        document = sample(model, [model.encode_prompt(Document((Text(STORY),)))], params, generator=generator(11))[0].document
        shown = answers.nth(place)
        assert shown.locator("img").count() == len(document.images) == 4
        assert shown.locator("figure p").all_inner_texts() == [one.text for one in document if hasattr(one, "text") and one.text]
        assert shown.locator("img").first.evaluate("image => image.naturalWidth") == 96
        assert shown.locator("img").first.get_attribute("alt").startswith("Picture 1")
    assert answers.nth(1).locator("h3").inner_text().startswith(EVIL)  # a name is text
    assert page.get_by_role("status").inner_text().startswith("Finished: ")
    with page.expect_download() as download:
        page.get_by_text("Save as a page").click()
    saved = tmp_path / "saved.html"
    download.value.save_as(saved)
    text = saved.read_text()
    assert "<script" not in text
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    other = browser.new_context(java_script_enabled=False).new_page()
    other.goto(saved.as_uri())
    assert other.locator("img").count() == 8
    assert STORY in other.locator("h2").inner_text()
    other.close()
    page.reload()
    assert page.locator("article").count() == 1
    page.get_by_text("Remove").click()
    page.reload()
    assert page.locator("article").count() == 0


def test_pictures_go_before_the_prompt_and_settings_count(page, models, tmp_path):
    painted = tmp_path / "a.png"
    PIL.Image.new("RGB", (96, 96), (30, 90, 200)).save(painted)
    page.locator("#file").set_input_files([painted, painted])
    page.get_by_role("listitem").nth(1).wait_for()
    page.get_by_label("Remove picture 2").click()
    page.get_by_label("Prompt", exact=True).fill("tell the story .")
    page.get_by_label("Answer", exact=True).select_option("text_image")
    assert page.get_by_label("Pictures at most").is_disabled()
    page.get_by_label("Guidance").fill("2.5")
    page.get_by_label("Temperature").fill("1")
    page.get_by_label("Seed").fill("4")
    page.get_by_role("button", name="Write").click()
    finished(page)
    model = models["base"]
    row = model.encode_prompt(Document((Image(open_image(painted)), Text("tell the story ."))), AnswerForm.TEXT_IMAGE)
    release = model.default_sampling
    params = release.model_copy(
        update={
            "text": release.text.model_copy(update={"temperature": 1.0}),
            "image": release.image.model_copy(update={"temperature": 1.0, "guidance_scale": 2.5}),
        }
    )
    document = sample(model, [row], params, generator=generator(4))[0].document
    url = page.locator("article .answer img").get_attribute("src")
    assert open_image(url).tobytes() == document.images[0].pixels.tobytes()
    page.get_by_text("Ask again").click()
    assert page.get_by_label("Guidance").input_value() == "2.5"
    assert page.locator("#pictures img").count() == 1


def test_what_is_written_is_text(page, server, models, monkeypatch):
    """A model that writes markup."""
    monkeypatch.setattr(models["base"], "decode_text", lambda ids: EVIL if ids else "", raising=False)
    page.get_by_label("Prompt", exact=True).fill(EVIL)
    page.get_by_label("Answer", exact=True).select_option("text")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert page.locator("article figure p").inner_text() == EVIL
    assert page.locator("article h2").inner_text() == EVIL
    assert page.locator("article script").count() == 0
    page.reload()
    assert page.locator("article figure p").inner_text() == EVIL


def test_a_phone_a_keyboard_and_a_stop(browser, server, models, monkeypatch):
    plain = models["base"].text_logits
    monkeypatch.setattr(models["base"], "text_logits", lambda hidden: (time.sleep(0.1), plain(hidden))[1])
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(server.url)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type(STORY)
    page.keyboard.press("Control+Enter")
    page.locator("article figure p").first.wait_for(timeout=30_000)  # words, while it is written
    assert page.locator("article .answer").get_attribute("aria-busy") == "true"
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped" in page.locator("article h3").inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    unnamed = "input, select, textarea, button"
    names = page.locator(unnamed).evaluate_all("all => all.map((one) => one.ariaLabel || one.labels?.[0]?.innerText || one.innerText)")
    assert all(names)
    context.close()


def test_a_key_is_asked_for_and_an_error_is_shown(browser, models):
    with serving({"base": models["base"]}, keys=("secret",)) as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_label("Prompt", exact=True).fill(STORY)
        page.get_by_role("button", name="Write").click()
        page.get_by_label("API key").wait_for(timeout=30_000)
        assert "API key" in page.get_by_role("alert").inner_text()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Answer", exact=True).select_option("text")
        page.get_by_role("button", name="Write").click()
        finished(page, 1)
        page.get_by_label("Prompt", exact=True).fill("the ball " * 300)
        page.get_by_role("button", name="Write").click()
        page.get_by_text("shorten the prompt").first.wait_for(timeout=30_000)
        page.close()
