"""What is printed is text, never markup, and a path stays in one piece; whatever its name is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from family_data import picture
from test_training import tiny_folder, warmup_config  # noqa: F401 - a fixture

from diptych.config import to_yaml

NAMES = ["[draft]", "[/home]", "[red]a[/red]:smile:", "100% #2", "{x}\\[b]", "a" * 150]


def diptych(*arguments: object, folder: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "diptych", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=200, errors="surrogateescape")
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout + done.stderr


def all_at_once(script: str, folder: Path, *arguments: str) -> str:
    """Many commands in one process: starting Python is what takes long."""
    prelude = (
        "import sys\nfrom diptych.cli import app as package\nfrom diptych.cli.app import main\n\n"
        "def run(*command):\n    sys.argv = ['diptych', *command]\n    try:\n        main()\n    except SystemExit as end:\n"
        "        print('exit', end.code, flush=True)\n\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude + script, *arguments], cwd=folder, capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, errors="surrogateescape",
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stdout + done.stderr


def test_every_command_prints_names_as_they_are(tiny_folder, tmp_path):  # noqa: F811
    config = warmup_config(tiny_folder, tmp_path / "unused", max_steps=1)
    (tmp_path / "w.yaml").write_text(to_yaml(config))
    picture(0).save(tmp_path / "p.png")
    row = {"messages": [{"role": "user", "content": "tell [b]"}, {"role": "assistant", "content": [{"type": "image", "image": "p.png"}]}]}
    (tmp_path / "d.jsonl").write_text(json.dumps({**row, "source": "[red]", "license": ":x:"}) + "\n")
    (tmp_path / "answer.json").write_text('[{"type": "text", "text": "[b]a :smile:"}]')
    script = (
        f"model = {str(tiny_folder)!r}\n"
        "for name in sys.argv[1:]:\n"
        "    run('warmup', 'w.yaml', '--output_dir', f'runs/{name}')\n"
        "    run('view', f'runs/{name}')\n"
        "    run('view', f'gone/{name}')\n"
        "    run('generate', 'tell [/b] :x:', '--model', model, '--max-text-tokens', '4', '--out', f'{name[:80]}.json')\n"
        "    run('data', 'convert', 'messages', 'd.jsonl', '--out', f'out{name}')\n"
        "    run('data', 'inspect', f'out{name}')\n"
        "    run('merge', f'gone/{name}', '--out', 'm')\n"
        "    run('evaluate', 'mme', f'gone/{name}', '--out', 'e')\n"
    )
    said = all_at_once(script, tmp_path, *NAMES)
    for name in NAMES:
        assert f"saved: runs/{name}/checkpoints/step_1/model\n" in said
        assert f"open runs/{name}/report.html\n" in said
        assert f": {name[:80]}.json\n" in said
        assert f"out{name}/records.jsonl" in said
        assert f"gone/{name}" in said
    assert said.count('source "[red]": 1') == said.count('license ":x:": 1') == len(NAMES)


def test_names_that_are_no_text_can_be_told(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    said = diptych("data", "inspect", os.fsdecode(folder), folder=tmp_path)
    assert "error:" in said
    assert "caf\\udce9" in said or "caf\udce9" in said


@pytest.mark.parametrize("reward", ["mine:[b]", "toy_rewards:gone[/x]"])
def test_errors_hold_what_was_given(tmp_path, reward):
    (tmp_path / "answer.json").write_text('[{"type": "text", "text": "a"}]')
    assert reward in diptych("rewards", "try", reward, "--document", "answer.json", folder=tmp_path)
