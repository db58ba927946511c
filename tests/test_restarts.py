"""Under `torchrun --max-restarts` a training whose processes are killed ends with the weights of one that nobody disturbed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from test_processes import ENVIRONMENT, TESTS
from test_training import tiny_folder  # noqa: F401 - a fixture


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_processes_change_nothing(tiny_folder):  # noqa: F811
    command = [sys.executable, str(TESTS / "random_kills.py"), "--kills", "2", "--model", str(tiny_folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout)
    assert facts["kills"] == 2
    assert facts["exit code"] == 0
    assert facts["same weights"]
