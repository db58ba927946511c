"""Configuration: typed, frozen, unknown keys fail. A recipe is a YAML file; any leaf can be overridden by its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from diptych.forms import AnswerForm
from diptych.overrides import parse_overrides, set_leaf
from diptych.userfiles import dump_yaml, load_yaml, read_text

ConfigT = TypeVar("ConfigT", bound="Config")
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "aim", "clearml", "dvclive"]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextSampling(Config):
    """Temperature 0 takes the most likely token. No truncation in training: the whole distribution is the policy."""

    temperature: float = Field(1.0, ge=0, description="0: the likeliest choice")
    top_k: int = Field(0, ge=0, description="0: off")
    top_p: float = Field(1.0, gt=0, le=1, description="1: off")


class ImageSampling(TextSampling):
    """Guidance is classifier-free. 1 turns it off; the paper uses 3."""

    guidance_scale: float | None = Field(None, ge=0, description="None: the model family's own")
    image_guidance_scale: float | None = Field(None, ge=0, description="three-way guidance: the weight of what the pictures say")


class SamplingParams(Config):
    """How documents are sampled. Travels with every rollout, so that scoring can repeat it exactly."""

    text: TextSampling = Field(TextSampling(), description="how text tokens are drawn")
    image: ImageSampling = Field(ImageSampling(), description="how image codes are drawn")
    form: AnswerForm = Field(AnswerForm.FREE, description="what an answer holds, where its record and its source do not say")
    max_images: int = Field(4, ge=0, description="a free answer draws no more; its given beginning counts")
    max_text_tokens: int = Field(64, ge=1, description="per text segment; a longer one truncates the document")

    def greedy(self) -> SamplingParams:
        return self.model_copy(
            update={
                "text": self.text.model_copy(update={"temperature": 0.0}),
                "image": self.image.model_copy(update={"temperature": 0.0}),
            }
        )


class OptimConfig(Config):
    """AdamW. `adamw_8bit` keeps its moments in 8 bits, by blocks of 256 (bitsandbytes; arXiv:2110.02861)."""

    name: Literal["adamw", "adamw_8bit"] = Field("adamw", description="moments in float32, or in 8 bits (extra `gpu`)")
    lr: float = Field(gt=0, description="the highest learning rate")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises to `lr`")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rate behind the warm-up: as it is, or falling to 0 at `max_steps`"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, decoupled from the gradient")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is scaled down to this norm")


class LoraConfig(Config):
    """Low-rank adapters on the decoder layers (arXiv:2106.09685). No dropout: the policy that is scored is the one that samples."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="the product of the adapters is scaled by alpha / r")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="matrices of the decoder layers that are adapted",
    )
    train_in_full: tuple[str, ...] = Field((), description="parameters trained beside the adapters, by regular expression on their name")


class ParallelConfig(Config):
    """How a model is spread over the processes that torchrun starts (docs/how-to/scale.md).

    `replicate`: each holds all of it. `shard`: each holds a part of weights, gradients and moments, in float32, and computes in `dtype`.
    `auto`: shard where weights of 16 bits are trained themselves, with one process too; otherwise replicate.
    """

    mode: Literal["auto", "replicate", "shard"] = Field("auto", description="each process holds all of the model, or a part of it")
    shard_size: int | None = Field(None, ge=1, description="processes that hold one copy between them; None: those of one machine")

    def sharded(self, trains_half: bool) -> bool:
        return self.mode == "shard" or (self.mode == "auto" and trains_half)


