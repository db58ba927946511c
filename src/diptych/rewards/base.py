"""Calling rewards so that none can lie: what fails or is not finite is *missing*, never 0 and never random.

A reward is called as `reward(prompts=..., completions=..., **columns)` with messages whose content is a list of text
and image blocks, or a string where the recipe says `content: text` (see `protocol.py`). It returns, for each sample, a float
or None (TRL), or a list with a float or None for each step of the document (ours). None means "says nothing about this";
NaN, infinity and exceptions mean "missing".

A recipe's `options` reach a class as the keywords with which it is made, once, and a function as keywords of every call.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import logging
import math
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diptych.config import RewardConfig
from diptych.document import Document
from diptych.overrides import kind_of, read_value
from diptych.rewards.protocol import Context, Notes, conversation, keywords
from diptych.runtime import run_async
from diptych.usercode import load_named

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

LARGEST = float(np.finfo(np.float32).max)

GIVEN = {"prompts", "completions", "completion_ids", "completion_documents", "trainer_state", "log_extra", "log_metric"}
GIVEN |= {"truncated", "answer_form"}
BUILT_IN = {
    "format": "diptych.rewards.format:format",
    "exact_match": "diptych.rewards.exact_match:exact_match",
    "image_text": "diptych.rewards.image_text:image_text",
    "text_critic": "diptych.rewards.text_critic:text_critic",
    "text_likelihood": "diptych.rewards.text_likelihood:TextLikelihood",
    "image_likelihood": "diptych.rewards.image_likelihood:ImageLikelihood",
    "next_picture": "diptych.rewards.next_picture:next_picture",
}  # run anywhere as they are
JUDGES = {
    "llm_text_critic": "diptych.rewards.judges:LLMTextCritic",
    "unified_reward": "diptych.rewards.judges:UnifiedReward",
    "document_judge": "diptych.rewards.judges:DocumentJudge",
}  # need a server, named in `options`
SCORERS = {
    "clip_score": "diptych.rewards.scorers:ClipScore",
    "pick_score": "diptych.rewards.scorers:PickScore",
    "hps": "diptych.rewards.scorers:HpsScore",
    "image_reward": "diptych.rewards.scorers:ImageReward",
    "image_coherence": "diptych.rewards.scorers:ImageCoherence",
}  # need a checkpoint, loaded into this process


class About(NamedTuple):
    """For people: what a reward judges, the values it can give, and what it needs."""

    judges: str
    values: str
    needs: str


_SERVER = "options base_url, model"
_CHECKPOINT = "a checkpoint: option model"
ABOUT = {
    "format": About(
        "structure: a text before each picture, as many pictures as asked, an end as asked",
        "0..1 a document",
        "column num_images",
    ),
    "exact_match": About("the answer in words against the right one", "0 or 1 a document", "column solution"),
    "image_text": About("each picture against the text just before it (Storyboard)", "0..1 a picture", "nothing: packaged"),
    "text_critic": About("each text, given the prompt and the texts before (Storyboard)", "0..1 a text", "nothing: packaged"),
    "text_likelihood": About(
        "each text, by how likely a frozen model finds it in an answer in words", "0..1 a text", "nothing: packaged; or option model"
    ),
    "image_likelihood": About(
        "each picture, by how likely a frozen model finds its codes after the picture before it and its text",
        "0..1 a picture",
        "codes as sampled; packaged, or option model",
    ),
    "next_picture": About(
        "each picture against its text and the picture before, by a trained critic (Storyboard)", "0..1 a picture", "nothing: packaged"
    ),
    "llm_text_critic": About("each text against the prompt (LLaVA-Critic's prompt)", "0..1 a text, from 0..100", _SERVER),
    "unified_reward": About("each picture against the text just before it (UnifiedReward's)", "0..1 a picture, from 1..5", _SERVER),
    "document_judge": About("the whole document with its pictures", "0..1 a step, from 0..10", _SERVER),
    "clip_score": About("each picture against the text before it (CLIP)", "2.5 * cosine a picture", _CHECKPOINT),
    "pick_score": About("each picture against the text before it (PickScore)", "raw / 26 a picture, about 0.7..0.9", _CHECKPOINT),
    "hps": About(
        "each picture against the text before it (HPSv2, HPSv2.1)",
        "cosine a picture, about 0.2..0.35",
        "a checkpoint: options model, version",
    ),
    "image_reward": About("each picture against the text before it (ImageReward)", "(raw + 2) / 4 a picture, most in 0..1", _CHECKPOINT),
    "image_coherence": About("each picture against the earlier ones: alike, but no copy", "cosine a picture, -1..1", _CHECKPOINT),
}


class RewardError(ValueError):
    """A reward that breaks its contract, or too many missing values."""


@dataclasses.dataclass(frozen=True)
class RewardBatch:
    """R rewards of B documents with up to J steps.

    steps: (R, B, J) float32, rescaled, NaN where missing. applies: (R, B, J) bool.
    documents: (R, B) float32 of rewards that speak of the whole document, NaN where missing; documents_apply: (R, B).
    missing: key of the recipe's entry -> share of the values it owed that are missing. errors: key -> the last error.
    asked: key -> the number of values that the share is of; also of documents that were exchanged for others.
    faults: "key/cause" -> missing values, of rewards that say why.
    metrics: "key/metric" -> what a function logged, a number for each time. extras: "key/column" -> B values.
    """

    steps: Tensor
    applies: Tensor
    documents: Tensor
    documents_apply: Tensor
    missing: dict[str, float]
    errors: dict[str, str]
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    extras: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    asked: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def owed(self) -> list[int]:
        """(R,) values that each reward owed."""
        return (self.applies.sum((1, 2)) + self.documents_apply.sum(1)).tolist()


def merge(batches: Sequence[RewardBatch]) -> RewardBatch:
    """The documents of several calls of the same rewards, one batch behind the other."""
    import torch

    if len(batches) == 1:
        return batches[0]
    longest = max(batch.steps.shape[-1] for batch in batches)

    def joined(name: str) -> Tensor:
        parts = [getattr(batch, name) for batch in batches]
        return torch.cat([torch.nn.functional.pad(p, (0, longest - p.shape[-1])) if p.ndim == 3 else p for p in parts], dim=1)

    missing, asked = {}, {}
    for r, name in enumerate(batches[0].missing):
        counts = [batch.asked.get(name, batch.owed[r]) for batch in batches]
        asked[name] = sum(counts)
        missing[name] = sum(batch.missing[name] * count for batch, count in zip(batches, counts, strict=True)) / max(1, asked[name])
    errors = {name: error for batch in batches for name, error in batch.errors.items()}
    faults: Counter[str] = sum((Counter(batch.faults) for batch in batches), Counter())
    metrics: dict[str, list[float]] = {}
    for batch in batches:
        for name, values in batch.metrics.items():
            metrics.setdefault(name, []).extend(values)
    columns = {name: None for batch in batches for name in batch.extras}
    extras = {name: [v for batch in batches for v in batch.extras.get(name) or [None] * batch.documents.shape[1]] for name in columns}
    return RewardBatch(
        joined("steps"), joined("applies"), joined("documents"), joined("documents_apply"),
        missing, errors, dict(faults), metrics, extras, asked,
    )  # fmt: skip


def load_reward(name: str) -> Callable[..., Any]:
    """A built-in reward or `package.module:function`. The working directory is importable.

    Raises ValueError saying what is known.
    """
    known = BUILT_IN | JUDGES | SCORERS
    path = known.get(name, name)
    if ":" not in path:
        raise ValueError(f"unknown reward {name!r}; give package.module:function or one of: {', '.join(known)}")
    return load_named(path, "reward")


_made: dict[tuple[Any, str], Callable[..., Any]] = {}


def option_kind(reward: Callable[..., Any], name: str) -> Any:
    """The type of a reward's option: that of its options class, its annotation, or its default value; Any where there is none."""
    if (options := getattr(reward, "options_class", None)) is not None:
        return kind_of(options, name)
    parameter = inspect.signature(reward).parameters.get(name)
    if parameter is None:
        return Any
    with contextlib.suppress(Exception):  # annotations of a user's own may name anything
        return typing.get_type_hints(reward.__init__ if inspect.isclass(reward) else reward)[name]
    return type(parameter.default) if isinstance(parameter.default, str | bool | int | float) else Any


