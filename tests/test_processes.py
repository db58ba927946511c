"""Several processes: what they log is about all of them, and when one ends, all end."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_training import grpo_config, tiny_folder  # noqa: F401 - a fixture

from diptych import runtime
from diptych.config import GRPOConfig, to_yaml
from diptych.runs import read_jsonl
from diptych.training.grpo import grpo
from diptych.training.preemption import EXIT_CODE, asked_to_stop, preemptible

TESTS = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ERROR = re.compile(r"error( \(process \d+\))?:")
PATIENCE = 30  # seconds from the fault to the end of all processes
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def recipe(config: GRPOConfig, path: Path) -> Path:
    path.write_text(to_yaml(config))
    return path


def launched(fault: str, config: GRPOConfig, path: Path, count: int = 2, **environment: str) -> subprocess.Popen[str]:
    command = [*LAUNCH, str(count), TESTS / "faulty_process.py", fault, recipe(config, path)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env={**ENVIRONMENT, **environment}, text=True, start_new_session=True, **pipes)


def ended(process: subprocess.Popen[str]) -> str:
    """What it said. Whoever is left would be in the session that torchrun began."""
    try:
        _, said = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert in_session(process.pid) == [], said[-2000:]
    return said


def in_session(session: int) -> list[str]:
    """The processes of a session, those that only wait to be taken note of left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(path.parent.name)
    return found


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("toy_rewards:wrong_count_of_the_second", "returned 0 values for"),
        ("parity", "sampled and replayed differ"),
        ("not finite", "is not finite"),
        ("bad record", "half of a character"),
        ("bug", "a fault of ours"),
    ],
)
def test_a_fault_in_one_process_ends_all(tiny_folder, tmp_path, fault, told):  # noqa: F811
    reward = fault if ":" in fault else "toy_rewards:per_step"
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=300, num_minibatches=1, rewards=[{"name": reward}])
    process = launched(fault, config, tmp_path / "grpo.yaml")
    said = ended(process)
    assert process.returncode != 0
    assert told in said
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize(
    ("fault", "told"),
    [("not finite", "is not finite"), ("full disk", "no space left"), ("other code", "the processes do not have the same code of diptych")],
)
def test_a_fault_in_one_of_four_sharded_processes_ends_all(tiny_folder, tmp_path, fault, told):  # noqa: F811
    """Within half a minute, and nothing of a checkpoint is left; of those that were complete, all."""
    changes = {"max_steps": 300, "num_minibatches": 1, "prompts_per_step": 4, "num_generations": 2, "save_steps": 1}
    config = grpo_config(tiny_folder, tmp_path / "run", parallel={"mode": "shard", "shard_size": 2}, **changes)
    process = launched(fault, config, tmp_path / "grpo.yaml", 4, FAULT_AT=str(tmp_path / "at"))
    said = ended(process)
    assert time.time() - (tmp_path / "at").stat().st_mtime < PATIENCE
    assert process.returncode != 0
    assert told in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*")] == (["step_1"] if fault == "full disk" else [])


def test_a_process_that_does_not_come_is_named(tiny_folder, tmp_path):  # noqa: F811
    process = launched("late", grpo_config(tiny_folder, tmp_path / "run"), tmp_path / "grpo.yaml", DIPTYCH_JOIN_SECONDS="2")
    said = ended(process)
    assert process.returncode != 0
    assert "within 2 s (DIPTYCH_JOIN_SECONDS): 1 did not come" in said