class RunConfig(Config):
    """What every training has.

    may_change: settings that a run may be resumed with in another way, because what is trained does not depend on them (but for the last
    digits, and for `max_steps` under a schedule that falls).
    """

    may_change: ClassVar[frozenset[str]] = frozenset(
        {
            "output_dir", "device", "num_threads", "max_steps", "save_steps", "logging_steps", "sample_steps", "report_to",
            "tracker_project", "tracker_options", "gradient_checkpointing", "code_cache", "max_skipped_records", "parallel", "data_workers",
            "prefetch",
        }
    )  # fmt: skip

    model: str = Field("storyboard", description="packaged name, checkpoint or adapter folder, or hub id")
    output_dir: str = Field(description="the run's folder; a run that is there is resumed")
    seed: int = Field(0, description="of data order, dropout and sampling")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    num_threads: int | None = Field(None, ge=1, description="CPU threads; fixed for bitwise repeatable runs")
    max_steps: int = Field(ge=1, description="steps of the whole run")
    save_steps: int = Field(20, ge=1, description="a checkpoint every so many steps")
    logging_steps: int = Field(1, ge=1, description="metrics every so many steps")
    sample_steps: int = Field(10, ge=1, description="save sampled documents every so many steps")
    report_to: tuple[Tracker, ...] = Field((), description="trackers of metrics and documents, one or several (docs/how-to/watching.md)")
    tracker_project: str = Field("diptych", min_length=1, description="the trackers' project, or experiment")
    tracker_options: dict[Tracker, dict[str, Any]] = Field({}, description="of a tracker's own start, such as wandb.init's `entity`")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="that the model computes in; auto: the checkpoint's own")
    load_in_4bit: bool = Field(False, description="QLoRA: the language model in NF4; needs `lora`")
    lora: LoraConfig | None = Field(None, description="train adapters; None: train all but the image tokenizer")
    gradient_checkpointing: bool = Field(False, description="recompute decoder layers in the backward pass: less memory, more time")
    parallel: ParallelConfig = Field(ParallelConfig(), description="how the model is spread over processes")
    image_size: int | None = Field(None, ge=1, description="pixels a side of drawn pictures (Emu3); None: the family's own")
    image_decoder: str | None = Field(
        None, description="package.module:name that turns codes into pixels, instead of the family's decoder (docs/how-to/extending.md)"
    )
    code_cache: str | None = Field(None, description="folder for the codes of data sets' pictures; None: encoded at every use")

    data_workers: int | None = Field(
        None, ge=0, description="threads that read and prepare the next batches meanwhile; 0: none; None: 4 beside a GPU, none on a CPU"
    )
    prefetch: int = Field(2, ge=1, description="batches that they are ahead")
    max_skipped_records: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of a source's rows that may be left out because they cannot be used; more stop the run",
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _some_trackers(cls, value: Any) -> Any:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        return [] if names in (["none"], [""]) else list(dict.fromkeys(names)) if isinstance(names, list | tuple) else names

    @model_validator(mode="after")
    def _tracker_options_fit(self) -> RunConfig:
        given = {key.lower() for options in self.tracker_options.values() for key in options}
        if {"api_key", "password", "secret", "token", "write_token"} & given:
            raise ValueError("tracker_options hold a secret, and the configuration is saved: give it as the tracker's environment variable")
        if unused := [name for name in self.tracker_options if name not in self.report_to]:
            named = ", ".join(self.report_to) or "none"
            raise ValueError(f"tracker_options are given for {', '.join(unused)}, which report_to does not name ({named})")
        return self


class MixtureSource(Config):
    """One data set of a mixture: a file, folder or pattern of files (docs/how-to/data.md), or a built-in one (`storyboard:interleaved`)."""

    name: str = Field(description="file, folder, pattern, or name of a built-in source")
    weight: float = Field(1.0, gt=0, description="share of the records that are drawn, relative to the other sources")
    num_records: int | None = Field(None, ge=1, description="use only the first so many; None: all")
    form: AnswerForm | None = Field(None, description="of answers whose record names none (column `answer_form`)")


class WarmupConfig(RunConfig):
    """Supervised fine-tuning on a hybrid mixture (the paper's stage 1)."""

    may_change: ClassVar[frozenset[str]] = RunConfig.may_change | {"micro_batch_size", "eval_steps", "num_eval_records"}

    optim: OptimConfig = Field(description="optimizer and learning rate")
    sources: tuple[MixtureSource, ...] = Field(min_length=1, description="data sets that are mixed, record by record")
    batch_size: int = Field(16, ge=1, description="records of a step")
    micro_batch_size: int | None = Field(None, ge=1, description="None: the whole batch at once")
    text_weight: float = Field(1.0, ge=0, description="of the loss of texts")
    image_weight: float = Field(1.0, ge=0, description="of the loss of pictures")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of image-only answers trained without prompt")
    eval_steps: int = Field(10, ge=1, description="the loss on held-out records every so many steps")
    num_eval_records: int = Field(48, ge=1, description="how many held-out records")
    sampling: SamplingParams = Field(SamplingParams(), description="how the saved documents are sampled")

    @model_validator(mode="after")
    def _check(self) -> WarmupConfig:
        if self.text_weight == 0 and self.image_weight == 0:
            raise ValueError("text_weight and image_weight are both 0: nothing would be trained")
        return self


