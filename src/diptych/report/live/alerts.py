"""What in a run's metrics deserves a look, each by a rule that says its numbers (docs/how-to/watching.md has the rules)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from diptych.report.live.metrics import Curve

THIRD = 8  # points in each of the three parts of a trend, at least; of a held-out curve FEW
FEW = 3
STANDARD_ERRORS = 4.0  # by which a trend must stand out
ROSE = 2.0  # standard errors by which the reward rose, so that it may just be that the task is learned
STEADY = 5  # points whose median is taken
ENTROPY_LEFT = 0.1  # of what it was in the beginning
ENTROPY_FROM = 0.05  # nats per choice; below, there was little to lose
RECENT = 10  # points
FLAT_GROUPS = 0.5  # share of groups without spread
PARITY_SHARE, PARITY_RECENT = 0.5, 50  # of the bound; points
MISSING, MISSING_SHARE = 0.01, 0.5  # share of values; of what is allowed
NOTHING: Curve = (np.empty(0, np.int64), np.empty(0))


@dataclasses.dataclass(frozen=True)
class Alert:
    """`kind`: which rule. `metrics`: the curves it stands on. `text`: what happened, in numbers. `level`: alert, or note where the training
    reward rose meanwhile, so that it may just be that the task is learned."""

    kind: str
    title: str
    text: str
    metrics: tuple[str, ...]
    level: str = "alert"


def alerts(curves: Mapping[str, Curve], settings: Mapping[str, Any]) -> list[Alert]:
    """`settings`: the run's, as config.yaml has them."""
    rules = (_opposed, _entropy, _flat_groups, _parity, _missing)
    return [alert for rule in rules for alert in rule(curves, settings)]


@dataclasses.dataclass(frozen=True)
class Trend:
    """The first third of a stretch of a curve against its last third: their means, and their difference in standard errors."""

    before: float
    now: float
    errors: float
    begin: int
    end: int

    def __str__(self) -> str:
        return f"from {self.before:.3g} to {self.now:.3g} ({self.errors:+.1f} standard errors) over steps {self.begin} to {self.end}"


def trend(curve: Curve, fewest: int) -> Trend | None:
    """Of the whole curve, its last half, its last quarter and so on, the change that stands out most.

    None where a third has fewer than `fewest` points, or no change is larger than the noise of one point.
    """
    found: Trend | None = None
    length = len(curve[0])
    while length >= 3 * fewest:
        one, noise = _change(curve, length)
        if abs(one.now - one.before) > noise > 0 and (found is None or abs(one.errors) > abs(found.errors)):
            found = one
        length //= 2
    return found


def _change(curve: Curve, length: int) -> tuple[Trend, float]:
    """Over the last `length` points, at least 3; and the noise of one point: the root mean square of the differences of neighbours, by the
    root of 2 (von Neumann), so that a slope does not count as noise."""
    steps, values = (part[-length:] for part in curve)
    third = length // 3
    before, now = float(values[:third].mean()), float(values[-third:].mean())
    noise = float(np.sqrt((np.diff(values) ** 2).mean() / 2))
    errors = (now - before) / (noise * float(np.sqrt(2 / third))) if noise else 0.0
    return Trend(before, now, errors, int(steps[0]), int(steps[-1])), noise


def _level(curves: Mapping[str, Curve]) -> tuple[str, str]:
    """How bad it is that little is left to learn, and why."""
    reward = curves.get("reward", NOTHING)
    if len(reward[0]) < 3 * FEW:
        return "alert", ""
    change, _ = _change(reward, len(reward[0]))
    if change.errors >= ROSE:
        return "note", f"The training reward rose {change}: the run may have learned what it can from these prompts."
    return "alert", f"The training reward did not rise meanwhile: it went {change}."


