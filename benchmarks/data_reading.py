"""Reading records where they stand: Diptych's readers against Hugging Face `datasets`, and against reading and parsing the bytes.

    python benchmarks/data_reading.py [--quick]        # beside it, for their side: pip install datasets

JSON lines and parquet with small row groups: opened, then 1,000 records at random places, in CPU seconds (the median of three). And
what small files become: rows that come back the same, with null for what was absent, changed without a word, or refused. Prints
tables, then one JSON line; `limit` is the CPU time of reading the JSON lines and parsing each, and of reading the parquet file once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from diptych.data.problems import Problems
from diptych.data.readers import json_lines
from diptych.data.records import open_source
from diptych.runtime import versions

USER, BLOCKS = {"role": "user", "content": "q"}, [{"type": "text", "text": "q"}]
PROBES: dict[str, list[dict[str, Any]]] = {  # what people's files hold
    "plain": [{"a": "x"}, {"a": "y"}],
    "absent column": [{"a": "x", "n": 1}, {"a": "y"}],
    "dates": [{"a": "2024-05-01"}, {"a": "2024-05-02"}],
    "integers and floats": [{"a": 1}, {"a": 1.5}],
    "beyond 64 bits": [{"a": 2**70}, {"a": 1}],
    "number or text": [{"a": "2"}, {"a": 2}],
    "content of text and of blocks": [{"m": [{**USER, "content": BLOCKS}]}, {"m": [{**USER, "content": "4"}]}],
    "content that is a word of JSON": [{"m": [{**USER, "content": BLOCKS}]}, {"m": [{**USER, "content": "true"}]}],
    "nested null": [{"a": {"b": None}}, {"a": {"b": 1}}],
    "objects of other keys": [{"a": {"b": 1}}, {"a": {"c": "x"}}],
    "empty lists": [{"a": []}, {"a": ["x"]}],
    "true or number": [{"a": True}, {"a": 1}],
}


def strict(value: Any) -> str:
    """Types and all."""
    return json.dumps(value, sort_keys=True)


def without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_null(one) for key, one in value.items() if one is not None}
    return [without_null(one) for one in value] if isinstance(value, list) else value


def theirs(file: Path, kind: str, cache: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    shutil.rmtree(cache, ignore_errors=True)
    return datasets.load_dataset(kind, data_files=str(file), cache_dir=str(cache), split="train")


def verdict(rows: list[dict[str, Any]], read: Callable[[], list[dict[str, Any]]]) -> str:
    try:
        found = read()
        if [strict(row) for row in found] == [strict(row) for row in rows]:
            return "same"
        if [strict(without_null(row)) for row in found] == [strict(without_null(row)) for row in rows]:
            return "null for absent"
    except TypeError:
        return "changed"  # into what JSON has no words for
    except Exception:
        return "refused"
    return "changed"


def probed(folder: Path, has_theirs: bool) -> list[dict[str, str]]:
    table = []
    for name, rows in PROBES.items():
        file = folder / "probe.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with file.open("rb") as stream:
            ours = [row.value for row in json_lines(stream, "probe", folder, Problems())]
        line = {"probe": name, "ours": verdict(rows, lambda ours=ours: ours)}
        if has_theirs:
            line["theirs"] = verdict(rows, lambda file=file: [dict(row) for row in theirs(file, "json", folder / "cache")])
        table.append(line)
    return table


def cpu(call: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    seconds, result = [], None
    for _ in range(repeats):
        began = time.process_time()
        result = call()
        seconds.append(time.process_time() - began)
    return round(statistics.median(seconds), 3), result


def timed(folder: Path, rows: int, repeats: int, has_theirs: bool) -> list[dict[str, Any]]:
    lines = folder / "rows.jsonl"
    with lines.open("w") as stream:
        for i in range(rows):
            messages = [
                {"role": "user", "content": f"tell about the red ball {i} " * 8},
                {"role": "assistant", "content": "it grows " * 30},
            ]
            stream.write(json.dumps({"messages": messages, "id": f"r{i}"}) + "\n")
    table = folder / "rows.parquet"
    few, noise = max(200, rows // 10), random.Random(0)
    pictures = [noise.randbytes(2000) for _ in range(few)]
    content = {"prompt": [f"tell {i}" for i in range(few)], "completion": ["it grows"] * few, "picture": pictures}
    pyarrow.parquet.write_table(pyarrow.table(content), table, row_group_size=100)
    found = []
    for file, kind, count in ((lines, "json", rows), (table, "parquet", few)):
        picks = [random.Random(k).randrange(count * 9 // 10) for k in range(1000)]
        limit, _ = cpu(lambda kind=kind: parsed(lines) if kind == "json" else pyarrow.parquet.read_table(table), repeats)
        opened, source = cpu(lambda file=file: open_source(str(file)), repeats)
        read, _ = cpu(lambda source=source, picks=picks: [source[k] for k in picks], repeats)
        line: dict[str, Any] = {
            "file": file.name, "rows": count, "mb": round(file.stat().st_size / 1e6, 1), "limit": limit,
            "ours_open": opened, "ours_1000": read,
        }  # fmt: skip
        if has_theirs:
            line["theirs_open"], data = cpu(lambda file=file, kind=kind: theirs(file, kind, folder / "cache"), repeats)
            line["theirs_1000"], _ = cpu(lambda data=data, picks=picks: [data[k] for k in picks], repeats)
            line["their_copy_mb"] = round(sum(f.stat().st_size for f in (folder / "cache").rglob("*.arrow")) / 1e6, 1)
        found.append(line)
    return found


def parsed(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(len(json.loads(line)) for line in stream)


def show(rows: list[dict[str, Any]]) -> None:
    heads = list(dict.fromkeys(key for row in rows for key in row))
    print("  ".join(f"{head:>{32 if head == 'probe' else 14}}" for head in heads))
    for row in rows:
        print("  ".join(f"{row.get(head, '')!s:>{32 if head == 'probe' else 14}}" for head in heads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.repeats = 2_000, 1
    has_theirs = importlib.util.find_spec("datasets") is not None
    with tempfile.TemporaryDirectory() as scratch:
        probes = probed(Path(scratch), has_theirs)
        times = timed(Path(scratch), arguments.rows, arguments.repeats, has_theirs)
    show(probes)
    show(times)
    report = {"name": "data_reading", "repeats": arguments.repeats, "probes": probes, "times": times, "versions": versions()}
    if has_theirs:
        import datasets

        report["versions"]["datasets"] = datasets.__version__
    print(json.dumps(report))


if __name__ == "__main__":
    main()
