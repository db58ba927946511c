"""A suite: one question, asked by comparing variants of the demo's settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from diptych.ablation.measures import MEASURES
from diptych.config import Config, DemoConfig, build, load_config
from diptych.overrides import kind_of, parse_overrides, read_value
from diptych.rewards import load_reward
from diptych.rewards.base import configured
from diptych.userfiles import load_yaml, read_text

OWNED = {
    "output_dir": "--output-dir", "warmup.output_dir": "--output-dir", "grpo.output_dir": "--output-dir",
    "seed": "--seeds", "warmup.seed": "--seeds", "grpo.seed": "--seeds",
    "warmup.num_threads": "--jobs", "grpo.num_threads": "--jobs", "grpo.model": "warmup.model",
}  # fmt: skip
GROUPS = ("warmup", "grpo", "evaluate")


class Base(Config):
    """What all variants share: a recipe of `diptych demo` and changes of it, by dotted leaf."""

    recipe: str = "demo"
    changes: dict[str, Any] = Field({})


class Variant(Config):
    """One row of the table. `stage` says how far it goes: `base` trains nothing, `warmup` stops before GRPO."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    label: str
    stage: Literal["base", "warmup", "grpo"] = "grpo"
    changes: dict[str, Any] = Field({})


class Claim(Config):
    """An order that the paper reports: the variant `better` above the variant `worse`, by the suite's first measure or another."""

    better: str
    worse: str
    paper: str = Field(description="the paper's numbers, better against worse")
    measure: str | None = Field(None, description="what the order is about; None: the suite's first measure")
    step: int | None = Field(None, ge=1, description="one of the suite's `checkpoints`; None: the end of training")


class Suite(Config):
    """The first of `measures` is the primary one: the tests and the steps to reach are about it; the others have intervals only."""

    title: str
    question: str
    paper: str = Field(description="what the paper reports, with its numbers")
    base: Base = Base()
    seeds: int = Field(5, ge=1, description="seeds 0 to seeds - 1, unless --seeds says otherwise")
    checkpoints: tuple[int, ...] = Field((), description="GRPO steps that are evaluated; the last step always is")
    variants: tuple[Variant, ...] = Field(min_length=1)
    reference: str = Field(description="the variant that the others are compared with, seed by seed")
    measures: tuple[str, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = Field((), description="what the paper has us expect; answered by differences on the same seeds")
    overlays: tuple[tuple[str, ...], ...] = Field((), description="measures drawn into one chart, a chart for each variant")

    @model_validator(mode="after")
    def _check(self) -> Suite:
        names = [variant.name for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"two variants have the same name ({', '.join(names)})")
        if self.reference not in names:
            raise ValueError(f"reference {self.reference!r} is no variant; allowed are: {', '.join(names)}")
        for claim in self.claims:
            wrong = [name for name in (claim.better, claim.worse) if name not in names]
            if claim.step is not None and claim.step not in self.checkpoints:
                about = f"claim {claim.better!r} above {claim.worse!r} is about step {claim.step}"
                raise ValueError(f"{about}, none of its checkpoints {list(self.checkpoints)}")
            if wrong or claim.better == claim.worse:
                raise ValueError(f"claim {claim.better!r} above {claim.worse!r}: give two different ones of: {', '.join(names)}")
        named = (*self.measures, *(m for chart in self.overlays for m in chart), *(c.measure for c in self.claims if c.measure))
        unknown = sorted({m for m in named if m not in MEASURES})
        if unknown:
            raise ValueError(f"unknown measures {', '.join(unknown)}; allowed are: {', '.join(MEASURES)}")
        if any(step < 1 for step in self.checkpoints):
            raise ValueError(f"checkpoints are {list(self.checkpoints)}; steps count from 1 (the model before GRPO is always shown)")
        return self

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)


# --- reading -------------------------------------------------------------------------------------------------------------