class RewardConfig(Config):
    """One reward. `name` is built in (`diptych rewards list`) or `package.module:function`."""

    name: str = Field(description="a built-in reward, or package.module:function")
    label: str = Field("", pattern=r"^[^/]*$", description="its name in metrics and documents; for one reward that is listed twice")
    weight: float = Field(1.0, description="0: watches; it is called and logged, and trains nothing")
    scale: float = Field(1.0, gt=0, description="the raw value is divided by this after `shift` is subtracted")
    shift: float = Field(0.0, description="subtracted from the raw value")
    modality: Literal["text", "image", "both"] = Field("both", description="which choices it trains")
    content: Literal["blocks", "text"] = Field(
        "blocks", description="what the function sees: text and image blocks, or one string (TRL's own functions)"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="of the reward itself, such as a judge's server and model")

    @property
    def key(self) -> str:
        """What it is called in metrics, errors and documents."""
        return self.label or self.name

    @model_validator(mode="after")
    def _no_keys(self) -> RewardConfig:
        """The configuration is saved with every run, so nothing secret may stand in it."""
        if {"api_key", "password", "secret", "token"} & {name.lower() for name in self.options}:
            raise ValueError("options hold a secret, and the configuration is saved: name an environment variable with api_key_env")
        return self


class ModalityConfig(Config):
    """What the objective does with the choices of one modality."""

    weight: float = Field(1.0, ge=0, description="of this modality's loss, its KL and entropy terms included")
    epsilon: float = Field(0.2, gt=0, description="clip range below 1")
    epsilon_high: float | None = Field(None, gt=0, description="clip range above 1; None: epsilon")
    beta: float = Field(0.0, ge=0, description="KL coefficient")
    entropy_coef: float = Field(0.0, description="weight of the entropy bonus")


class AdvantageConfig(Config):
    """`outcome`: one advantage per document. `process`: per step, collecting later steps (the paper).

    `discount` weighs the reward of a step that is j steps later by discount ** j (1: the paper).
    `normalize`: one mean and std for each step index (`step`), or one over all steps of the group (`group`, the paper),
    which showed no gain over `outcome` where `step` did (docs/results.md).
    """

    credit: Literal["outcome", "process", "mixed"] = Field("process", description="an advantage a document, a step, or a mixture of both")
    outcome_share: float = Field(0.5, ge=0, le=1, description="share of the outcome advantage under `mixed`")
    discount: float = Field(1.0, ge=0, le=1, description="what a later step is worth to the one before it")
    normalize: Literal["step", "group"] = Field("step", description="over which steps of a group mean and deviation are taken")
    scale_rewards: bool = Field(True, description="divide by the standard deviation")
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize", description="whether rewards are added before or after they are normalised"
    )


class PTXConfig(Config):
    """Supervised examples in every GRPO update, so that existing skills are retained. PPO-ptx, arXiv:2203.02155, Eq. 2."""

    sources: tuple[MixtureSource, ...] = Field(min_length=1, description="data sets that are mixed, record by record")
    coef: float = Field(gt=0, description="weight of the supervised loss beside the policy loss")
    batch_size: int = Field(16, ge=1, description="examples per update")
    text_weight: float = Field(1.0, ge=0, description="of the loss of texts")
    image_weight: float = Field(1.0, ge=0, description="of the loss of pictures")
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of image-only answers trained without prompt")


