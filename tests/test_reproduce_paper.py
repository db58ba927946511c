"""docs/how-to/reproduce_paper.md: every command, option, recipe, setting and file name on it exists, and its steps fit together."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from diptych.cli import compare as command  # noqa: F401  adds the command
from diptych.cli.app import app
from diptych.config import GRPOConfig, RewardConfig, WarmupConfig, build, load_config
from diptych.data.convert import KINDS
from diptych.overrides import parse_pairs
from diptych.rewards import load_reward
from diptych.rewards.judges.options import JudgeOptions
from diptych.training.grpo import checkpoint_of as grpo_checkpoint
from diptych.training.warmup import checkpoint_of as warmup_checkpoint

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "reproduce_paper.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.S))
BASE = "checkpoints/vila-u-7b-256"


def words_of(line: str) -> list[list[str]]:
    """The simple commands of a line, without variables and `do` before them, and without torchrun and its `-m`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("();<>|&"):
            found.append([])
        elif word != "do" and not (re.fullmatch(r"[A-Z_]+=.*", word) and not found[-1]):
            found[-1].append(word)
    return [words[words.index("-m") + 1 :] if words[0] == "torchrun" else words for words in found if words]


COMMANDS = [words[1:] for line in SHELL.splitlines() for words in words_of(line) if words[0] == "diptych"]
CALLS = [words[1:] for line in SHELL.splitlines() for words in words_of(line) if words[0] == "evaluate" and len(words) == 3]
TRAININGS = {"warmup": (WarmupConfig, warmup_checkpoint), "grpo": (GRPOConfig, grpo_checkpoint)}


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's full name and its parameters, as the command line itself reads them."""
    node: Any = typer.main.get_command(app)
    context = node.make_context("diptych", list(words), resilient_parsing=False)
    names: list[str] = []
    rest = list(words)
    while hasattr(node, "commands"):
        assert rest[0] in node.commands, f"there is no command {' '.join([*names, rest[0]])!r}"
        node = node.commands[rest[0]]
        names.append(rest.pop(0))
    context = node.make_context(names[-1], rest, parent=context)
    return " ".join(names), {**context.params, "overrides": context.args}


def test_the_page_has_commands():
    assert len(COMMANDS) >= 35
    kinds = {" ".join(words[:2]) if words[0] in ("data", "evaluate", "rewards") else words[0] for words in COMMANDS}
    assert kinds == {
        "doctor", "generate", "data convert", "data inspect", "warmup", "grpo", "view", "rewards try", "evaluate mmie",
        "evaluate interleavedbench", "evaluate mme", "evaluate geneval", "evaluate opening", "evaluate ueval", "evaluate compare",
    }  # fmt: skip
    assert len(CALLS) == 11


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_and_options_exist(words):
    name, parameters = parsed(words)
    if name in TRAININGS:
        load_config(TRAININGS[name][0], parameters["recipe"], parameters["overrides"])
    else:
        assert not parameters["overrides"]
    if name == "data convert":
        assert parameters["kind"] in KINDS
    if name == "rewards try":
        build(RewardConfig, {"name": parameters["name"], "options": parse_pairs("option", parameters["option"])})
        load_reward(parameters["name"])
    if parameters.get("judge"):
        build(JudgeOptions, parse_pairs("judge", parameters["judge"]))


def test_an_option_that_does_not_exist_would_be_found():
    with pytest.raises(Exception, match="No such option"):
        parsed(["data", "convert", "comm", "x", "--out", "y", "--nonsense", "1"])
    with pytest.raises(ValueError, match="unknown key"):
        load_config(GRPOConfig, "paper_grpo", ["--advantages.credits", "outcome"])


def trainings() -> dict[str, tuple[str, Any]]:
    """output_dir -> (command, settings) of all trainings on the page."""
    found = {}
    for words in COMMANDS:
        if words[0] in TRAININGS:
            name, parameters = parsed(words)
            config: Any = load_config(TRAININGS[name][0], parameters["recipe"], parameters["overrides"])
            found[config.output_dir] = (name, config)
    return found


def test_models_are_made_before_they_are_used():
    made = {TRAININGS[name][1](config) for name, config in trainings().values()} | {BASE}
    used = [config.model for _, config in trainings().values()]
    used += [words[words.index("--model") + 1] for words in COMMANDS if "--model" in words] + [model for model, _ in CALLS]
    assert {model for model in used if model != "$1" and "/" in model and not model.startswith("lmms-lab")} <= made
    assert f"--local-dir {BASE}" in SHELL


