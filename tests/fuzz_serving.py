"""Broken and strange requests, many of them:

    python tests/fuzz_serving.py --count 10000      our own, and as many of schemathesis', which reads the server's OpenAPI document

Prints what statuses came, and how the server's memory grew. Exits with 1 where a status is 500 or more, an answer has not OpenAI's form of
an error, a traceback is in an answer or in the log, or memory grows.
"""

from __future__ import annotations

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import http.client
import io
import json
import logging
import random
import subprocess
import sys
from typing import Any

import PIL.Image
import psutil
import torch
from served import serving

from diptych.models import load_model

WORDS = [
    "tell the story .",
    "draw this . a box .",
    "",
    " ",
    "\x00",
    "\ud800",
    "ball " * 200,
    "<script>",
    "💥" * 20,
    "data:image/png;base64,",
]
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 0.5, 1e308, 1e-320, "", "a", "1", [], {}, [None], {"a": 1}, [[[]]], "\ud800", "text",
]  # fmt: skip
NAMES = [
    "model", "messages", "n", "seed", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stream", "stream_options", "stop",
    "diptych", "modalities", "user", "logit_bias", "tools", "role", "content", "type", "text", "image_url", "url", "form", "max_images",
    "guidance_scale", "image_guidance_scale", "max_text_tokens", "top_k", "image_temperature", "image_top_p", "prompt", "size", "__proto__",
]  # fmt: skip


def picture(rng: random.Random) -> str:
    """A data address, often of a damaged file."""
    buffer = io.BytesIO()
    size = rng.choice([(1, 1), (96, 96), (3, 200)])
    PIL.Image.new(rng.choice(["RGB", "L", "RGBA", "P"]), size).save(buffer, rng.choice(["PNG", "GIF", "TIFF"]))
    raw = bytearray(buffer.getvalue())
    for _ in range(rng.choice([0, 0, 1, 5])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    raw = raw[: rng.choice([len(raw), len(raw), len(raw) // 2])]
    return "data:image/png;base64," + base64.b64encode(bytes(raw)).decode()[: rng.choice([None, None, None, 13])]


def valid(rng: random.Random) -> tuple[str, Any]:
    options = {
        "form": rng.choice(["free", "text", "image", "text_image"]),
        "max_images": rng.randint(0, 2),
        "max_text_tokens": rng.randint(1, 9),
    }
    body: dict[str, Any] = {"model": "m", "seed": rng.randrange(2**40), "n": rng.randint(1, 2), "diptych": options}
    if rng.random() < 0.3:
        return "/v1/images/generations", {**body, "prompt": rng.choice(WORDS), "diptych": {"form": "image"}}
    parts: list[Any] = [{"type": "text", "text": rng.choice(WORDS)}]
    if rng.random() < 0.4:
        parts.insert(0, {"type": "image_url", "image_url": {"url": picture(rng)}})
    messages = [{"role": "user", "content": rng.choice([parts, rng.choice(WORDS)])}]
    extra = rng.choice(
        [{}, {"stream": True}, {"temperature": rng.random() * 3}, {"top_p": rng.random()}, {"max_tokens": rng.randint(1, 9)}]
    )
    return "/v1/chat/completions", {**body, "messages": messages, **extra}


def mutated(rng: random.Random, value: Any) -> Any:
    """Something within it is another thing."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.6:
            return {**value, name: mutated(rng, value[name])}
        if kind < 0.8:
            return {**value, rng.choice(NAMES): rng.choice(VALUES)}
        return {key: one for key, one in value.items() if key != name}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + 1 :]] if rng.random() < 0.8 else value * rng.choice([0, 2, 50])
    return rng.choice(VALUES)


def request_of(rng: random.Random) -> tuple[str, bytes]:
    path, body = valid(rng)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        body = mutated(rng, body)
    raw = json.dumps(body).encode()
    if rng.random() < 0.15:
        broken = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        raw = bytes(broken)[: rng.randint(0, len(broken))]
    return path, raw


def send(port: int, path: str, raw: bytes) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        connection.request("POST", path, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def wrong(status: int, told: bytes) -> str | None:
    """What is wrong about an answer."""
    if b"Traceback" in told or b'File "' in told:
        return "a traceback"
    if status >= 500:
        return f"status {status}"
    if status == 200:
        return "an error in a stream" if b'data: {"error"' in told else None
    error = json.loads(told)["error"]
    return None if set(error) == {"message", "type", "param", "code"} and error["message"] else "another form"


class Listener(logging.Handler):
    """Keeps what the log says of failures."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(self.format(record))


def fuzz(port: int, count: int, seed: int) -> tuple[collections.Counter[int], list[str]]:
    """Statuses by how often they came, and what was wrong."""
    rng, statuses, found = random.Random(seed), collections.Counter[int](), []
    asked = [request_of(rng) for _ in range(count)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for (path, raw), (status, told) in zip(asked, pool.map(lambda one: send(port, *one), asked), strict=True):
            statuses[status] += 1
            if problem := wrong(status, told):
                found.append(f"{problem}: {path} {raw[:500]!r} -> {told[:300]!r}")
    return statuses, found


def schemathesis(url: str, count: int, seed: int) -> subprocess.CompletedProcess[str]:
    """Its own fuzzing of every operation, `count` examples together."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--max-examples", str(max(1, count // 6)),
        "--checks", "not_a_server_error,content_type_conformance", "--phases", "coverage,fuzzing", "--seed", str(seed), "--no-color",
        "--request-timeout", "300", "--generation-database", "none", "--mode", "all", "--workers", "4",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("own", "schemathesis"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    listener, process, problems = Listener(), psutil.Process(), []
    with serving({"m": load_model("storyboard")}, max_waiting=1000, max_body=2_000_000) as server:
        log = logging.getLogger("diptych.serving")
        log.handlers = [listener]
        if arguments.only != "schemathesis":
            fuzz(server.port, 300, -1)  # what is loaded at the first use
            memory = []
            for part in range(4):
                statuses, found = fuzz(server.port, arguments.count // 4, arguments.seed * 4 + part)
                memory.append(process.memory_info().rss / 2**20)
                print(f"own {(part + 1) * arguments.count // 4}: {dict(sorted(statuses.items()))}, memory {memory[-1]:.0f} MiB", flush=True)
                problems += found
            if memory[3] > 1.1 * memory[1] + 20:
                problems.append(f"memory grows: {memory}")
        if arguments.only != "own":
            result = schemathesis(server.url, arguments.count, arguments.seed)
            print(result.stdout[-3000:], result.stderr[-1000:])
            print(f"memory {process.memory_info().rss / 2**20:.0f} MiB")
            problems += [] if result.returncode == 0 else ["schemathesis found failures"]
        assert server.scheduler.alive
    problems += listener.heard
    print("\n".join(problems[:20]) or "nothing is wrong")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
