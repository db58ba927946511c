"""Configuration: every mistake is named with what is allowed, and recipes that ship with the package load."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import yaml

from diptych.config import (
    Config,
    DemoConfig,
    GRPOConfig,
    SamplingParams,
    WarmupConfig,
    build,
    load_config,
    recipe_path,
    to_yaml,
)
from diptych.overrides import parse_overrides

RECIPES = sorted(path for path in (resources.files("diptych") / "recipes").iterdir() if path.name.endswith(".yaml"))
CLASS_OF: dict[str, type[Config]] = {
    "demo": DemoConfig, "demo_full": DemoConfig, "warmup": WarmupConfig, "grpo": GRPOConfig, "paper_warmup": WarmupConfig,
    "paper_grpo": GRPOConfig, "terse_warmup": WarmupConfig, "large_warmup": WarmupConfig,
}  # fmt: skip

GRPO = """
output_dir: runs/x
max_steps: 3
optim: {lr: 1.0e-3, betas: [0.9, 0.99]}
rewards:
  - {name: format, weight: 1.0}
  - {name: text_critic, modality: text}
num_generations: 4
prompts_per_step: 6
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "grpo.yaml"
    path.write_text(GRPO)
    return path


def changed(**updates) -> dict:
    return {**yaml.safe_load(GRPO), **updates}


@pytest.mark.parametrize(("recipe", "before"), [("demo", "terse_"), ("demo_full", "")])
def test_the_stages_alone_are_those_of_the_demo(recipe, before):
    demo = load_config(DemoConfig, recipe)
    places = {"output_dir", "model"}
    for name, stage in (("warmup", demo.warmup), ("grpo", demo.grpo)):
        assert load_config(type(stage), f"{before}{name}").model_dump(exclude=places) == stage.model_dump(exclude=places)
    assert load_config(GRPOConfig, f"{before}grpo").model == f"runs/{before}warmup/checkpoints/step_{demo.warmup.max_steps}/model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards.2.weight": 1.0}, "change nothing"),
        ({"rewards.2.wieght": 0}, "wieght: unknown key"),
        ({"num_minibatches": 7}, "num_minibatches=7 does not divide"),
    ],
)
def test_a_control_is_another_training_with_right_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(DemoConfig, "demo", {"control.changes": changes})
    assert load_config(DemoConfig, "demo", {"control": None}).control is None


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"max_stepps": 3}, r"max_stepps: unknown key; allowed are: model, output_dir, seed, .*max_steps"),
        ({"optim": {"lr": 1, "learning_rate": 1}}, "optim.learning_rate: unknown key; allowed are: name, lr, warmup_steps, schedule"),
        ({"sampling": {"image": {"guidance": 3}}}, "sampling.image.guidance: unknown key; allowed are: temperature, .*guidance_scale"),
        ({"rewards": [{"name": "format", "wieght": 1}]}, "rewards.0.wieght: unknown key"),
    ],
)
def test_unknown_keys_are_named_with_what_is_allowed(updates, message):
    with pytest.raises(ValueError, match=r"(?s)wrong configuration \(GRPOConfig\):\n.*" + message):
        build(GRPOConfig, changed(**updates))


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"max_steps": "many"}, "max_steps: Input should be a valid integer.* \\(given: 'many'\\)"),
        ({"max_steps": 0}, "max_steps: Input should be greater than or equal to 1"),
        ({"optim": {}}, "optim.lr: Field required"),
        ({"optim": {"lr": -1}}, "optim.lr: Input should be greater than 0 \\(given: -1\\)"),
        ({"optim": {"lr": float("inf")}}, "optim.lr: Input should be a finite number"),
        ({"loss_type": "ppo"}, "loss_type: Input should be 'grpo', 'dapo', 'dr_grpo', 'gspo' or 'cispo' \\(given: 'ppo'\\)"),
        ({"advantages": {"credit": "token"}}, "advantages.credit: Input should be 'outcome', 'process' or 'mixed'"),
        ({"rewards": []}, "rewards: Tuple should have at least 1 item"),
        ({"num_generations": 1}, "num_generations: Input should be greater than or equal to 2"),
        ({"sampling": {"text": {"top_p": 0}}}, "sampling.text.top_p: Input should be greater than 0"),
        ({"sampling": {"image": {"temperature": -1}}}, "sampling.image.temperature: Input should be greater than or equal to 0"),
    ],
)
def test_wrong_values_are_named_with_what_is_allowed(updates, message):
    with pytest.raises(ValueError, match=message):
        build(GRPOConfig, changed(**updates))


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ValueError, match="unknown key") as caught:
        build(GRPOConfig, changed(stps=1, max_steps="many", optim={"lr": 0}))
    assert all(f"\n  {name}: " in str(caught.value) for name in ("stps", "max_steps", "optim.lr"))