def test_data_is_made_before_it_is_used():
    converted = {f"{words[words.index('--out') + 1]}/records.jsonl" for words in COMMANDS if words[:2] == ["data", "convert"]}
    for name, config in trainings().values():
        sources = [*config.sources] if name == "warmup" else [*config.prompts, *(config.ptx.sources if config.ptx else ())]
        assert {source.name for source in sources} <= converted, config.output_dir


def test_interleaved_data_is_kept_apart_from_the_benchmarks():
    for words in COMMANDS:
        if words[:2] == ["data", "convert"] and words[2] in ("activitynet", "genhowto", "openstory", "comm", "vist"):
            assert [words[i + 1] for i, word in enumerate(words) if word == "--exclude"] == ["bench/MMIE", "bench/InterleavedBench"]
    downloaded = set(re.findall(r"(?:--local-dir |geneval |OpenING )(bench/\w+)", SHELL))
    assert {word for words in COMMANDS for word in words if re.fullmatch(r"bench/\w+", word)} <= downloaded


def test_rewards_exist_and_their_options_are_theirs():
    for _, config in trainings().values():
        for reward in getattr(config, "rewards", ()):
            function = load_reward(reward.name)
            if "base_url" in reward.options:
                build(JudgeOptions, reward.options)
            elif reward.options:
                assert set(reward.options) <= set(function.options_class.model_fields)


def test_compared_folders_are_those_of_evaluations():
    outs = {words[words.index("--out") + 1] for words in COMMANDS if words[0] == "evaluate" and words[1] != "compare"}
    known = {out.replace("$2", name) for out in outs for _, name in CALLS}
    for words in COMMANDS:
        if words[:2] == ["evaluate", "compare"]:
            assert set(words[2:4]) <= known


def test_rows_change_what_they_are_about():
    """Each ablation differs from `paper_grpo` in what its row says, and in nothing else."""
    runs = {folder.rsplit("/", 1)[-1]: config.model_dump(mode="json") for folder, (name, config) in trainings().items() if name == "grpo"}
    full = runs["grpo"]
    changed = {name: {key for key in full if run[key] != full[key]} - {"output_dir"} for name, run in runs.items()}
    assert changed == {
        "grpo": set(), "qlora": {"load_in_4bit", "model"}, "format": {"rewards", "advantages"}, "text": {"rewards", "advantages"},
        "visual": {"advantages"}, "no_kl_g2": {"num_generations", "text", "image"}, "kl_g2": {"num_generations"}, "clip_score": {"rewards"},
        "document_judge": {"rewards", "ptx"},
    }  # fmt: skip
    names = {name: [reward["name"] for reward in run["rewards"]] for name, run in runs.items()}
    assert names["grpo"] == names["visual"] == ["format", "llm_text_critic", "image_reward"]
    assert (names["format"], names["text"]) == (["format"], ["format", "llm_text_critic"])
    assert runs["text"]["rewards"] == full["rewards"][:2]
    assert names["clip_score"] == ["format", "llm_text_critic", "clip_score"]
    assert (runs["no_kl_g2"]["text"]["beta"], runs["no_kl_g2"]["image"]["beta"], runs["kl_g2"]["num_generations"]) == (0, 0, 2)


def test_the_recipes_say_what_the_paper_says():
    config = load_config(GRPOConfig, "paper_grpo")
    assert (config.num_generations, config.max_steps, config.sampling.image.guidance_scale) == (4, 3000, 3.0)
    assert (config.advantages.credit, config.advantages.normalize, config.advantages.discount) == ("process", "group", 1.0)
    assert [reward.weight for reward in config.rewards] == [1.0, 1.0, 1.0]
    assert min(config.text.beta, config.image.beta) > 0
    warmup = load_config(WarmupConfig, "paper_warmup")
    assert sum(source.weight for source in warmup.sources) == pytest.approx(1)
    shares = {source.name.split("/")[1]: source.weight for source in warmup.sources}
    assert shares["emova"] == shares["journeydb"] == pytest.approx(1 / 2.3, abs=1e-3)  # 1 M each of 2.3 M, 0.3 M interleaved
    assert warmup.max_steps * warmup.batch_size == pytest.approx(2.3e6, rel=0.01)
    assert warmup.lora == config.lora  # GRPO goes on with the adapter of the warm-up


def test_files_that_the_page_links_to_exist():
    for link in re.findall(r"\]\(((?!http)[^)#]+)", PAGE):
        assert (Path(__file__).parents[1] / "docs" / "how-to" / link).exists(), link
    assert (Path(__file__).parents[1] / "benchmarks" / "real_size.py").is_file()