def packaged_suites() -> dict[str, Path]:
    """Name -> file of the suites that ship with the package."""
    folder = Path(str(resources.files("diptych") / "recipes" / "ablations"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_suite(name: str, overrides: Sequence[str] = ()) -> tuple[str, Suite]:
    """A packaged suite by its name, or a .yaml file, with overrides of the base such as `["--grpo.max_steps", "10"]`.

    Returns its short name and the suite. Every variant's settings are built, so that nothing wrong is found after hours.
    Raises ValueError naming each wrong key with what is allowed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else packaged_suites().get(name)
    if path is None or not path.is_file():
        raise ValueError(f"no suite {name!r}; give a .yaml file or one of: {', '.join(packaged_suites())}")
    data = load_yaml(read_text(path), f"suite {name!r}")
    if not isinstance(data, dict):
        raise ValueError(f"suite {name!r} holds no mapping of settings")
    suite = build(Suite, data)
    if overrides:
        changes = {**suite.base.changes, **_typed_changes(overrides)}
        suite = suite.model_copy(update={"base": suite.base.model_copy(update={"changes": changes})})
    check_variants(suite)
    return path.stem, suite


def _typed_changes(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted key -> value, by the types of the demo's settings."""
    found = {}
    for key, text in parse_overrides(overrides):
        path = key.replace("-", "_")
        found[path] = read_value(text, kind_of(DemoConfig, path), f"--{key}")
    return found


def check_variants(suite: Suite) -> None:
    """Raises ValueError for a variant with wrong settings, with settings that cannot matter, or that equals another one."""
    seen: dict[str, str] = {}
    for variant in suite.variants:
        config = variant_config(suite, variant, 0)
        for reward in config.grpo.rewards:
            configured(reward, load_reward(reward.name))
        without_effect = [k for k in variant.changes if variant.stage != "grpo" and k.startswith("grpo.") and "sampling" not in k]
        if without_effect:
            raise ValueError(f"variant {variant.name!r} stops at {variant.stage}, so {', '.join(without_effect)} would have no effect")
        same = json.dumps([variant.stage, config.model_dump(mode="json")], sort_keys=True)
        if same in seen:
            raise ValueError(f"variants {seen[same]!r} and {variant.name!r} have the same settings: there is nothing to compare")
        seen[same] = variant.name


def variant_config(suite: Suite, variant: Variant, seed: int) -> DemoConfig:
    """The settings of one variant and seed: recipe, then base changes, then the variant's; one thread in both trainings.

    Raises ValueError naming the variant, each wrong key and what is allowed.
    """
    changes = {**suite.base.changes, **variant.changes}
    _refuse(variant.name, changes)
    try:
        config = load_config(DemoConfig, suite.base.recipe, {"control": None, **changes})  # variants are each other's controls
    except ValueError as error:
        raise ValueError(f"variant {variant.name!r}: {error}") from None
    stages = {"seed": seed, "num_threads": 1}  # one thread: numbers do not depend on how many workers share the machine
    return config.model_copy(
        update={
            "seed": seed,
            "warmup": config.warmup.model_copy(update=stages),
            "grpo": config.grpo.model_copy(update=stages),
        }
    )


def _refuse(name: str, changes: Mapping[str, Any]) -> None:
    for key in changes:
        if key in OWNED:
            raise ValueError(f"variant {name!r}: {key} is set by the grid; use {OWNED[key]}")
        if key.partition(".")[0] not in GROUPS or "." not in key:
            raise ValueError(f"variant {name!r}: {key}: not a setting of the demo; allowed are leaves such as {GROUPS[1]}.max_steps, "
                             f"in the groups {', '.join(GROUPS)}")  # fmt: skip


def evaluated_steps(suite: Suite, config: DemoConfig) -> tuple[int, ...]:
    """The suite's checkpoints that this training reaches, and its last step."""
    last = config.grpo.max_steps
    return (*sorted({step for step in suite.checkpoints if step < last}), last)
