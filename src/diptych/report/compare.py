"""Two evaluations side by side: the record for JSON, what it says in plain words, and the terminal's tables. The page: `compare_page`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.table import Table
from rich.text import Text

from diptych.evaluation.compare import NUM_FLIPS, ONE_SIDED, Comparison, Job
from diptych.evaluation.sheets import NUM_RESAMPLES
from diptych.statistics import SURE, holm, p_text

FEW_ITEMS, SPELLED_OUT = 20, 6
Record = dict[str, Any]


# --- the record ----------------------------------------------------------------------------------------------------------


def summary(found: Comparison) -> Record:
    """All numbers, p values after Holm's correction over headlines and over aspects, and what they say; ready for JSON."""
    headlines = _corrected({name: (dataclasses.asdict(figure), figure.p) for name, figure in found.headlines.items()})
    aspects = _corrected({name: (dataclasses.asdict(a), a.scored.p if a.scored else None) for name, a in found.aspects.items()})
    record: Record = {
        "benchmark": found.a.benchmark, "scale": list(found.scale), "a": _side(found.a), "b": _side(found.b),
        "pairs": len(found.keys), "items": len({id for id, _ in found.keys}), "only_a": len(found.only_a), "only_b": len(found.only_b),
        "headlines": headlines, "aspects": aspects,
        "categories": {c: {name: dataclasses.asdict(part) for name, part in parts.items()} for c, parts in found.categories.items()},
        "changed_settings": {name: list(values) for name, values in found.changed.items()},
        "problems": found.problems.by_cause(), "method": {"level": 0.95, "resamples": NUM_RESAMPLES, "flips": NUM_FLIPS},
    }  # fmt: skip
    return record | {"findings": findings(record), "notes": notes(record)}


def _corrected(found: dict[str, tuple[dict[str, Any], float | None]]) -> dict[str, dict[str, Any]]:
    p_values = holm([p for _, p in found.values()])
    return {name: {**record, "p_holm": p} for (name, (record, _)), p in zip(found.items(), p_values, strict=True)}


def _side(job: Job) -> dict[str, Any]:
    return {"folder": str(job.folder), "model": job.model, "answers": len(job.scores)}


# --- words ---------------------------------------------------------------------------------------------------------------


def findings(record: Record) -> list[str]:
    """Which is better in what, and where that cannot be told."""
    said: dict[str, list[str]] = {"a": [], "b": [], "": []}
    for name, aspect in record["aspects"].items():
        scored = aspect["scored"]
        if scored is not None:
            side = ahead(scored, aspect["p_holm"])
            brief = not side and len(record["aspects"]) > SPELLED_OUT  # the table has the numbers
            said[side].append(label(name) if brief else f"{label(name)} ({_told(scored, record)})")
    lines = [_headline_told(name, figure) for name, figure in record["headlines"].items()]
    lines += [f"{side.upper()} is better in {', '.join(said[side])}." for side in ("b", "a") if said[side]]
    if said[""]:
        lines.append(f"No difference can be told in {', '.join(said[''])}.")
    nothing = [label(name) for name, aspect in record["aspects"].items() if aspect["scored"] is None]
    if nothing:
        lines.append(f"Nothing can be said about {', '.join(nothing)}: no pair has both values.")
    return lines


def _headline_told(name: str, figure: dict[str, Any]) -> str:
    if figure["mean"] is None:
        sides = " and ".join(side.upper() for side in ("a", "b") if figure[side] is None)
        return f"{name} cannot be compared: {sides} has no such figure, because something that it is made of has no value."
    plain, signed = _numbers(figure["decimals"], signed=False), _numbers(figure["decimals"])
    none = "one item" if figure["units"] == 1 else "too few values for an interval"
    interval = none if figure["low"] is None else f"95 % interval {signed(figure['low'])} to {signed(figure['high'])}"
    better = ahead(figure, figure["p_holm"])
    verdict = f"{better.upper()} is better" if better else "no difference can be told"
    return f"{name}: A {plain(figure['a'])}, B {plain(figure['b'])}; {verdict} ({signed(figure['mean'])}, {interval})."