def test_processes_that_are_started_again_meet_anew():
    """In the store of those that died, some of them before all had met: torch's own start would go to their addresses."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def life(*lateness: float | None) -> list[str]:
        """What each process is told that comes so late; None: not at all."""

        def come(number: int) -> str:
            time.sleep(lateness[number] or 0)
            store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
            try:
                return runtime.session(store, number, len(lateness), 1.5)
            except TimeoutError as error:
                return str(error)

        here = [number for number, late in enumerate(lateness) if late is not None]
        with ThreadPoolExecutor(len(here)) as pool:
            return list(pool.map(come, here))

    lives = [life(0, 0.3, 0.1), life(0, 0.3, None), life(0.5, 0, 0.2), life(0.2, 0.4, 0), life(None, 0, 0), life(0, 0, 0.4)]
    assert lives[1][0].startswith("2 did not come")
    assert all(said.startswith("some did not come") for said in lives[4])
    met = [lives[number] for number in (0, 2, 3, 5)]
    assert all(len(set(told)) == 1 for told in met)
    assert len({told[0] for told in met}) == 4


def test_processes_that_do_not_meet_are_told_where(tiny_folder, tmp_path):  # noqa: F811
    """Without torchrun, which would keep the place where they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "diptych", "grpo", recipe(grpo_config(tiny_folder, tmp_path / "run"), tmp_path / "grpo.yaml")]
    done = subprocess.run(command, env={**ENVIRONMENT, **alone, "DIPTYCH_JOIN_SECONDS": "2"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"the 3 processes did not meet at 127.0.0.1:{port} within 2 s (DIPTYCH_JOIN_SECONDS)" in done.stderr


def test_all_end_soon_when_one_does_or_is_interrupted(tiny_folder, tmp_path):  # noqa: F811
    """The time counts from the interruption: Ctrl-C reaches the launcher alone, as in a job's script."""
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=3000, save_steps=1, num_minibatches=1)
    process = launched("none", config, tmp_path / "grpo.yaml")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "checkpoints").glob("step_*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    ended(process)
    assert time.monotonic() - began < PATIENCE
    assert process.returncode != 0
    steps = len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert 0 < steps < 3000


def test_processes_with_other_folders_do_not_train_different_models(tiny_folder, tmp_path):  # noqa: F811
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=2, num_minibatches=1)
    grpo(config)
    longer = config.model_copy(update={"max_steps": 4})
    process = launched("other folder", longer, tmp_path / "grpo.yaml", OTHER_FOLDER=str(tmp_path / "elsewhere"))
    said = ended(process)
    assert process.returncode != 0
    assert "the processes do not have the same run folder" in said
    assert "output_dir must be a folder that all of them see" in said


def test_processes_with_other_settings_do_not_train_one_model(tiny_folder, tmp_path):  # noqa: F811
    process = launched("other settings", grpo_config(tiny_folder, tmp_path / "run", num_minibatches=1), tmp_path / "grpo.yaml")
    said = ended(process)
    assert process.returncode != 0
    assert said.count("the processes do not have the same settings (by their hash)") == 1  # told once
    assert "error (process 0):" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("what", ["mine.py", "d.jsonl"])
def test_machines_with_other_inputs_do_not_train_one_model(tiny_folder, tmp_path, monkeypatch, what):  # noqa: F811
    for name in ("here", "there"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.py").write_text("def r(completions, **_):\n    return [float(len(str(c))) for c in completions]\n")
        (folder / "d.jsonl").write_text('{"messages": [{"role": "user", "content": "tell the story ."}]}\n')
    with (tmp_path / "there" / what).open("a") as stream:
        stream.write("\n")
    monkeypatch.chdir(tmp_path / "here")
    config = grpo_config(
        tiny_folder, tmp_path / "run", rewards=[{"name": "mine:r"}], prompts=[{"name": "d.jsonl"}], num_minibatches=1, max_steps=2
    )
    process = launched("other machine", config, tmp_path / "grpo.yaml", OTHER_FOLDER=str(tmp_path / "there"))
    said = ended(process)
    assert process.returncode != 0
    assert (
        f"machine 1 has other inputs than machine 0: {'reward mine:r' if what == 'mine.py' else 'data d.jsonl'} (changed: {what})" in said
    )


def test_two_processes_log_what_one_logs(tiny_folder, tmp_path):  # noqa: F811
    """The same documents, so the same rewards, shares, lengths, gaps and losses."""
    settings = {
        "max_steps": 3, "num_minibatches": 1, "prompts_per_step": 4, "resample_attempts": 1, "eval_steps": 2, "num_eval_prompts": 3,
        "rewards": [{"name": "toy_rewards:flat_for_some"}, {"name": "toy_rewards:sometimes_missing", "weight": 0}],
        "ptx": {"sources": [{"name": "storyboard:understanding"}], "coef": 0.5, "batch_size": 5},
    }  # fmt: skip
    found = []
    for count in (1, 2):
        config = grpo_config(tiny_folder, tmp_path / f"run{count}", **settings)
        process = launched("none", config, tmp_path / "grpo.yaml", count)
        assert not ERROR.search(ended(process))
        assert process.returncode == 0
        found.append(read_jsonl(tmp_path / f"run{count}" / "metrics.jsonl"))
    one, two = found
    assert [line["frac_groups_resampled"] > 0 for line in one] == [True] * 3
    assert any(0 < line["rewards/toy_rewards:sometimes_missing/missing"] < 1 for line in one)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"step_time", "seconds/rollout"}:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5, nan_ok=True), name
    samples = [(tmp_path / f"run{count}" / "samples" / "step_2.jsonl").read_text() for count in (1, 2)]
    assert samples[0] == samples[1]


