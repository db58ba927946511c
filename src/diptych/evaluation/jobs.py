"""One evaluation in one folder: answers, what is submitted, a score sheet, a table. Killed at any moment, it resumes.

config.yaml      the settings; another setting in the same folder is refused
answers/         `answers.py`
problems.json    what was left out or could not be asked, with its place
submission/      what the official scorer reads
scoring.json     what it is scored with
scores.jsonl     one line an answer
result.json      the benchmark's table, each aspect with intervals, counts
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from diptych.config import Config, SamplingParams, build
from diptych.data.problems import Problem, Problems
from diptych.document import Document
from diptych.evaluation.answers import Answer, Task, Template, answer, discard, plan, read_batch, report_unanswered, write_batch
from diptych.evaluation.benchmark import Benchmark, Item, Score, Scoring
from diptych.evaluation.fingerprint import differing_data, of_items
from diptych.evaluation.judging import KEPT
from diptych.evaluation.sheets import count, read_scores, summarise, write_scores
from diptych.forms import AnswerForm
from diptych.models import UnifiedModel
from diptych.models.fingerprint import differing_model, digest, of_model
from diptych.rewards.judges.options import JudgeOptions
from diptych.runs import atomic_folder, atomic_text
from diptych.runtime import versions

OpenModel = Callable[[], tuple[UnifiedModel, SamplingParams]]
PATIENCE = set(JudgeOptions.model_fields) - {"model", "revision", "max_tokens", "extra_body"}  # may change between two runs of one job


class Settings(Config):
    """What two runs of one job have in common. None: the model family's own; of `form`, the benchmark's."""

    benchmark: str
    model: str
    batch_size: int = Field(16, ge=1)
    seed: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0)
    guidance: float | None = Field(None, ge=0)
    form: AnswerForm | None = None
    max_images: int | None = Field(None, ge=0)
    max_text_tokens: int | None = Field(None, ge=1)
    prefix: str = ""
    suffix: str = ""
    image_size: int | None = Field(None, ge=1)
    limit: int | None = Field(None, ge=1)
    ids: tuple[str, ...] | None = None
    image_decoder: str | None = None
    dtype: str = "auto"
    load_in_4bit: bool = False


@dataclasses.dataclass(frozen=True)
class Job:
    """`shard`: (I, N) answers the batches whose number is I modulo N; None: all."""

    benchmark: Benchmark
    data: Path
    out: Path
    settings: Settings
    shard: tuple[int, int] | None = None
    official: Path | None = None
    judge: dict[str, Any] | None = None
    strict: bool = False
    say: Callable[[str], None] = print
    progress: Callable[[int, int], None] = lambda done, total: None

    def run(self, open_model: OpenModel) -> dict[str, Any] | None:
        """Does what is not done yet. The result, or None where it is not scored: other shards are missing, or nothing to score with.

        `open_model`: the model and how to sample from it; called only where answers are missing.
        Raises ValueError for settings that are not those of the folder.
        """
        self._check()
        problems = Problems(self.strict)
        everything = self.benchmark.read(self.data, problems)
        items = select(everything, self.settings.limit, self.settings.ids)
        if not items:
            raise ValueError(f"{self.data} holds nothing that can be asked; left out: {problems.by_cause()}")
        known = self._known(everything)
        self._refuse_changes(known)
        batches = plan(items, self.settings.batch_size)
        with self._at_work():
            self._generate(batches, known, open_model)
        folder = self.out / "answers"
        found = [read_batch(folder, number, batch) for number, batch in enumerate(batches)]
        waiting = found.count(None)
        if waiting:
            self.say(f"{len(batches) - waiting} of {len(batches)} batches are answered; the shard that ends last does the rest")
            return None
        with _lock(self.out / ".lock-finish", fcntl.LOCK_EX):
            return self._finish(len(everything), items, [a for batch in found if batch for a in batch], problems)

    # --- settings ---
    def _check(self) -> None:
        if self.shard is not None and not 0 <= self.shard[0] < self.shard[1]:
            raise ValueError(f"shard is {self.shard[0]}/{self.shard[1]}; allowed are 0/N to N-1/N")
        for given, name in ((self.official, "official"), (self.judge, "judge")):
            if given is not None and name not in self.benchmark.scored_by:
                ways = " or ".join(f"--{way}" for way in self.benchmark.scored_by) or "the answers alone"
                raise ValueError(f"--{name} has no effect: {self.benchmark.name} is scored by {ways}; leave it out")
        if self.official is not None and self.judge is not None:
            raise ValueError("--official and --judge are both given; give one")
        if self.official is not None and not self.official.is_file():
            raise ValueError(f"--official {str(self.official)!r} is no file; give what the official scorer wrote")
        if self.judge is not None:
            build(JudgeOptions, self.judge)
        cap, size = self.benchmark.max_side, self.settings.image_size
        if cap is not None and size is not None and size > cap:
            raise ValueError(f"image_size is {size}; {self.benchmark.name}'s judge loses text to larger pictures, so {cap} is the most")

    @property
    def form(self) -> AnswerForm:
        """That of the settings; of an evaluation that is resumed, its own; the benchmark's."""
        if self.settings.form is not None or not (self.out / "config.yaml").is_file():
            return self.settings.form or self.benchmark.form
        return AnswerForm(self._stored()["form"])

    def _known(self, everything: Sequence[Item]) -> dict[str, Any]:
        """What must be the same in the folder, apart from the sampling that a model's release stands behind."""
        settings = {**self.settings.model_dump(mode="json"), "form": self.form.value}
        if settings["ids"] is not None:
            settings["ids"] = digest(json.dumps(sorted(set(settings["ids"]))))
        data = {"folder": self.data.resolve().name, **of_items(everything)}
        return {**settings, "fingerprint": self._fingerprint(fetch=False), "data": data}

    def _fingerprint(self, fetch: bool) -> dict[str, Any] | None:
        try:
            return of_model(self.settings.model, fetch)
        except ValueError:  # whoever opens the model says what is wrong with it
            return None

    def _stored(self) -> dict[str, Any]:
        """What config.yaml says. Raises ValueError where somebody damaged it."""
        file = self.out / "config.yaml"
        try:
            stored = yaml.safe_load(file.read_text()) or {}
        except (OSError, ValueError, yaml.YAMLError):
            stored = None
        if not isinstance(stored, dict):
            raise ValueError(f"{file} is damaged; choose another --out, or delete the folder to start over")
        free = AnswerForm.FREE.value  # of folders from before there were forms
        sampling = stored.get("sampling")
        return {"form": free, **stored, **({"sampling": {"form": free, **sampling}} if isinstance(sampling, dict) else {})}

    def _refuse_changes(self, known: dict[str, Any]) -> None:
        file = self.out / "config.yaml"
        if not file.is_file():
            return
        stored = self._stored()
        plain = known.keys() - {"model", "fingerprint", "data"}
        changed = [found for found in (differing_model(stored, known), differing_data(stored, known)) if found]
        changed += sorted(key for key in plain if stored.get(key) != known[key])
        if self.shard is not None and stored.get("shards") != self.shard[1]:
            changed.append("shard")
        if changed:
            raise ValueError(
                f"{self.out} holds an evaluation with other settings (different: {'; '.join(changed)}). Choose another --out, or delete "
                "the folder to start over."
            )

    # --- answers ---
    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        self.out.mkdir(parents=True, exist_ok=True)
        busy = f"another process is answering into {self.out}; wait for it, or choose another --out"
        whole = fcntl.LOCK_EX if self.shard is None else fcntl.LOCK_SH
        own = self.out / f".lock-{self.shard[0] if self.shard else 0}"
        with _lock(self.out / ".lock", whole | fcntl.LOCK_NB, busy), _lock(own, fcntl.LOCK_EX | fcntl.LOCK_NB, busy):
            yield

    def _generate(self, batches: Sequence[Sequence[Task]], known: dict[str, Any], open_model: OpenModel) -> None:
        index, shards = self.shard or (0, 1)
        folder = self.out / "answers"
        mine = [(number, batch) for number, batch in enumerate(batches) if number % shards == index]
        todo = [(number, batch) for number, batch in mine if read_batch(folder, number, batch) is None]
        if not todo and (self.out / "config.yaml").is_file():
            return
        if known["fingerprint"] is None:  # of a hub id, of which nothing is fetched before it is needed
            known = {**known, "fingerprint": self._fingerprint(fetch=True)}
            self._refuse_changes(known)
        model, params = open_model()
        params = params.model_copy(update={"form": self.form})
        _refuse_copies([task.item for _, batch in todo for task in batch], params)
        drawn = model.image_spec.pixel_size
        side = self.settings.image_size
        if side is None and self.settings.image_decoder is None:  # a decoder of one's own has sizes of its own
            side = min(drawn, self.benchmark.max_side or drawn)
        self._settle({**known, "sampling": params.model_dump(mode="json"), "saved_side": side}, shards)
        template = Template(self.settings.prefix, self.settings.suffix)
        total = sum(len(batch) for _, batch in mine)
        done = total - sum(len(batch) for _, batch in todo)
        self.progress(done, total)
        for number, batch in todo:
            answers = answer(model, batch, params, self.settings.seed, template)
            report_unanswered(answers, Problems(self.strict))
            write_batch(folder, number, answers, template, side, self.benchmark.max_side)
            done += len(batch)
            self.progress(done, total)

    def _settle(self, settings: dict[str, Any], shards: int) -> None:
        file = self.out / "config.yaml"
        with _lock(self.out / ".lock-config", fcntl.LOCK_EX):  # two shards may have opened two models at the same time
            self._refuse_changes(settings)
            if not file.is_file():
                said = {**settings, "shards": shards, "versions": versions()}
                atomic_text(file, yaml.safe_dump(said, sort_keys=False, allow_unicode=True))

    # --- submission and scores ---
    def _finish(
        self, num_read: int, items: Sequence[tuple[int, Item]], answers: Sequence[Answer], problems: Problems
    ) -> dict[str, Any] | None:
        for leftover in self.out.glob(".tmp-*"):  # of a killed process
            discard(leftover)
        read = problems.by_cause()
        notes = {cause: read.pop(cause) for cause in self.benchmark.notes if cause in read}
        report_unanswered(answers, problems)
        if not (self.out / "result.json").is_file():  # else it also has what the official file lacked
            self._write(problems.found)
        documents: dict[int, list[Document]] = {index: [] for index, _ in items}
        for found in answers:
            if found.document is not None:
                documents[found.task.index].append(found.document)
        asked = [item for index, item in items if len(documents[index]) == item.num_answers]
        given = [documents[index] for index, item in items if len(documents[index]) == item.num_answers]
        stored = self._stored()  # the model's name as the first process was given it
        submission = self.out / "submission"
        if not submission.is_dir():
            with atomic_folder(submission) as folder:
                self.benchmark.submit(asked, given, folder, stored["model"])
        scored_with = self._scoring()
        if scored_with is None:
            return json.loads((self.out / "result.json").read_text())
        official = Problems(self.strict)
        scores = self._scores(items, asked, given, answers, scored_with, official)
        if scores is None:
            self.say(self.benchmark.how_to_score(self.data, submission))
            return None
        pictures = Counter(len(found.document.images) for found in answers if found.document is not None)
        result = {
            "benchmark": self.benchmark.name, "model": stored["model"], "model_hash": (stored.get("fingerprint") or {}).get("hash"),
            "scored_with": scored_with,
            "table": self.benchmark.table(scores),
            "aspects": summarise(scores, self.benchmark.aspects, self.benchmark.scale[0]),
            "counts": {
                "items_read": num_read, "items_left_out": read, **({"noted": notes} if notes else {}), "items": len(items), **count(scores),
                **({"official_file": official.by_cause()} if official.found else {}),
                "unanswered": dict(Counter(found.cause for found in answers if found.document is None)),
                "truncated": sum(found.truncated for found in answers), "fewer_images_allowed": sum(found.lowered for found in answers),
                "answers_by_images": {str(number): pictures[number] for number in sorted(pictures)},
            },
        }  # fmt: skip
        self._write([*problems.found, *official.found])
        if official.found:
            causes = ", ".join(f"{cause} {number}" for cause, number in official.by_cause().items())
            self.say(f"{causes}; the first is {official.found[0].where}, all are in {self.out / 'problems.json'}")
        write_scores(self.out / "scores.jsonl", scores)
        atomic_text(self.out / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        return result

    def _write(self, found: Sequence[Problem]) -> None:
        causes = Problems()
        causes.found = list(found)
        report = {"causes": causes.by_cause(), "problems": [problem.as_dict() for problem in found]}
        atomic_text(self.out / "problems.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    def _scoring(self) -> dict[str, Any] | None:
        """What to score with; None where it is done. Raises ValueError where the folder is scored with something else."""
        official = None if self.official is None else {"file": self.official.name, "hash": digest(self.official.read_bytes())}
        judge = None if self.judge is None else {name: value for name, value in self.judge.items() if name not in PATIENCE}
        wanted = {"official": official, "judge": judge}
        file, result = self.out / "scoring.json", self.out / "result.json"
        stored = json.loads(file.read_text()) if file.is_file() else None
        nothing_asked = self.official is None and self.judge is None
        if stored is not None and stored != wanted and not (nothing_asked and result.is_file()):
            changed = ", ".join(key for key in wanted if stored.get(key) != wanted[key])
            raise ValueError(
                f"{self.out} is scored with something else (different: {changed}). Give the same, or delete scoring.json, scores.jsonl, "
                "result.json and judging/ in it to score anew"
            )
        finished = result.is_file() and (self.out / "scores.jsonl").is_file()
        if finished and (judge is None or not count(read_scores(self.out / "scores.jsonl"))["missing"]):
            return None  # what a judge left missing is asked again
        return wanted

    def _scores(
        self, items: Sequence[tuple[int, Item]], asked: Sequence[Item], given: Sequence[Sequence[Document]], answers: Sequence[Answer],
        scored_with: dict[str, Any], official: Problems,
    ) -> list[Score] | None:  # fmt: skip
        """The sheet in the order of the items; what could not be asked is missing with its cause."""
        if self.judge is not None:
            atomic_text(self.out / "scoring.json", json.dumps(scored_with) + "\n")
        found = self.benchmark.score(asked, given, Scoring(self.out / "judging", self.official, self.judge, official))
        if found is None:
            return None
        if [(s.id, s.answer) for s in found] != [(item.id, number) for item in asked for number in range(item.num_answers)]:
            raise AssertionError(f"{self.benchmark.name} did not give one score for each answer, in order")
        atomic_text(self.out / "scoring.json", json.dumps(scored_with) + "\n")
        scores = {(s.id, s.answer): s for s in found}
        for one in answers:
            item = one.task.item
            if (item.id, one.task.number) not in scores:
                missing = dict.fromkeys(self.benchmark.owed(item))
                scores[item.id, one.task.number] = Score(
                    item.id, item.category, missing, one.task.number, one.cause or "another answer is missing"
                )
        return [scores[item.id, number] for _, item in items for number in range(item.num_answers)]


def nothing_scored(result: dict[str, Any], out: Path) -> str:
    """Why a result says nothing: no answer has any value, or no question to the judge was answered. Empty where it says something.

    The second case is one of its own, since an empty answer is scored without a question.
    """
    counts = result["counts"]
    kept = out / "judging" / KEPT
    unanswered = bool((result.get("scored_with") or {}).get("judge")) and not (kept.is_file() and kept.read_bytes().strip())
    scored = any(figures["all"]["scored"] for figures in result["aspects"].values())
    if not counts["missing"] or (scored and not unanswered):
        return ""
    causes = ", ".join(f"{cause}: {number:,}" for cause, number in counts["missing"].items())
    return f"{sum(counts['missing'].values()):,} of {counts['answers']:,} answers have missing values, {causes}"


def _refuse_copies(items: Sequence[Item], params: SamplingParams) -> None:
    """Raises ValueError where several answers to one item would all be the same."""
    most = max((item.num_answers for item in items), default=1)
    chosen = {AnswerForm.IMAGE: (params.image,), AnswerForm.TEXT: (params.text,)}.get(params.form, (params.text, params.image))
    if most > 1 and all(part.temperature == 0 or part.top_k == 1 for part in chosen):
        raise ValueError(
            f"{most} answers are asked for each item, but sampling is greedy: all {most} would be the same. Sample as the figures "
            "that you compare with were sampled, for instance --temperature 1"
        )


def select(items: Sequence[Item], limit: int | None, ids: Sequence[str] | None) -> list[tuple[int, Item]]:
    """Items with their index in the benchmark: all, the first `limit`, or those with the given ids, in the benchmark's order.

    Raises ValueError for ids that are not there, and for both ways at once.
    """
    numbered = list(enumerate(items))
    known = Counter(item.id for item in items)
    twice = [id for id, number in known.items() if number > 1]
    assert not twice, f"a reader gave two items the same id: {twice[:3]}"
    if limit is not None and ids is not None:
        raise ValueError("limit and ids are both given; give one")
    if ids is not None:
        unknown = [id for id in ids if id not in known]
        if unknown:
            raise ValueError(f"{len(unknown)} of {len(ids)} ids are not in the benchmark, such as {unknown[0]!r}")
        wanted = set(ids)
        return [(index, item) for index, item in numbered if item.id in wanted]
    return numbered[:limit]


@contextlib.contextmanager
def _lock(path: Path, kind: int, busy: str = "") -> Iterator[None]:
    """Held while inside; that of a killed process is free at once."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, kind)
        except BlockingIOError as error:
            raise ValueError(busy) from error
        yield