class GRPOConfig(RunConfig):
    """Unified group-relative policy optimisation (the paper's stage 2)."""

    may_change: ClassVar[frozenset[str]] = RunConfig.may_change | {
        "micro_batch_size", "rollout_batch_size", "background_rewards", "offload", "eval_steps", "num_eval_prompts", "max_missing_rewards",
        "parity_bound", "sample_groups",
    }  # fmt: skip

    optim: OptimConfig = Field(description="optimizer and learning rate")
    prompts: tuple[MixtureSource, ...] = Field(
        (MixtureSource(name="storyboard:prompts", weight=1.0),), min_length=1, description="one source, or a list of them"
    )
    rewards: tuple[RewardConfig, ...] = Field(min_length=1, description="what is rewarded; their weighted sum trains")
    num_generations: int = Field(8, ge=2, description="G, the rollouts of one prompt")
    prompts_per_step: int = Field(12, ge=1, description="groups of a rollout batch")
    num_iterations: int = Field(1, ge=1, description="passes over a rollout batch")
    num_minibatches: int = Field(1, ge=1, description="optimizer steps per pass")
    micro_batch_size: int = Field(48, ge=1, description="rollouts per forward pass; does not change the gradient")
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = Field(
        "grpo", description="the objective of a choice, and what its sum is divided by (docs/explanation/method.md)"
    )
    advantages: AdvantageConfig = Field(AdvantageConfig(), description="from rewards to the advantage of every choice")
    text: ModalityConfig = Field(ModalityConfig(), description="the objective of text tokens")
    image: ModalityConfig = Field(ModalityConfig(), description="the objective of image codes")
    ptx: PTXConfig | None = Field(None, description="supervised examples mixed in; None: the policy loss alone (the paper)")
    sampling: SamplingParams = Field(SamplingParams(), description="how rollouts are sampled")
    score_guidance: Literal["exact", "ignore"] = Field(
        "exact", description="`ignore` scores the unguided policy (the field's habit); its gap is logged"
    )
    rollout_batch_size: int | None = Field(None, ge=1, description="prompts sampled together; None: all of the step")
    background_rewards: bool | None = Field(
        None, description="rewards in a thread of their own, while the next batch is sampled or the scorer replays; None: on a GPU"
    )
    offload: tuple[Literal["reference", "optimizer"], ...] = Field(
        (), description="what waits in the host's memory while a GPU does not need it"
    )
    resample_attempts: int = Field(0, ge=0, description="sample groups without spread again, so many times")
    eval_steps: int | None = Field(
        None, ge=1, description="every so many steps, the rewards of greedy answers to held-out prompts; None: never"
    )
    num_eval_prompts: int = Field(48, ge=1, description="how many held-out prompts")
    sample_groups: int = Field(1, ge=1, description="groups of a step whose documents are saved, every `sample_steps`")
    max_missing_rewards: float = Field(0.2, ge=0, le=1, description="a larger share of missing rewards stops the run")
    parity_bound: float = Field(1e-3, gt=0, description="largest allowed |replayed - sampled| log-probability")

    @field_validator("prompts", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict | MixtureSource) else value

    @model_validator(mode="after")
    def _check(self) -> GRPOConfig:
        total = self.prompts_per_step * self.num_generations
        if total % self.num_minibatches:
            raise ValueError(
                f"num_minibatches={self.num_minibatches} does not divide the rollout batch of "
                f"prompts_per_step * num_generations = {total}; choose a divisor"
            )
        if self.sampling.text.temperature == 0 or self.sampling.image.temperature == 0:
            raise ValueError("temperature 0 is greedy: all rollouts of a group would be equal; use a temperature > 0")
        names = [reward.key for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(
                f"a reward is listed twice ({', '.join(names)}); give it one entry with a weight, or a label where its options differ"
            )
        if not any(reward.weight for reward in self.rewards):
            raise ValueError(f"all rewards have weight 0 ({', '.join(names)}): they would watch and nothing would be trained")
        if self.loss_type == "gspo" and self.num_iterations * self.num_minibatches == 1:
            raise ValueError("gspo with a single update per batch has ratio 1: use num_iterations or num_minibatches > 1")
        return self


class EvaluateConfig(Config):
    num_prompts: int = Field(240, ge=1, description="held-out prompts of documents")
    num_retention: int = Field(240, ge=1, description="turns of each skill that shall be retained")
    batch_size: int = Field(120, ge=1, description="prompts sampled together")
    split: Literal["validation", "test"] = Field("test", description="which held-out prompts")
    world: Literal["standard", "long", "large", "large_128"] = Field("standard", description="whose prompts (docs/explanation/worlds.md)")
    telling: Literal["full", "terse"] = Field("full", description="how much the texts of Storyboard's documents tell")
    seed: int = Field(1234, description="which prompts, and the numbers that sample")
    max_images: int = Field(4, ge=0, description="of one answer; lower it for models with a short context or large pictures")
    max_text_tokens: int = Field(64, ge=1, description="per text segment")

    @model_validator(mode="after")
    def _check_world(self) -> EvaluateConfig:
        if self.world != "standard" and self.telling == "full":
            raise ValueError(f"the world {self.world!r} tells only what happens; set telling: terse")
        return self


class ControlConfig(Config):
    label: str = Field(min_length=1, description="words for it behind `GRPO`, such as: without the visual reward")
    changes: dict[str, Any] = Field(min_length=1, description="changes of `grpo`, by dotted leaf")


class DemoConfig(Config):
    output_dir: str = Field("runs/demo", description="the folder of both trainings, their evaluations and the report")
    seed: int = Field(0, description="of both trainings")
    warmup: WarmupConfig = Field(description="stage 1")
    grpo: GRPOConfig = Field(description="stage 2")
    control: ControlConfig | None = Field(None, description="a second training of GRPO from the same warm-up, to compare the first with")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="the held-out prompts")

    @model_validator(mode="after")
    def _check_control(self) -> DemoConfig:
        if self.control is not None and self.controlled() == self.grpo:
            raise ValueError("control.changes change nothing: the two trainings would be the same")
        return self

    def controlled(self) -> GRPOConfig:
        """The settings of the control. Raises ValueError where it changes what is no setting of GRPO."""
        data = self.grpo.model_dump(mode="json")
        for key, value in (self.control.changes if self.control is not None else {}).items():
            set_leaf(data, GRPOConfig, key, value, written=False)
        return build(GRPOConfig, data)


