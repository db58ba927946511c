"""How many documents a server writes, and how soon the first word and the first picture come, under the traffic of many clients.

    python benchmarks/serve.py [--clients 32] [--seconds 60] [--quick]

Each client asks by HTTP for a streamed answer (every other a free document, the others a text, a picture or both), waits for it, pauses for
a random time (exponential: together the requests arrive as a Poisson process), and asks again. Three ways of one scheduler are measured:

- `continuous`: documents join those that are being written at the next phase;
- `whole`: they wait until all that are being written are finished;
- `single`: one at a time.

The model is the packaged `storyboard`, which seldom draws before it was trained to: its token that begins a picture is made as likely as
its end of a text and a little more, so that documents have up to four pictures (`tests/served.py`). At the end every answer is compared
with the one that `diptych generate` writes alone for its prompt and seed. Prints a table, then one JSON line.

`passes`: forward passes of the decoder a document, and the mean number of rows in one (an unconditional branch is a row). On a CPU a pass
costs by the row, on an accelerator that has room for more rows it costs about the same.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

WAYS = {"continuous": {"join": True}, "whole": {"join": False}, "single": {"max_batch": 1, "max_choices": 1}}
PROMPTS = [
    "tell the story . in the middle a big red ball , in the meadow . first snow falls , then the ball turns purple .",
    "tell the story . on the left a small blue house , at night . first the house grows .",
    "how do we build this ? on the left a small blue flower , in the middle a small blue house , at night .",
    "how do we build this ? on the right a big green tree , at the beach .",
]
FORMS = ("free", "free", "free", "text_image", "text", "image")
WARM_UP = 6


def serve(way: str, clients: int) -> None:
    """In a process of its own: says its port, and on a line of its standard input what was spent; then ends."""
    import torch
    from served import drawing, serving

    torch.set_num_threads(1)
    options = {"max_batch": clients, "max_waiting": 4 * clients, **WAYS[way]}
    model, rows = drawing("storyboard"), []
    plain = model.backbone
    model.backbone = lambda embeds, *others: (rows.append(len(embeds)), plain(embeds, *others))[1]  # type: ignore[method-assign]
    with serving({"storyboard": model}, **options) as server:
        print(server.port, flush=True)
        began = time.process_time()
        sys.stdin.readline()
        print(json.dumps({"cpu_seconds": time.process_time() - began, "passes": len(rows), "rows": sum(rows)}), flush=True)


class Answer:
    """Of one request: when it was sent and when its parts came (seconds), and what it says: texts, and hashes of pictures."""

    def __init__(self, prompt: str, form: str, seed: int) -> None:
        self.prompt, self.form, self.seed, self.sent = prompt, form, seed, time.perf_counter()
        self.first_text = self.first_picture = self.end = 0.0
        self.parts: list[str] = []


def pixels_of(url: str) -> str:
    import io

    import PIL.Image

    with PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        return "picture " + hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


async def ask(port: int, prompt: str, form: str, seed: int) -> Answer:
    """By HTTP/1.1 over a plain socket: the clients share one core with nothing else to do."""
    body = json.dumps(
        {
            "model": "storyboard",
            "messages": [{"role": "user", "content": prompt}],
            "seed": seed,
            "temperature": 1.0,
            "stream": True,
            "diptych": {"form": form},
        }
    ).encode()
    answer = Answer(prompt, form, seed)
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status = await reader.readline()
    assert b" 200 " in status, status
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        now, chunk = time.perf_counter(), json.loads(line[6:])
        assert "error" not in chunk, chunk
        delta = chunk["choices"][0]["delta"]
        if delta.get("content"):
            answer.first_text = answer.first_text or now
            if answer.parts and not answer.parts[-1].startswith("picture "):
                answer.parts[-1] += delta["content"]
            else:
                answer.parts.append(delta["content"])
        for picture in delta.get("images", []):
            answer.first_picture = answer.first_picture or now
            answer.parts.append(picture["image_url"]["url"])  # decoded when the time is over
        if chunk["choices"][0]["finish_reason"]:
            answer.end = now
    writer.close()
    assert answer.end, "an answer was lost"
    return answer


async def traffic(port: int, clients: int, seconds: float, pause: float) -> tuple[list[Answer], float]:
    """All answers to requests that were sent within the time, and the seconds until the last came."""
    await asyncio.gather(*(ask(port, PROMPTS[i % len(PROMPTS)], FORMS[i % len(FORMS)], i) for i in range(WARM_UP)))
    began = time.perf_counter()

    async def client(number: int) -> list[Answer]:
        rng, found = random.Random(number), []
        while True:
            await asyncio.sleep(rng.expovariate(1 / pause))
            if time.perf_counter() - began > seconds:
                return found
            found.append(await ask(port, rng.choice(PROMPTS), rng.choice(FORMS), rng.randrange(2**31)))

    found = [answer for some in await asyncio.gather(*(client(i) for i in range(clients))) for answer in some]
    return found, max(answer.end for answer in found) - began


def measure(way: str, clients: int, seconds: float, pause: float) -> dict[str, Any]:
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", way, "--clients", str(clients)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        port = int(process.stdout.readline())
        answers, took = asyncio.run(traffic(port, clients, seconds, pause))
        print(file=process.stdin, flush=True)
        spent = json.loads(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(60)
    for answer in answers:
        answer.parts = [pixels_of(part) if part.startswith("data:") else part for part in answer.parts]
    texts = [answer.first_text - answer.sent for answer in answers if answer.first_text]
    pictures = [answer.first_picture - answer.sent for answer in answers if answer.first_picture]
    written = len(answers) + WARM_UP
    return {
        "way": way, "documents": len(answers), "seconds": took, "documents_per_minute": 60 * len(answers) / took,
        "cpu_seconds": spent["cpu_seconds"], "documents_per_cpu_minute": 60 * written / spent["cpu_seconds"],
        "passes_per_document": spent["passes"] / written, "rows_per_pass": spent["rows"] / max(1, spent["passes"]),
        "pictures": sum(part.startswith("picture ") for answer in answers for part in answer.parts),
        "first_text": quantiles(texts), "first_picture": quantiles(pictures),
        "whole": quantiles([answer.end - answer.sent for answer in answers]), "answers": answers,
    }  # fmt: skip


def quantiles(values: list[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def compare(results: list[dict[str, Any]]) -> dict[str, int]:
    """How many answers are those that are written alone, to the last pixel; how many differ in pixels only; how many in more."""
    import torch
    from served import drawing

    from diptych.document import Document, Text
    from diptych.forms import AnswerForm
    from diptych.runtime import generator
    from diptych.sampling.engine import fit_to_context, sample

    torch.set_num_threads(1)
    model = drawing("storyboard")
    release = model.default_sampling
    both = {name: getattr(release, name).model_copy(update={"temperature": 1.0}) for name in ("text", "image")}
    counts = {"equal": 0, "pixels": 0, "other": 0}
    known: dict[tuple[str, str, int], list[str]] = {}
    for answer in [answer for result in results for answer in result["answers"]]:
        row = model.encode_prompt(Document((Text(answer.prompt),)), AnswerForm(answer.form))
        params = fit_to_context(model, row, release.model_copy(update=both))
        key = (answer.prompt, answer.form, answer.seed)
        parts = known.get(key) or [
            segment.text if isinstance(segment, Text) else "picture " + hashlib.sha256(segment.pixels.tobytes()).hexdigest()
            for segment in sample(model, [row], params, generator=generator(answer.seed))[0].document
        ]
        parts = known[key] = [part for part in parts if part]
        kinds = [[part if not part.startswith("picture ") else "picture" for part in some] for some in (parts, answer.parts)]
        counts["equal" if parts == answer.parts else "pixels" if kinds[0] == kinds[1] else "other"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic, for each way")
    parser.add_argument("--pause", type=float, default=0.5, help="mean seconds between a client's answer and his next request")
    parser.add_argument("--quick", action="store_true", help="ends within a minute on two cores")
    parser.add_argument("--serve", choices=tuple(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.clients)
        return
    if arguments.quick:
        arguments.clients, arguments.seconds = 8, 4.0
    results = [measure(way, arguments.clients, arguments.seconds, arguments.pause) for way in WAYS]
    counts = compare(results)
    print(f"{arguments.clients} clients, a pause of {arguments.pause:g} s on average, {arguments.seconds:g} s of traffic for each way")
    counted = f"{'documents/min':>14}{'a CPU minute':>14}{'passes (rows)':>16}{'pictures':>10}"
    print(f"{'':<12}{counted}{'first text':>20}{'first picture':>20}{'whole document':>20}")
    for one in results:
        times = "".join(f"{f'{one[name][0]:.2f} / {one[name][1]:.2f} s':>20}" for name in ("first_text", "first_picture", "whole"))
        passes = f"{one['passes_per_document']:.1f} ({one['rows_per_pass']:.1f})"
        rates = f"{one['documents_per_minute']:>14.0f}{one['documents_per_cpu_minute']:>14.0f}"
        print(f"{one['way']:<12}{rates}{passes:>16}{one['pictures']:>10}{times}")
    kinds = ("documents_per_minute", "documents_per_cpu_minute")
    ratios = {kind: {one["way"]: results[0][kind] / one[kind] for one in results[1:]} for kind in kinds}
    print("times: median / 99th percentile")
    for kind, found in ratios.items():
        words = f"{found['single']:.2f} times those of one at a time, {found['whole']:.2f} times those of whole batches"
        print(f"{kind.replace('_', ' ')}, continuous: {words}")
    print(f"compared with documents written alone: {counts['equal']} equal, {counts['pixels']} in other pixels, {counts['other']} other")
    from diptych.runtime import versions

    for one in results:
        del one["answers"]
    sizes = {name: getattr(arguments, name) for name in ("clients", "seconds", "pause")}
    print(json.dumps({"name": "serve", "ratios": ratios, "compared": counts, "ways": results, "sizes": sizes, "versions": versions()}))
    if counts["other"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
