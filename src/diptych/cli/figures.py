"""What an evaluation found, as a table to read; the files beside it have everything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from diptych.evaluation.storyboard import SHOWN_RATES, rate_cells

FIGURE = ("value", "ci", "scored", "missing", "missing_as_lowest")


def show_benchmark(console: Console, name: str, result: Mapping[str, Any]) -> None:
    """`result`: of a benchmark's job. Figures as rows, single values and counts below."""
    table = Table(title=name)
    table.add_column("")
    for head in ("value", "95 % interval", "scored", "missing", "missing as lowest"):
        table.add_column(head, justify="right")
    others: list[str] = []
    for path, value in _leaves(result["table"]):
        if isinstance(value, Mapping):
            more = ", ".join(f"{key} {_number(value[key])}" for key in value if key not in FIGURE)
            cells = (_number(value["value"]), _interval(value["ci"]), *(_number(value.get(key)) for key in FIGURE[2:]))
            table.add_row(f"{path} ({more})" if more else path, *cells)
        else:
            others.append(f"{path}: {_number(value)}")
    console.print(table)
    others += [f"{path}: {_number(value)}" for path, value in _leaves(result["counts"])]
    console.print("\n".join(others), soft_wrap=True)


def show_storyboard(console: Console, found: Mapping[str, Any], telling: str = "full") -> None:
    """Held-out documents, in per cent, greedy and sampled; and retained skills."""
    rates = SHOWN_RATES[telling]
    table = Table(title="held-out documents (per cent, 95 % interval)")
    for head in ("", *rates):
        table.add_column(head, justify="right" if head else "left")
    for mode in ("greedy", "sampled"):
        table.add_row(mode, *rate_cells(found[mode], rates))
    console.print(table)
    kinds = Table(title="greedy, by kind (per cent)")
    for head in ("", "prompts", *rates):
        kinds.add_column(head, justify="right" if head else "left")
    for kind, values in found["greedy_by_kind"].items():
        kinds.add_row(kind, str(values["prompts"]), *(f"{100 * values[r]:.1f}" for r in rates))
    console.print(kinds)
    for skill, value in found["retention"].items():
        low, high = value["accuracy_ci"]
        console.print(f"{skill.replace('_', ' ')}: {100 * value['accuracy']:.1f} % [{100 * low:.0f}, {100 * high:.0f}]")


def _leaves(found: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Figures and single values with the names on the way to them."""
    for key, value in found.items():
        name = f"{path} / {key}" if path else str(key)
        if isinstance(value, Mapping) and not {"value", "ci"} <= set(value):
            yield from _leaves(value, name)
        else:
            yield name.replace("_", " "), value


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def _interval(ends: Any) -> str:
    return "–" if ends is None else f"{_number(ends[0])} to {_number(ends[1])}"
