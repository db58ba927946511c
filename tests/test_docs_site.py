"""The documentation builds as a site: strictly, from what the code says today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def scripts() -> Path:
    pytest.importorskip("zensical", reason="the extra `docs` is not installed")
    return SCRIPTS


def test_the_site_builds_and_holds_commands_settings_and_rewards(scripts, tmp_path):
    done = subprocess.run(
        [sys.executable, scripts / "docs.py", "--site", tmp_path / "site", "--staged", tmp_path / "staged"],
        capture_output=True, text=True, timeout=280, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reference = tmp_path / "site" / "reference"
    assert "diptych evaluate compare" in (reference / "commands.html").read_text()
    assert 'href="#advantageconfig"' in (reference / "settings.html").read_text()
    rewards = (reference / "rewards.html").read_text()
    assert all(option in rewards for option in ("api_key_env", "per_code"))
    assert not [path for path in (tmp_path / "site").rglob("*.html") if 'src="http' in path.read_text()]  # nothing is fetched


def test_every_setting_is_described(scripts, monkeypatch):
    monkeypatch.syspath_prepend(scripts)
    import reference

    page = reference.settings()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert not [row[0] for row in rows if not row[3].strip(" |")]
    assert not [row[0] for row in rows if row[3].startswith(("at least", "above"))]  # limits alone say nothing


def test_what_is_broken_is_named(scripts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(scripts)
    import docs

    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "a.md").write_text("![x](none.png)")
    assert list(docs.missing_pictures(pages)) == ["a.md shows none.png, which is not there"]
    text = "[a](docs/tasks.md#recipes) [b](CONTRIBUTING.md) [c](src/x.py) [d](https://x.y) [e](#f)"
    assert docs.for_the_site(text) == "[a](../tasks.md#recipes) [b](contributing.md) c [d](https://x.y) [e](#f)"


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_the_files_at_the_root(name):
    root = SCRIPTS.parent
    for path, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)#?([^)\s]*)\)", (root / name).read_text()):
        target = root / (path or name)
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else ()
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings}, anchor


@pytest.mark.parametrize(("line", "said"), [("[x](tasks.md#nowhere)", "anchor does not exist"), ("[x](nothing.md)", "page does not exist")])
def test_a_broken_link_stops_the_build(scripts, tmp_path, line, said):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(f"# A\n\n{line}\n")
    (tmp_path / "pages" / "tasks.md").write_text("# B\n")
    (tmp_path / "zensical.toml").write_text((scripts.parent / "zensical.toml").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.returncode
    assert said in done.stdout + done.stderr
