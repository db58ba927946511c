"""A conversion as a job that can be killed at any moment: the same command resumes, and gives the same bytes as an uninterrupted run.

FOLDER/records.jsonl   FOLDER/images/ab/ab12....jpg   FOLDER/report.json

1. Everything is written to FOLDER.partial, which becomes FOLDER by one rename when all is done: FOLDER is never half-written.
2. Pictures are named by a hash of their bytes and appear by a rename, so one that is written twice is the same file.
3. At the start and every `CHECKPOINT_RECORDS` records the lengths of the files are noted. A resumed job cuts them there, and
   passes the records that were seen, which is quick: pictures are opened for new records only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import PIL.Image

from diptych.data.conversation import NotARecord, answer_places, refuse_surrogates
from diptych.data.convert.pictures import MissingPicture, encode, load
from diptych.data.convert.raw_record import Kind, Options, RawRecord
from diptych.data.exclude import Exclusion
from diptych.data.problems import Problem, Problems
from diptych.data.sampling import is_sampled
from diptych.runs import atomic_text, is_disk_full

CHECKPOINT_RECORDS = 100
Log = Callable[[str], None]


def run(
    name: str, kind: Kind, options: Options, out: Path, *, exclude: Sequence[Path] = (), strict: bool = False, log: Log = lambda _: None
) -> dict[str, Any]:
    """Converts a data set into the new folder `out`, or resumes a conversion that was stopped, and returns its report.

    Raises ValueError for input that is not of the kind, a folder that holds something else, a full disk and, under `strict`, the first
    problem. What was done until then is kept: the same command resumes.
    """
    if not options.input.exists():
        raise ValueError(f"input {str(options.input)!r} does not exist; give a file or folder of {kind.summary}")
    settings = _settings(name, options, exclude)
    if out.exists():
        report = _read_report(out)
        if report is None or report.get("settings") != settings:
            raise ValueError(f"--out {str(out)!r} exists and is not the result of this command; choose a new folder, or delete it")
        log(f"{out} is finished already")
        return report
    listed = Problems(strict)
    exclusion = Exclusion.load(exclude, listed)
    partial = out.with_name(f"{out.name}.partial")
    try:
        with _locked(partial), contextlib.ExitStack() as stack:
            job = stack.enter_context(contextlib.closing(_Job(partial, settings, exclusion, strict, log)))
            job.work(name, kind, options)
            report = {
                "kind": name, "settings": settings, "diptych": metadata.version("diptych"), "kept": job.kept, "images": job.num_images,
                "not_sampled": job.not_sampled, "skipped": job.problems.by_cause(), "exclusion_problems": listed.by_cause(),
                "excluded_ids": len(exclusion.ids), "excluded_picture_hashes": len(exclusion.pictures),
                "items": [problem.as_dict() for problem in (*listed.found, *job.problems.found)],
            }  # fmt: skip
            if not job.kept:
                raise ValueError(f"nothing of {options.input} was kept; skipped: {job.problems.by_cause()}. See {job.problem_file}")
            job.close()
        atomic_text(partial / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        for leftover in ("state.json", "problems.jsonl", "lock"):
            (partial / leftover).unlink(missing_ok=True)
        os.sync()
        partial.rename(out)
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            free = shutil.disk_usage(out.absolute().parent).free // 2**20
            raise ValueError(
                f"no space left while converting to {out} ({free} MiB free). Free some and run the same command again: it resumes."
            ) from error
        raise
    return report


class _Job:
    """The files of a conversion under way, and how far it is."""

    def __init__(self, folder: Path, settings: dict[str, Any], exclusion: Exclusion, strict: bool, log: Log) -> None:
        self.folder, self.settings, self.exclusion, self.log = folder, settings, exclusion, log
        self.problems = Problems(strict)
        self.seen = self.kept = self.num_images = self.not_sampled = self._written = 0
        self.done = False
        self.ids: dict[str, str] = {}  # of the records that were kept, and where they stood
        self.problem_file = folder / "problems.jsonl"
        self._restore()
        self.records = (folder / "records.jsonl").open("ab")
        self.listed = self.problem_file.open("ab")
        if not self.seen:
            self._checkpoint()  # so that the same command knows its own beginning, should the disk be full soon

    def close(self) -> None:
        self.records.close()
        self.listed.close()

    def work(self, name: str, kind: Kind, options: Options) -> None:
        if self.done:
            return
        to_pass, self.seen = self.seen, 0
        self.problems.muted = to_pass > 0
        skipped = {(problem.where, problem.id) for problem in self.problems.found}
        for record in kind.read(options, self.problems):
            if options.max_records is not None and self.kept >= options.max_records:
                break
            if self.seen >= to_pass:
                self._take(record, name, kind, options)
            elif (record.where, record.id) not in skipped and is_sampled(record.id, options.share, options.seed):
                self.ids[record.id] = record.where
            self.seen += 1
            self.problems.muted = self.seen < to_pass
            if self.seen % CHECKPOINT_RECORDS == 0 and self.seen > to_pass:
                self._checkpoint()
        self._checkpoint(done=True)

    def _take(self, record: RawRecord, name: str, kind: Kind, options: Options) -> None:
        def skip(cause: str, detail: object = "") -> None:
            self.problems.report(record.where, cause, detail, record.id)

        try:
            refuse_surrogates([record.id, record.columns, [[b for b in m.blocks if isinstance(b, str)] for m in record.messages]])
        except NotARecord as error:
            return skip(error.cause, error)
        if not is_sampled(record.id, options.share, options.seed):
            self.not_sampled += 1
            return
        if record.id in self.ids:
            return skip("duplicate id", f"{record.id} stood in {self.ids[record.id]}")
        number = sum(isinstance(block, tuple) for message in record.messages for block in message.blocks)
        if options.min_images is not None and number < options.min_images:
            return skip("too few pictures", f"{number}")
        if options.max_images is not None and number > options.max_images:
            return skip("too many pictures", f"{number}")
        opened: list[tuple[PIL.Image.Image, bytes | None, str | None]] = []
        for message in record.messages:
            for block in message.blocks:
                if isinstance(block, tuple):
                    try:
                        opened.append(load(block[0]))
                    except MissingPicture as error:
                        return skip("missing picture", error)
                    except ValueError as error:
                        return skip("unreadable picture", error)
        source = str(record.columns.get("source", name))
        reason = self.exclusion.reason(source, (record.id, *record.source_ids), (pixels for pixels, _, _ in opened))
        if reason is not None:
            return skip("excluded", reason)
        pictures = [encode(*picture, options.image_size) for picture in opened]
        names = [f"images/{digest[:2]}/{digest}{ending}" for digest, ending in ((_digest(raw), ending) for raw, ending in pictures)]
        line = record_line(record, names, name, record.license or options.license or kind.license)
        try:
            answer_places(line["messages"])
        except NotARecord as error:
            return skip(error.cause, error)
        for file, (raw, _) in zip(names, pictures, strict=True):
            self._write_picture(self.folder / file, raw)
        self.records.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.ids[record.id] = record.where
        self.kept += 1
        self.num_images += len(names)

    def _write_picture(self, path: Path, raw: bytes) -> None:
        if path.is_file() and path.stat().st_size == len(raw):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{path.name}")
        try:
            temporary.write_bytes(raw)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _checkpoint(self, done: bool = False) -> None:
        for problem in self.problems.found[self._written :]:
            self.listed.write(json.dumps(problem.as_dict(), ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
        self._written = len(self.problems.found)
        for stream in (self.records, self.listed):
            stream.flush()
            os.fsync(stream.fileno())
        state = {
            "settings": self.settings, "done": done, "seen": self.seen, "kept": self.kept, "num_images": self.num_images,
            "not_sampled": self.not_sampled, "records": self.records.tell(), "problems": self.listed.tell(),
        }  # fmt: skip
        atomic_text(self.folder / "state.json", json.dumps(state))

    def _restore(self) -> None:
        """Takes up what was done. What belongs to another command is removed, and said so."""
        try:
            state = json.loads((self.folder / "state.json").read_bytes())
        except (OSError, ValueError):
            state = {}
        if state.get("settings") != self.settings:
            if any(path.stat().st_size for path in self.folder.glob("*.json*")):
                self.log(f"{self.folder} holds the beginning of another conversion: starting over")
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            return
        for name, length in (("records.jsonl", state["records"]), ("problems.jsonl", state["problems"])):
            with (self.folder / name).open("ab") as stream:
                stream.truncate(length)
        for leftover in self.folder.glob("images/*/.tmp-*"):
            leftover.unlink()
        self.done = state["done"]
        self.seen, self.kept, self.num_images = state["seen"], state["kept"], state["num_images"]
        self.not_sampled = state["not_sampled"]
        self.problems.found = [Problem(**json.loads(line)) for line in self.problem_file.read_bytes().splitlines()]
        self._written = len(self.problems.found)
        self.log(f"going on behind {self.seen} items, {self.kept} of them kept")


def record_line(record: RawRecord, names: Sequence[str], source: str, license: str) -> dict[str, Any]:
    """The JSON line of a record; `names`: where its pictures stand, in order."""
    waiting = iter(names)
    messages = []
    for message in record.messages:
        content = [
            {"type": "image", "image": next(waiting)} if isinstance(block, tuple) else {"type": "text", "text": block}
            for block in message.blocks
        ]
        untrained = message.role == "assistant" and not message.loss
        said = {**({"loss": False} if untrained else {}), **({"prefix": True} if message.prefix else {})}
        messages.append({"role": message.role, **said, "content": content})
    return {"messages": messages, "source": source, **record.columns, "id": record.id, "license": license}


def _digest(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _settings(name: str, options: Options, exclude: Sequence[Path]) -> dict[str, Any]:
    """What must be the same for a conversion to go on: the options, and name, size and time of the input's files."""
    found = {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(options).items()}
    files = [options.input] if options.input.is_file() else sorted(p for p in options.input.iterdir() if p.is_file())
    stamps = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {"kind": name, **found, "exclude": [str(path) for path in exclude], "files": stamps}


def _read_report(out: Path) -> dict[str, Any] | None:
    try:
        return json.loads((out / "report.json").read_bytes())
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One job at a time; the lock of a killed process is free at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is converting into {folder}; wait for it, or choose another --out") from error
        yield