def _opposed(curves: Mapping[str, Curve], settings: Mapping[str, Any]) -> Iterator[Alert]:
    """The training reward rises while one that watches, or that is asked of held-out prompts, falls."""
    rises = trend(curves["reward"], THIRD) if "reward" in curves else None
    if rises is None or rises.errors < STANDARD_ERRORS:
        return
    for reward in settings.get("rewards", ()):
        key = reward.get("label") or reward["name"]
        watched = [(f"eval/rewards/{key}/mean", FEW)] + ([] if reward["weight"] else [(f"rewards/{key}/mean", THIRD)])
        for name, fewest in watched:
            falls = trend(curves[name], fewest) if name in curves else None
            if falls is not None and falls.errors <= -STANDARD_ERRORS:
                what = "held-out prompts" if name.startswith("eval/") else "a reward that watches"
                yield Alert(
                    "opposed", "The training reward rises while another falls",
                    f"reward rose {rises}; {name} ({what}) fell {falls}. The policy may be learning the reward and not the task.",
                    ("reward", name),
                )  # fmt: skip


def _entropy(curves: Mapping[str, Curve], _: Mapping[str, Any]) -> Iterator[Alert]:
    level, why = _level(curves)
    for modality in ("text", "image"):
        steps, values = curves.get(f"entropy/{modality}", NOTHING)
        if len(values) < 3 * STEADY:
            continue
        first, now = float(np.median(values[:STEADY])), float(np.median(values[-STEADY:]))
        if first >= ENTROPY_FROM and now < ENTROPY_LEFT * first:
            yield Alert(
                "entropy", f"Little entropy is left in {modality} choices",
                f"entropy/{modality} was {first:.3g} nats per choice in the first {STEADY} logged steps and is {now:.3g} in the last "
                f"{STEADY} (to step {steps[-1]}), {now / first:.0%} of it: the documents of a group become the same. {why}",
                (f"entropy/{modality}",), level,
            )  # fmt: skip


def _flat_groups(curves: Mapping[str, Curve], _: Mapping[str, Any]) -> Iterator[Alert]:
    level, why = _level(curves)
    steps, values = curves.get("frac_reward_zero_std", NOTHING)
    if len(values) >= RECENT and (share := float(values[-RECENT:].mean())) >= FLAT_GROUPS:
        yield Alert(
            "flat_groups", "Most groups have no spread",
            f"In {share:.0%} of the groups of the last {RECENT} logged steps (to step {steps[-1]}) every reward gave all members the same: "
            f"nothing is learned from them. {why} Harder prompts, a finer reward, a higher temperature or resample_attempts change that.",
            ("frac_reward_zero_std",), level,
        )  # fmt: skip


def _parity(curves: Mapping[str, Curve], settings: Mapping[str, Any]) -> Iterator[Alert]:
    bound = settings.get("parity_bound")
    if bound is None or settings.get("score_guidance", "exact") != "exact":
        return
    for modality in ("text", "image"):
        name = f"parity/{modality}_max"
        steps, values = curves.get(name, NOTHING)
        if len(values) and (worst := float(values[-PARITY_RECENT:].max())) >= PARITY_SHARE * bound:
            at = int(steps[-PARITY_RECENT:][values[-PARITY_RECENT:].argmax()])
            yield Alert(
                "parity", f"Sampled and replayed {modality} log-probabilities come apart",
                f"{name} reached {worst:.3g} at step {at}, {worst / bound:.0%} of parity_bound ({bound:g}), at which the run stops.",
                (name,),
            )  # fmt: skip


def _missing(curves: Mapping[str, Curve], settings: Mapping[str, Any]) -> Iterator[Alert]:
    allowed = float(settings.get("max_missing_rewards", 1.0))
    for name, (steps, values) in curves.items():
        if not name.startswith("rewards/") or not name.endswith("/missing") or not len(values):
            continue
        recent = values[-RECENT:]
        mean, worst = float(recent.mean()), float(recent.max())
        if mean >= MISSING or worst >= MISSING_SHARE * allowed > 0:
            yield Alert(
                "missing", f"Values of {name.removeprefix('rewards/').removesuffix('/missing')} are missing",
                f"{mean:.1%} of the values in the last {len(recent)} logged steps (to step {steps[-1]}), {worst:.1%} in the worst; a run "
                f"stops beyond {allowed:.0%} of a reward that trains (max_missing_rewards).",
                (name,),
            )  # fmt: skip