def _fitted(reward: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Options with numbers read out of texts where the reward's own function asks for numbers: a command line gives 1.10 as it stands."""
    kinds = {name: option_kind(reward, name) for name, value in options.items() if isinstance(value, str)}
    numbers = {name for name, kind in kinds.items() if kind in (int, float, bool)}
    return {name: read_value(value, kinds[name], name) if name in numbers else value for name, value in options.items()}


def configured(config: RewardConfig, reward: Callable[..., Any]) -> Callable[..., Any]:
    """The reward with the options of its recipe. A class is made once for each set of options, and keeps its state.

    Raises ValueError for options that it does not take.
    """
    if not inspect.isclass(reward):
        if not config.options:
            return reward
        if (check := getattr(reward, "check_options", None)) is not None:
            check(**config.options)
        parameters = inspect.signature(reward).parameters
        unknown = [name for name in config.options if name not in parameters or parameters[name].kind is inspect.Parameter.VAR_KEYWORD]
        if unknown:
            raise ValueError(
                f"reward {config.key!r} takes no option {unknown[0]!r}; allowed are the parameters that it names: {', '.join(parameters)}"
            )
        return functools.partial(reward, **_fitted(reward, config.options))
    factory: Any = reward
    key = (reward, json.dumps(config.options, sort_keys=True, default=str))
    if key not in _made:
        try:
            _made[key] = factory(**(config.options if hasattr(reward, "options_class") else _fitted(reward, config.options)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward {config.key!r} cannot be made with options {sorted(config.options)}: {error}") from error
    return _made[key]


def changeable_options(rewards: Sequence[tuple[RewardConfig, Callable[..., Any]]]) -> set[str]:
    """Dotted keys of options that change no value, such as where a judge's server is: a run may be resumed with other ones."""
    return {
        f"rewards.{number}.options.{name}"
        for number, (_, reward) in enumerate(rewards)
        for name in getattr(getattr(reward, "options_class", None), "may_change", ())
    }


def check_columns(rewards: Sequence[tuple[RewardConfig, Callable[..., Any]]], columns: Sequence[str]) -> None:
    """Raises ValueError where a reward needs a column that no source has, and for columns whose names mean something else to it."""
    for config, reward in rewards:
        if taken := sorted(GIVEN & set(columns)):
            raise ValueError(
                f"the data set has a column {taken[0]!r}, which is what every reward is given under that name; rename the column"
            )
        if both := sorted(config.options.keys() & set(columns)):
            raise ValueError(f"reward {config.key!r} has an option {both[0]!r}, and the data set a column of that name; rename one of them")
        parameters = inspect.signature(configured(config, reward)).parameters.values()
        named = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        lacking = [p.name for p in named if p.name not in {*columns, *GIVEN}]
        if lacking:
            raise ValueError(
                f"reward {config.key!r} needs {', '.join(map(repr, lacking))}, and no source of prompts has such a column; they have "
                f"{', '.join(columns) or 'none'}. Add it to the data, or give the parameter a default"
            )


def about(config: RewardConfig, reward: Callable[..., Any]) -> str:
    """One line for people: what a reward judges and the values it gives, or its model with revision, range and rescaling."""
    made = configured(config, reward)
    if callable(describe := getattr(made, "about", None)):
        return describe()
    if config.name in ABOUT:
        return f"{config.name}: {ABOUT[config.name].judges}; value {ABOUT[config.name].values}; packaged"
    words = inspect.getdoc(reward) or "it does not say what it is"
    return f"{config.name}: {words.splitlines()[0]}"


def call_rewards(
    rewards: Sequence[tuple[RewardConfig, Callable[..., Any]]],
    prompts: Sequence[Document],
    completions: Sequence[Document],
    columns: dict[str, list[Any]],
    context: Context | None = None,
) -> RewardBatch:
    """Calls every reward once on the whole batch; `context` is what a training knows beside it.

    Raises RewardError where a reward returns the wrong number of values: that is a fault in its code, not bad luck; and
    ValueError for options that a reward does not take.
    """
    import torch

    seen = {
        content: {
            "prompts": [conversation("user", document, content) for document in prompts],
            "completions": [conversation("assistant", document, content) for document in completions],
        }
        for content in {config.content for config, _ in rewards}
    }
    sizes = [len(document) for document in completions]
    shape = (len(rewards), len(completions), max([1, *sizes]))
    steps, applies = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    documents, documents_apply = torch.zeros(shape[:2]), torch.zeros(shape[:2], dtype=torch.bool)
    missing, errors, asked = {}, {}, {}
    faults: dict[str, int] = {}
    metrics, extras = dict[str, list[float]](), dict[str, list[Any]]()
    for r, (config, function) in enumerate(rewards):
        function = configured(config, function)
        notes = Notes(len(completions))
        try:
            returned = function(**seen[config.content], **{**keywords(function, context, notes, completions), **columns})
            if inspect.isawaitable(returned):
                returned = run_async(_wait(returned))
            if inspect.isgenerator(returned):
                returned = list(returned)
        except (Exception, asyncio.CancelledError, SystemExit) as error:  # rewards are untrusted: counted, logged, masked out
            errors[config.key] = f"{type(error).__name__}: {error}"
            logger.warning("reward %s failed: %s", config.key, errors[config.key])
            returned = [_AllMissing()] * len(sizes)
        returned = _checked(config.key, returned, sizes)
        for b, value in enumerate(returned):
            if isinstance(value, _AllMissing):
                documents[r, b], documents_apply[r, b] = math.nan, True
                steps[r, b, : sizes[b]], applies[r, b, : sizes[b]] = math.nan, True
            elif isinstance(value, list):
                _fill(steps[r, b], applies[r, b], value, config)
            elif value is not None:
                documents_apply[r, b] = True
                documents[r, b] = _rescale(value, config)
        owed = int(applies[r].sum() + documents_apply[r].sum())
        lost = int((applies[r] & steps[r].isnan()).sum() + (documents_apply[r] & documents[r].isnan()).sum())
        missing[config.key], asked[config.key] = lost / max(1, owed), owed
        if hasattr(function, "take_faults"):
            causes, shown = function.take_faults()
            faults |= {f"{config.key}/{cause}": count for cause, count in causes.items()}
            if causes:
                errors.setdefault(config.key, shown)
        metrics |= {f"{config.key}/{name}": values for name, values in notes.metrics.items()}
        extras |= {f"{config.key}/{name}": values for name, values in notes.extras.items()}
    return RewardBatch(steps, applies, documents, documents_apply, missing, errors, faults, metrics, extras, asked)


class _AllMissing:
    """What a failed call owed is unknown, so the whole document and each of its steps count as missing."""


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def _checked(name: str, returned: Any, sizes: list[int]) -> list[Any]:
    if isinstance(returned, str | bytes | Mapping | Set):
        raise RewardError(f"reward {name!r} returned {type(returned).__name__}; a list with one entry per document is needed")
    try:
        values = [v.tolist() if hasattr(v, "tolist") else list(v) if isinstance(v, tuple) else v for v in returned]
    except TypeError:
        raise RewardError(f"reward {name!r} returned {type(returned).__name__}; a list with one entry per document is needed") from None
    if len(values) != len(sizes):
        raise RewardError(f"reward {name!r} returned {len(values)} values for {len(sizes)} documents; one per document is needed")
    for value, size in zip(values, sizes, strict=True):
        if isinstance(value, list) and len(value) != size:
            raise RewardError(f"reward {name!r} returned {len(value)} step values for a document of {size} steps")
    return values


def _rescale(value: Any, config: RewardConfig) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an integer may be larger than any float
        return math.nan
    rescaled = (number - config.shift) / config.scale
    return rescaled if abs(rescaled) <= LARGEST else math.nan  # False for NaN too


def _fill(steps: Tensor, applies: Tensor, values: list[Any], config: RewardConfig) -> None:
    for j, value in enumerate(values):
        if value is not None:
            applies[j] = True
            steps[j] = _rescale(value, config)