def test_configurations_are_frozen():
    config = build(GRPOConfig, changed())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_overrides_reach_every_leaf(recipe):
    arguments = [
        "--optim.lr", "1e-4", "--seed=1", "--rewards.0.weight", "2", "--rewards.1.name=my.module:reward", "--sampling.image.top_p", "0.5",
        "--advantages.scale_rewards", "false", "--optim.betas=[0.8, 0.9]", "--num-generations", "2", "--text.epsilon-high", "null",
    ]  # fmt: skip
    config = load_config(GRPOConfig, recipe, arguments)
    assert config.optim.lr == 1e-4
    assert config.optim.betas == (0.8, 0.9)
    assert config.seed == 1
    assert [(r.name, r.weight, r.modality) for r in config.rewards] == [("format", 2.0, "both"), ("my.module:reward", 1.0, "text")]
    assert config.sampling.image.top_p == 0.5
    assert config.sampling.text.top_p == 1.0
    assert config.advantages.scale_rewards is False
    assert config.num_generations == 2
    assert config.text.epsilon_high is None
    assert config.max_steps == 3  # the recipe's
    assert load_config(GRPOConfig, recipe, ["--seed=1", "--seed", "2"]).seed == 2  # the last word counts


def test_overrides_are_checked_like_the_recipe(recipe):
    with pytest.raises(ValueError, match=r"optim\.lrr: unknown key; allowed are: name, lr"):
        load_config(GRPOConfig, recipe, ["--optim.lrr", "1"])
    with pytest.raises(ValueError, match="seed: Input should be a valid integer"):
        load_config(GRPOConfig, recipe, ["--seed", "one"])


def test_unreadable_overrides_are_refused():
    assert parse_overrides(["--a.b", "1", "--c=x=y", "--d", "-1"]) == [("a.b", "1"), ("c", "x=y"), ("d", "-1")]
    with pytest.raises(ValueError, match=r"cannot read 'seed=1'; overrides look like --optim\.lr 1e-4 or --seed=1"):
        parse_overrides(["seed=1"])
    with pytest.raises(ValueError, match="--seed needs a value"):
        parse_overrides(["--seed"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--rewards.7.weight=2", r"--rewards\.7\.weight: '7' is no index of a list of 2; allowed are 0 to 1"),
        ("--rewards.x.weight=2", r"'x' is no index of a list of 2"),
        ("--max_steps.x=1", r"--max_steps\.x: 'max_steps' is no group of settings"),
    ],
)
def test_overrides_of_what_does_not_exist_are_named(recipe, override, message):
    with pytest.raises(ValueError, match=message):
        load_config(GRPOConfig, recipe, [override])


def test_minibatches_must_divide_the_rollouts():
    # 6 prompts * 4 rollouts = 24
    for number in (1, 2, 8, 24):
        assert build(GRPOConfig, changed(num_minibatches=number)).num_minibatches == number
    for number in (5, 7, 48):
        with pytest.raises(ValueError, match=rf"num_minibatches={number} does not divide .* = 24; choose a divisor"):
            build(GRPOConfig, changed(num_minibatches=number))


@pytest.mark.parametrize("modality", ["text", "image"])
def test_greedy_rollouts_are_refused(modality):
    with pytest.raises(ValueError, match="temperature 0 is greedy"):
        build(GRPOConfig, changed(sampling={modality: {"temperature": 0}}))


