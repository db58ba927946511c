"""The launching scripts of docs/how-to/scale.md, with stand-ins for what they call."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser as launch_options


def block(language: str, part: str) -> str:
    """The one code block of docs/how-to/scale.md that has `part`."""
    text = (Path(__file__).parents[1] / "docs" / "how-to" / "scale.md").read_text()
    (found,) = [code for code in re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if part in code]
    return found


COMMANDS = {  # in the place of Slurm's and torchrun
    "scontrol": 'if [ "$1" = show ]; then echo "$3"; else echo "$@" > requeued; fi',
    "srun": 'while [ "$1" != torchrun ]; do shift; done; exec "$@"',
    "torchrun": "echo \"$@\" > launched; trap 'exit 1' USR1; touch ready; for i in $(seq 600); do if [ -e fail ]; then exit 3; fi; "
    "if [ -e done ]; then exit 0; fi; sleep 0.05; done",
}


@pytest.mark.parametrize(("event", "code"), [("signal", 1), ("fail", 3), ("done", 0)])
def test_the_batch_script_queues_again_what_ran_out_of_time(tmp_path, event, code):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "train.sh").write_text(block("bash", "#SBATCH"))
    told = {"SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "8", "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "2"}
    environment = {**os.environ, **told, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    script = subprocess.Popen(["bash", "train.sh"], cwd=tmp_path, env=environment)
    for _ in range(600):
        if (tmp_path / "ready").exists():
            break
        time.sleep(0.05)
    if event == "signal":
        script.send_signal(signal.SIGUSR1)  # B: to the script alone
    else:
        (tmp_path / event).touch()
    assert script.wait(timeout=30) == code
    assert (tmp_path / "requeued").exists() == (event == "signal")
    launched = (tmp_path / "launched").read_text()
    assert "--nnodes 8 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint n1:29500 --rdzv_id 42-0" in launched
    options = launch_options().parse_args(launched.split())
    assert (options.nnodes, options.training_script) == ("8", "diptych")
    assert "SIGUSR1" in options.signals_to_handle


def test_the_job_for_kubernetes_fits_together():
    service, job = yaml.safe_load_all(block("yaml", "completionMode"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (container,) = pod["containers"]
    (script,) = container["args"]
    options = launch_options().parse_args(shlex.split(script.replace("$JOB_COMPLETION_INDEX", "3"))[2:])
    assert int(options.nnodes) == spec["completions"] == spec["parallelism"]
    assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert options.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert int(options.shutdown_timeout) < pod["terminationGracePeriodSeconds"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