def notes(record: Record) -> list[str]:
    """What to know before believing the findings."""
    said = []
    for name, aspect in record["aspects"].items():
        if aspect["left_out"]:
            whole = aspect["lowest"]["pairs"]
            said.append(
                f"{label(name)}: {aspect['left_out']:,} of {whole:,} pairs are left out, because a value is missing in {_where(aspect)}."
            )
        scored, lowest = aspect["scored"], aspect["lowest"]
        if scored and aspect["left_out"] and _sign(scored) != _sign(lowest):
            said.append(
                f"{label(name)}: with missing values counted as {record['scale'][0]:g} the difference is {_told(lowest, record)}, "
                "so what is missing decides which looks better."
            )
        if scored and scored["items"] < FEW_ITEMS:
            said.append(f"{label(name)}: only {scored['items']} items, for which an interval is rough.")
    for side, other in (("a", "b"), ("b", "a")):
        if record[f"only_{side}"]:
            counts = f"{record[f'only_{side}']:,} of {record[side]['answers']:,} answers of {side.upper()}"
            said.append(f"{counts} are not compared: {other.upper()} has none to them.")
    changed = record["changed_settings"]
    if scorers := [name for name in changed if name.startswith("scoring.")]:
        said.append(f"The two were scored in different ways ({', '.join(scorers)}): a difference may be the scorer's and not the models'.")
    if data := [name for name in changed if name.startswith("data.") and name != "data.folder"]:
        said.append(f"The two read different data ({', '.join(data)}): an item may not be the same question on both sides.")
    others = [f"{cause}: {number:,}" for cause, number in record["problems"].items() if cause != ONE_SIDED]
    if others:
        said.append(f"Problems: {', '.join(others)}.")
    said.append(
        "Intervals and p values tell how much depends on which items were asked. They say nothing of another seed of training or sampling, "
        "nor of what the scorer gets wrong."
    )
    return said


def ahead(scored: dict[str, Any], p: float | None) -> str:
    """ "a", "b", or "" where that cannot be told."""
    return "" if p is None or p >= SURE else _sign(scored)


def _sign(difference: dict[str, Any]) -> str:
    return "b" if difference["mean"] > 0 else "a" if difference["mean"] < 0 else ""


def _told(difference: dict[str, Any], record: Record) -> str:
    show = number_format(record)
    if difference["low"] is None:
        return f"{show(difference['mean'])}, one item"
    return f"{show(difference['mean'])}, 95 % interval {show(difference['low'])} to {show(difference['high'])}"


def _where(aspect: dict[str, Any]) -> str:
    parts = []
    for side in ("a", "b"):
        causes = aspect[f"causes_{side}"]
        if causes:
            parts.append(f"{side.upper()} ({', '.join(f'{cause}: {number:,}' for cause, number in causes.items())})")
    return " and ".join(parts)


def number_format(record: Record, signed: bool = True) -> Any:
    return _numbers(3 if record["scale"][1] - record["scale"][0] <= 1 else 2, signed)


def _numbers(decimals: int, signed: bool = True) -> Callable[[float], str]:
    return lambda value: f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def label(name: str) -> str:
    return name.replace("_", " ")


# --- terminal ------------------------------------------------------------------------------------------------------------


def headline_table(record: Record) -> Table:
    found = Table(title=Text(f"{record['benchmark']}: the figures of its own table"))
    found.add_column("")
    for column in ("A", "B", "B − A", "95 % interval", "p", "B − A, missing\nas lowest"):
        found.add_column(column, justify="right", no_wrap=True)
    for name, figure in record["headlines"].items():
        found.add_row(Text(name), *headline_cells(figure))
    return found


def headline_cells(figure: dict[str, Any]) -> list[str]:
    plain, signed = _numbers(figure["decimals"], signed=False), _numbers(figure["decimals"])
    numbers = [show(figure[key]) if figure[key] is not None else "–" for key, show in (("a", plain), ("b", plain), ("mean", signed))]
    interval = "–" if figure["low"] is None else f"{signed(figure['low'])} to {signed(figure['high'])}"
    return [*numbers, interval, p_cell(figure), "–" if figure["lowest"] is None else signed(figure["lowest"])]


def rich_table(record: Record) -> Table:
    plain, signed = number_format(record, signed=False), number_format(record)
    found = Table(title=Text(f"{record['benchmark']}: {record['pairs']:,} answers that both have"))
    found.add_column("aspect")
    for column in ("A", "B", "B − A", "p", "A wins, ties,\nB wins", "pairs", "left\nout", "B − A, missing\nas lowest"):
        found.add_column(column, justify="right", no_wrap=True)
    for name, aspect in record["aspects"].items():
        scored, lowest = aspect["scored"], signed(aspect["lowest"]["mean"])
        if scored is None:
            found.add_row(Text(label(name)), *"–––––", "0", str(aspect["left_out"]), lowest)
            continue
        interval = "" if scored["low"] is None else f"\n{signed(scored['low'])} to {signed(scored['high'])}"
        wins = f"{scored['wins_a']}, {scored['ties']}, {scored['wins_b']}"
        found.add_row(
            Text(label(name)), plain(scored["mean_a"]), plain(scored["mean_b"]), signed(scored["mean"]) + interval, p_cell(aspect), wins,
            str(scored["pairs"]), str(aspect["left_out"]), lowest,
        )  # fmt: skip
    return found


def p_cell(aspect: dict[str, Any]) -> str:
    return "–" if aspect["p_holm"] is None else p_text(aspect["p_holm"])