def recipe_path(name: str | Path) -> Path:
    """A YAML file, or a recipe that ships with the package by its short name (`demo`)."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"recipe {str(path)!r} does not exist")
        return path
    packaged = Path(str(resources.files("diptych") / "recipes"))
    candidate = packaged / f"{name}.yaml"
    if not candidate.is_file():
        known = ", ".join(sorted(p.stem for p in packaged.glob("*.yaml")))
        raise ValueError(f"no recipe {str(name)!r}; give a .yaml file or one of: {known}")
    return candidate


def load_config(cls: type[ConfigT], recipe: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> ConfigT:
    """A recipe with overrides such as `["--optim.lr", "1e-4", "--seed=1"]` (text, read as `overrides.py` says), or a mapping of dotted keys
    to values.

    Raises ValueError naming each wrong key with what is allowed.
    """
    data: dict[str, Any] = {}
    if recipe is not None:
        loaded = load_yaml(read_text(recipe_path(recipe)), f"recipe {str(recipe)!r}")
        if not isinstance(loaded, dict):
            raise ValueError(f"recipe {str(recipe)!r} holds no mapping of settings")
        data = loaded
    written = not isinstance(overrides, Mapping)
    for key, value in overrides.items() if isinstance(overrides, Mapping) else parse_overrides(overrides):
        set_leaf(data, cls, key, value, written=written)
    return build(cls, data)


def build(cls: type[ConfigT], data: dict[str, Any]) -> ConfigT:
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_explain(cls, problem) for problem in error.errors()]
        raise ValueError(f"wrong configuration ({cls.__name__}):\n  " + "\n  ".join(lines)) from None


def _explain(cls: type[Config], problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"]) or "(top)"
    if "hold a secret" in problem["msg"]:
        return f"{path}: {problem['msg']}"  # without what was given
    if problem["type"] == "extra_forbidden":
        owner: Any = cls
        for part in problem["loc"][:-1]:
            if isinstance(part, int):  # an item of tuple[X, ...]
                owner = (get_args(owner) or (None,))[0]
                continue
            field = getattr(owner, "model_fields", {}).get(part)
            owner = field.annotation if field is not None else None
        allowed = ", ".join(getattr(owner, "model_fields", {})) or "see the documentation"
        return f"{path}: unknown key; allowed are: {allowed}"
    return f"{path}: {problem['msg']} (given: {problem.get('input')!r:.80})"


def to_yaml(config: Config) -> str:
    return dump_yaml(config.model_dump(mode="json"))
