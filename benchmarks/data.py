"""Data at scale: what opening a data set costs each process, and what reading ahead brings.

    python benchmarks/data.py [--quick] [--records 300000] [--processes 2]

Start-up: processes open one JSONL file together (each record with two pictures in files of their own), as those of one training do; for a
tenth of the records and for all of them. `no cache`: each goes through all rows, as every start did before there was an index;
`cold`: the index is not there yet; `warm`: it is. Seconds by the clock and of CPU, and MiB of memory that a process has more behind the
opening than before, its own (`private`) and of mapped files (`shared`); each of the process with most, and with least (one makes the
index, or looks for the pictures, and the others wait). `limit`: seconds of reading the file's lines and parsing each.

Reading: batches of records whose pictures (1024 x 768 JPEG) are decoded and scaled to 384 pixels, in turn and by threads ahead, beside a
stand-in for the device's work, which sleeps for as long as a batch takes in turn. The limit is then twice as fast as in turn. `reader`
says whether all gave the same. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from diptych.config import MixtureSource
from diptych.data import Mixture, Record
from diptych.data.background import Reader
from diptych.models.pixels import to_pixels
from diptych.runtime import versions

PICTURES = 2000


def written(folder: Path, count: int, size: tuple[int, int], pictures: int) -> Path:
    """Records with two of some pictures each."""
    names = []
    for i in range(pictures):
        path = folder / "images" / f"{i % 256:02x}" / f"{i:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).resize(size, PIL.Image.Resampling.BICUBIC).save(path, quality=90)
        names.append(path.relative_to(folder).as_posix())
    with (folder / "records.jsonl").open("w") as stream:
        for i in range(count):
            answer = [
                {"type": "text", "text": "A man sets up a tent. " * 4}, {"type": "image", "image": names[i % pictures]},
                {"type": "text", "text": "He goes on with it."}, {"type": "image", "image": names[i * 7 % pictures]},
            ]  # fmt: skip
            messages = [{"role": "user", "content": f"Tell what happens in video {i} in 2 steps, each with a picture."}]
            stream.write(json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}], "id": f"r{i}"}) + "\n")
    return folder / "records.jsonl"


# --- start-up ------------------------------------------------------------------------------------------------------------


def memory() -> dict[str, float]:
    """MiB of this process, its own and of mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("private", "RssAnon"), ("shared", "RssFile"))}


def open_once(file: str) -> dict[str, float]:
    """In a process of its own: both splits, as a training opens them."""
    before, began, cpu = memory(), time.perf_counter(), time.process_time()
    train = Mixture([MixtureSource(name=file)], 0)
    validation = Mixture([MixtureSource(name=file)], 0, "validation", beside=train)
    found = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    after = memory()
    records = [source.size for mixture in (train, validation) for source in mixture.sources]
    return {**found, **{name: after[name] - before[name] for name in after}, "records": sum(size or 0 for size in records)}


def opened(file: Path, processes: int, cache: Path) -> dict[str, float]:
    environment = {**os.environ, "DIPTYCH_CACHE": str(cache), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", str(file)]
    running = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    names = ("seconds", "cpu", "private", "shared")
    return {f"{kind}{name}": round(best(one[name] for one in found), 2) for name in names for kind, best in (("", max), ("least_", min))}


def parsed(file: Path) -> float:
    began = time.perf_counter()
    with file.open("rb") as stream:
        for line in stream:
            json.loads(line)
    return round(time.perf_counter() - began, 2)


def start_up(scratch: Path, records: int, processes: int) -> list[dict[str, Any]]:
    table = []
    for count in (records // 10, records):
        folder = scratch / str(count)
        file = written(folder, count, (64, 48), min(PICTURES, count))
        time.sleep(2.5)  # a file that was changed just now is not remembered
        line: dict[str, Any] = {"records": count, "mb": round(file.stat().st_size / 1e6, 1), "processes": processes, "limit": parsed(file)}
        for name, cache in (("no cache", file), ("cold", folder / "cache"), ("warm", folder / "cache")):
            table.append({**line, "start": name, **opened(file, processes, cache)})
        table[-1]["index_mb"] = round(sum(path.stat().st_size for path in (folder / "cache").rglob("*.index")) / 1e6, 1)
    return table


# --- reading -------------------------------------------------------------------------------------------------------------


def prepare(_: int) -> Callable[[int, Record], Callable[[], str]]:
    """A hash of the prepared pixels of each record."""

    def make(_: int, record: Record) -> Callable[[], str]:
        assert record.answer is not None
        pixels = to_pixels([image.pixels for image in record.answer.images if image.pixels is not None], 384)
        digest = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=8).hexdigest()
        return lambda: digest

    return make


def read(mixture: Mixture, reader: Reader, steps: int, size: int, compute: float) -> tuple[float, list[Any]]:
    """Seconds a step, and what was read."""
    found = []
    with reader:
        found.append(reader.made(mixture, 0, size, prepare, last=steps))
        began = time.perf_counter()
        for step in range(1, steps):
            time.sleep(compute)
            found.append(reader.made(mixture, step, size, prepare, last=steps))
        return (time.perf_counter() - began) / (steps - 1), found


def reading(scratch: Path, steps: int, size: int) -> list[dict[str, Any]]:
    mixture = Mixture([MixtureSource(name=str(written(scratch / "large", 400, (1024, 768), 100)))], 0)
    compute, expected = read(mixture, Reader(), steps, size, 0.0)
    table = []
    for workers in (0, 1, 2, 4):
        seconds, found = read(mixture, Reader(workers, 2), steps, size, compute)
        table.append(
            {"workers": workers, "step_seconds": round(seconds, 3), "compute_seconds": round(compute, 3),
             "records_per_second": round(size / seconds, 1), "waiting_seconds": round(seconds - compute, 3), "same": found == expected}
        )  # fmt: skip
    return table


def show(rows: list[dict[str, Any]]) -> None:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    print("  ".join(f"{head:>{max(9, len(head))}}" for head in heads))
    for row in rows:
        print("  ".join(f"{row.get(head, '')!s:>{max(9, len(head))}}" for head in heads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer records and steps")
    parser.add_argument("--records", type=int, default=300_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--one", metavar="FILE", help="one opening, in this process")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(open_once(arguments.one)))
        return
    if arguments.quick:
        arguments.records, arguments.steps = 20_000, 4
    with tempfile.TemporaryDirectory() as scratch:
        starts = start_up(Path(scratch), arguments.records, arguments.processes)
        show(starts)
        reads = reading(Path(scratch), arguments.steps, arguments.batch_size)
        show(reads)
    ratio = reads[0]["step_seconds"] / min(row["step_seconds"] for row in reads)
    report = {"name": "data", "ratio": round(ratio, 2), "limit": 2.0, "start_up": starts, "reading": reads, "versions": versions()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
