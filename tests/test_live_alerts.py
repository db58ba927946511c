"""Alerts on metrics that were made for them: each where its numbers say so, and none on healthy ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from diptych.report.live.alerts import alerts, trend

SETTINGS: dict[str, Any] = {
    "rewards": [{"name": "format", "label": None, "weight": 1.0}, {"name": "taste", "label": "watcher", "weight": 0.0}],
    "parity_bound": 1e-3, "max_missing_rewards": 0.2, "score_guidance": "exact",
}  # fmt: skip


def curve(values: Any, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1, len(values) + 1) * every, np.asarray(values, dtype=float)


def healthy(seed: int, steps: int = 200) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A run that learns: its rewards rise and settle, entropy falls to a third, noise as a batch of documents has it."""
    draw = np.random.default_rng(seed)
    noise = lambda scale, count=steps: draw.normal(0, scale, count)  # noqa: E731
    progress = 1 - np.exp(-np.arange(steps) / (steps / 4))
    held_out = 1 - np.exp(-np.arange(steps // 10) / (steps / 40))
    return {
        "reward": curve(0.5 + 0.4 * progress + noise(0.03)), "rewards/watcher/mean": curve(0.4 + 0.1 * progress + noise(0.05)),
        "eval/rewards/format/mean": curve(0.5 + 0.3 * held_out + noise(0.01, steps // 10), 10),
        "eval/rewards/watcher/mean": curve(0.4 + noise(0.02, steps // 10), 10),
        "entropy/text": curve(0.6 - 0.4 * progress + noise(0.02)), "entropy/image": curve(1.5 - 0.8 * progress + noise(0.05)),
        "frac_reward_zero_std": curve(np.clip(0.1 + 0.2 * progress + noise(0.08), 0, 1)),
        "parity/text_max": curve(np.abs(noise(3e-5))), "parity/image_max": curve(np.abs(noise(5e-5))),
        "rewards/format/missing": curve(np.zeros(steps)),
    }  # fmt: skip


def kinds(curves: Any, settings: dict[str, Any] = SETTINGS, level: str | None = None) -> list[str]:
    return [alert.kind for alert in alerts(curves, settings) if level in (None, alert.level)]


@pytest.mark.parametrize("steps", [3, 12, 30, 200, 1500])
def test_healthy_runs_raise_nothing_at_any_length(steps):
    found = [(seed, alert.text) for seed in range(40) for alert in alerts(healthy(seed, steps), SETTINGS)]
    assert not found


def test_a_run_without_curves_raises_nothing():
    assert alerts({}, {}) == []
    assert alerts({"reward": curve([])}, SETTINGS) == []


@pytest.mark.parametrize("name", ["rewards/watcher/mean", "eval/rewards/watcher/mean", "eval/rewards/format/mean"])
@pytest.mark.parametrize("from_step", [0, 140])
def test_a_reward_that_rises_while_another_falls(name, from_step):
    curves = healthy(0)
    steps = curves[name][0]
    draw = np.random.default_rng(1)
    fall = np.clip((steps - from_step) / (200 - from_step), 0, 1)
    curves[name] = steps, 0.6 - 0.3 * fall + draw.normal(0, 0.02, len(steps))
    curves["reward"] = curve(0.5 + np.arange(200) / 500 + draw.normal(0, 0.03, 200))
    (alert,) = alerts(curves, SETTINGS)
    assert (alert.kind, alert.level, alert.metrics) == ("opposed", "alert", ("reward", name))
    assert "reward rose from 0." in alert.text
    assert f"{name} (" in alert.text
    assert "standard errors) over steps" in alert.text


def test_a_reward_that_trains_may_fall_while_the_sum_rises():
    curves = healthy(0) | {"rewards/format/mean": curve(np.linspace(0.9, 0.2, 200))}
    assert kinds(curves) == []


@pytest.mark.parametrize("reward", [0.0, -0.4, 0.02])
def test_a_fall_alone_is_no_contradiction(reward):
    draw = np.random.default_rng(0)
    curves = healthy(0) | {"reward": curve(0.5 + reward * np.linspace(0, 1, 200) + draw.normal(0, 0.03, 200)),
                           "rewards/watcher/mean": curve(np.linspace(0.9, 0.2, 200) + draw.normal(0, 0.02, 200))}  # fmt: skip
    assert kinds(curves) == []


@pytest.mark.parametrize("modality", ["text", "image"])
def test_entropy_that_is_gone(modality):
    gone = curve(np.concatenate([np.linspace(1.0, 0.05, 100), np.full(100, 0.05)]))
    (alert,) = alerts(healthy(0) | {f"entropy/{modality}": gone}, SETTINGS)
    assert (alert.kind, alert.level) == ("entropy", "note")  # the reward rose: the task may be learned
    assert f"entropy/{modality} was 0.981 nats per choice" in alert.text
    assert "is 0.05 in the last 5 (to step 200), 5% of it" in alert.text
    flat = curve(0.5 + np.random.default_rng(0).normal(0, 0.03, 200))
    assert kinds(healthy(0) | {f"entropy/{modality}": gone, "reward": flat}, level="alert") == ["entropy"]
    little = gone[0], gone[1] * 0.04  # of which there was hardly any
    assert kinds(healthy(0) | {f"entropy/{modality}": little}) == []
    above = curve(np.linspace(1.0, 0.12, 200))
    assert kinds(healthy(0) | {f"entropy/{modality}": above}) == []


def test_groups_without_spread():
    flat = {"frac_reward_zero_std": curve(np.concatenate([np.full(190, 0.2), np.full(10, 0.75)]))}
    (alert,) = alerts(healthy(0) | flat, SETTINGS)
    assert (alert.kind, alert.level) == ("flat_groups", "note")
    assert alert.text.startswith("In 75% of the groups of the last 10 logged steps (to step 200)")
    constant = {"reward": curve(np.zeros(200))}
    assert kinds(healthy(0) | flat | constant, level="alert") == ["flat_groups"]
    assert kinds(healthy(0) | {"frac_reward_zero_std": curve(np.full(200, 0.49))}) == []
    assert kinds(healthy(0) | {"frac_reward_zero_std": curve(np.full(9, 1.0))}) == []  # too early to say


def test_parity_near_its_bound():
    values = np.full(200, 1e-5)
    values[170] = 6e-4
    (alert,) = alerts(healthy(0) | {"parity/image_max": curve(values)}, SETTINGS)
    assert alert.kind == "parity"
    assert "parity/image_max reached 0.0006 at step 171, 60% of parity_bound (0.001)" in alert.text
    assert kinds(healthy(0) | {"parity/image_max": curve(values)}, SETTINGS | {"score_guidance": "ignore"}) == []
    values[[170, 100]] = 1e-5, 6e-4  # long ago
    assert kinds(healthy(0) | {"parity/image_max": curve(values)}) == []


def test_missing_rewards():
    values = np.zeros(200)
    values[-3:] = 0.05
    (alert,) = alerts(healthy(0) | {"rewards/watcher/missing": curve(values)}, SETTINGS)
    assert (alert.kind, alert.title) == ("missing", "Values of watcher are missing")
    assert alert.text.startswith("1.5% of the values in the last 10 logged steps (to step 200), 5.0% in the worst")
    once = np.zeros(200)
    once[-1] = 0.11  # more than half of what stops a run
    assert kinds(healthy(0) | {"rewards/format/missing": curve(once)}) == ["missing"]
    once[-1] = 0.02
    assert kinds(healthy(0) | {"rewards/format/missing": curve(once)}) == []


def test_a_trend_by_hand():
    steps, values = curve([0.0, 0.2, 0.0, 5.0, 5.2, 5.0, 10.0, 10.2, 10.0])
    found = trend((steps, values), 3)
    noise = np.sqrt((6 * 0.2**2 + 2 * 5.0**2) / 8 / 2)
    assert (found.before, found.now, found.begin, found.end) == (pytest.approx(0.2 / 3), pytest.approx(30.2 / 3), 1, 9)
    assert found.errors == pytest.approx(10 / (noise * np.sqrt(2 / 3)))
    assert trend((steps, values), 4) is None  # too few points
    assert trend(curve([0.0, 1.0] * 20), 3) is None  # no change beyond the noise of a point
    assert trend(curve([1.0] * 40), 3) is None