def test_more_processes_than_rows(tiny_folder, tmp_path):  # noqa: F811
    """Of a warm-up batch of one row, and of retained skills beside GRPO: the third process has nothing to do."""
    settings = {"num_minibatches": 1, "prompts_per_step": 3, "max_steps": 2}
    config = grpo_config(
        tiny_folder, tmp_path / "run", ptx={"sources": [{"name": "storyboard:understanding"}], "coef": 0.5, "batch_size": 1}, **settings
    )
    process = launched("none", config, tmp_path / "grpo.yaml", 3)
    assert not ERROR.search(ended(process))
    assert process.returncode == 0
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize("fault", ["bug", "parity"])
def test_nobody_waits_for_a_reward_that_hangs(tiny_folder, tmp_path, fault):  # noqa: F811
    rewards = [{"name": "toy_rewards:hangs_in_the_background"}]
    config = grpo_config(tiny_folder, tmp_path / "run", rewards=rewards, background_rewards=True, num_minibatches=1)
    began = time.monotonic()
    process = launched("parity" if fault == "parity" else "bug while sampling", config, tmp_path / "grpo.yaml")
    ended(process)
    assert process.returncode != 0
    assert time.monotonic() - began < 60


def test_checksums_tell_weights_apart():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3).bfloat16())
    before = runtime.weights_checksum(model)
    assert runtime.weights_checksum(model) == before
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.flatten()[0].item()
            parameter.view(-1)[0] = math.nextafter(kept, 9) if parameter.dtype == torch.float64 else kept * 1.01 + 0.01
            assert runtime.weights_checksum(model) != before
            parameter.view(-1)[0] = kept
    assert runtime.weights_checksum(model) == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_that_wants_the_machine_back(tiny_folder, tmp_path, name):  # noqa: F811
    """The signal reaches one process; both finish the step and save it. The same command resumes to the weights of an undisturbed run."""
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=400, save_steps=1000, num_minibatches=1, logging_steps=1)
    process = launched("none", config, tmp_path / "grpo.yaml")
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.is_file() and len(read_jsonl(log)) >= 2):
        assert process.poll() is None
        time.sleep(0.1)
    running = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline")]
    mine = {number: command_of(number) for number in running if str(tmp_path / "grpo.yaml") in command_of(number)}
    workers = [int(number) for number, command in mine.items() if "torch.distributed.run" not in command]
    assert len(workers) == 2
    os.kill(max(workers), getattr(signal, name))
    said = ended(process)
    assert f"exitcode  : {EXIT_CODE}" in said
    (step,) = [int(path.name.removeprefix("step_")) for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert step == len(read_jsonl(log)) < 400
    goes_on = grpo_config(tiny_folder, tmp_path / "run", max_steps=step + 1, save_steps=1000, num_minibatches=1, logging_steps=1)
    whole = grpo_config(tiny_folder, tmp_path / "whole", max_steps=step + 1, save_steps=1000, num_minibatches=1, logging_steps=1)
    for one in (goes_on, whole):
        assert not ERROR.search(ended(launched("none", one, tmp_path / "grpo.yaml")))
    one, two = (load_file(tmp_path / run / "checkpoints" / f"step_{step + 1}" / "model" / "model.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def command_of(process: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""


def test_one_process_ends_with_the_code_that_says_so(tiny_folder, tmp_path):  # noqa: F811
    config = grpo_config(tiny_folder, tmp_path / "run", max_steps=400, save_steps=1000)
    command = [sys.executable, "-m", "diptych", "grpo", str(recipe(config, tmp_path / "grpo.yaml"))]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.is_file() and read_jsonl(log)):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_CODE
    assert "Stopped by SIGTERM: step" in said
    assert "the same command resumes" in said


def test_an_interrupt_that_python_drops_is_taken_up_behind_the_step(monkeypatch):
    """In a destructor a KeyboardInterrupt is ignored: the training would go on to its end."""

    class Last:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it
    try:
        with preemptible() as requests:
            assert asked_to_stop(requests) == ""
            Last()  # and gone
            with pytest.raises(KeyboardInterrupt):
                asked_to_stop(requests)
        assert [one.exc_type for one in dropped] == [KeyboardInterrupt]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