def test_gspo_needs_more_than_one_update():
    with pytest.raises(ValueError, match="gspo with a single update per batch has ratio 1"):
        build(GRPOConfig, changed(loss_type="gspo"))
    assert build(GRPOConfig, changed(loss_type="gspo", num_minibatches=2)).loss_type == "gspo"
    assert build(GRPOConfig, changed(loss_type="gspo", num_iterations=2)).loss_type == "gspo"


def test_warmup_must_train_something():
    data = {"output_dir": "x", "max_steps": 1, "optim": {"lr": 1}, "sources": [{"name": "storyboard:interleaved", "weight": 1}]}
    with pytest.raises(ValueError, match="text_weight and image_weight are both 0"):
        build(WarmupConfig, {**data, "text_weight": 0, "image_weight": 0})
    assert build(WarmupConfig, {**data, "text_weight": 0}).image_weight == 1
    with pytest.raises(ValueError, match="sources: Tuple should have at least 1 item"):
        build(WarmupConfig, {**data, "sources": []})


def test_missing_and_empty_recipes_are_named(tmp_path):
    known = ", ".join(sorted(path.name.removesuffix(".yaml") for path in RECIPES))
    with pytest.raises(ValueError, match=f"no recipe 'dmeo'; give a .yaml file or one of: {known}"):
        load_config(DemoConfig, "dmeo")
    with pytest.raises(ValueError, match=r"recipe '.*absent.yaml' does not exist"):
        recipe_path(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="holds no mapping of settings"):
        load_config(DemoConfig, tmp_path / "list.yaml")


@pytest.mark.parametrize("name", [path.name.removesuffix(".yaml") for path in RECIPES])
def test_packaged_recipes_load_and_survive_yaml(name):
    config = load_config(CLASS_OF.get(name, GRPOConfig), name)
    assert build(CLASS_OF.get(name, GRPOConfig), yaml.safe_load(to_yaml(config))) == config
    given = yaml.safe_load(recipe_path(name).read_text())
    again = config.model_dump(mode="json")

    def assert_within(part, whole) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                assert_within(value, whole[key])
        elif isinstance(part, list):
            for value, other in zip(part, whole, strict=True):
                assert_within(value, other)
        else:
            assert part == whole

    assert_within(given, again)  # every word of the recipe is in force


def test_yaml_keeps_what_is_not_default(recipe):
    config = load_config(GRPOConfig, recipe, ["--optim.lr", "1e-7", "--text.epsilon_high", "0.3", "--sampling.max_images", "2"])
    assert build(GRPOConfig, yaml.safe_load(to_yaml(config))) == config
    assert yaml.safe_load(to_yaml(config))["optim"]["lr"] == 1e-7


def test_greedy_changes_temperatures_only():
    params = build(SamplingParams, {"text": {"temperature": 0.7, "top_k": 5}, "image": {"guidance_scale": 3.5}, "max_images": 2})
    greedy = params.greedy()
    assert greedy.text.temperature == greedy.image.temperature == 0
    assert (greedy.text.top_k, greedy.image.guidance_scale, greedy.max_images) == (5, 3.5, 2)
    assert params.text.temperature == 0.7


def test_prompts_are_one_source_or_several():
    given = yaml.safe_load(GRPO)
    one = build(GRPOConfig, {**given, "prompts": {"name": "a.jsonl"}})
    assert [(source.name, source.weight) for source in one.prompts] == [("a.jsonl", 1.0)]
    two = build(GRPOConfig, {**given, "prompts": [{"name": "a.jsonl", "weight": 3}, {"name": "b.jsonl"}]})
    assert [(source.name, source.weight) for source in two.prompts] == [("a.jsonl", 3.0), ("b.jsonl", 1.0)]
    assert build(GRPOConfig, yaml.safe_load(to_yaml(two))) == two
    with pytest.raises(ValueError, match="prompts"):
        build(GRPOConfig, {**given, "prompts": []})
