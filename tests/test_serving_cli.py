"""`diptych serve` as a process: its port, its names, its ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from diptych.cli.serve import _named

BODY = {"model": "m", "messages": [{"role": "user", "content": "draw this . a box ."}], "diptych": {"form": "image"}, "n": 8}


def start(tmp_path) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-m", "diptych", "serve", "--port", "0", "--model", "m=storyboard"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    found = re.search(r"at (http://127\.0\.0\.1:\d+)", line := process.stdout.readline())
    assert found, line
    return process, found[1]


def ask(url: str, **changes):
    raw = json.dumps({**BODY, **changes}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", raw, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def lost(url: str) -> None:
    with pytest.raises((ConnectionError, urllib.error.URLError)):
        ask(url, diptych={"form": "text_image"})


def test_it_serves_and_stops_and_a_kill_leaves_nothing(tmp_path):
    process, url = start(tmp_path)
    try:
        assert len(ask(url)["choices"]) == 8
        told: list = []
        asking = threading.Thread(target=lambda: told.append(ask(url, diptych={"form": "text_image"})))
        asking.start()
        while not re.search(r"running_documents [1-9]", urllib.request.urlopen(f"{url}/metrics").read().decode()) and not told:
            pass
        process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert len(told[0]["choices"]) == 8  # what was being written was finished
        assert process.wait(60) == 0
    finally:
        process.kill()
    process, url = start(tmp_path)
    asking = threading.Thread(target=lost, args=(url,))
    asking.start()
    process.kill()
    process.wait(60)
    asking.join(60)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "diptych", "serve", "--port", str(taken.getsockname()[1])]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "something listens there already" in result.stderr
    assert "Traceback" not in result.stderr


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert _named(["storyboard", "x=runs/a", "a=b"]) == {"storyboard": "storyboard", "x": "runs/a", "a=b": "a=b"}
    for given, said in ((["x=1", "x=2"], "given twice"), (["=2"], "NAME=MODEL"), (["x="], "NAME=MODEL")):
        with pytest.raises(ValueError, match=said):
            _named(given)
