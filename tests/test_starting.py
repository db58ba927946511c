"""What starts without torch: it takes seconds to import, and help, mistakes in settings and work on data need none of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import diptych

HEAVY = {"torch", "transformers", "accelerate", "peft", "scipy", "tokenizers", "pyarrow", "fastapi", "uvicorn"}
# Runs a command and notes what came of it and what is loaded at its end.
RUN = """
import json, sys
from diptych.cli import app
code = None
try:
    code = app(sys.argv[2:], standalone_mode=False)
except BaseException as error:
    code = f"{type(error).__name__}: {error}"
json.dump([str(code), sorted(sys.modules)], open(sys.argv[1], "w"))
"""


def loaded_by(tmp_path, *arguments: str) -> tuple[str, set[str]]:
    """What a command came to, and the modules that were loaded for it."""
    note = tmp_path / "note.json"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(note), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert note.is_file(), result.stderr
    code, modules = json.loads(note.read_text())
    return code, set(modules)


COMMANDS = (
    "demo warmup grpo view pretrain ablate generate merge doctor serve",
    "rewards,rewards list,rewards try,data,data kinds,data convert,data inspect",
    "evaluate,evaluate storyboard,evaluate mmie,evaluate geneval,evaluate compare",
)


@pytest.mark.parametrize("command", ["", *COMMANDS[0].split(), *",".join(COMMANDS[1:]).split(",")])
def test_help_loads_no_torch(tmp_path, command):
    _, modules = loaded_by(tmp_path, *command.split(), "--help")
    assert not HEAVY & modules
    assert "numpy" not in modules


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("grpo grpo --num_generatoins 4", "unknown key"),
        ("grpo grpo --num_minibatches 7", "does not divide"),
        ("warmup nothing.yaml", "does not exist"),
        ("demo demo --grpo.optim.lr=-1", "greater than"),
        ("ablate no_such_suite", "no_such_suite"),
        ("ablate", "name a suite"),
        ("evaluate storyboard --num_promts 3", "unknown key"),
        ("generate hello --out a.pdf", "allowed endings"),
        ("generate hello --image nothing.png", "nothing.png"),
        ("view .", "holds no run"),
        ("data convert nonsense x --out y", "allowed are"),
        ("no_such_command", "No such command"),
    ],
)
def test_a_mistake_is_told_without_torch(tmp_path, arguments, said):
    code, modules = loaded_by(tmp_path, *arguments.split())
    assert said in code
    assert not HEAVY & modules


@pytest.mark.parametrize("arguments", ["rewards list", "data kinds", "data inspect records.jsonl --out page.html"])
def test_what_needs_no_model_loads_no_torch(tmp_path, arguments):
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    code, modules = loaded_by(tmp_path, *arguments.split())
    assert code == "None"
    assert not HEAVY & modules


def test_the_package_gives_its_names_when_they_are_asked_for():
    assert set(diptych.__all__) <= set(dir(diptych))
    from diptych.document import Document
    from diptych.models import load_model

    assert diptych.Document is Document
    assert diptych.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'Documents'"):
        _ = diptych.Documents


def test_importing_the_package_loads_nothing_of_it():
    program = "import sys, diptych; print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'numpy', 'diptych')))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "['diptych']"


@pytest.mark.parametrize(("number", "speaks"), [("0", True), ("1", False)])
def test_the_first_of_several_processes_speaks(number, speaks):
    environment = {**os.environ, "RANK": number, "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "diptych", "data", "kinds"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert bool(result.stdout) == speaks
