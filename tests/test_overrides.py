"""What is written on a command line is what is set, and nothing of it is dropped; recipes say what people mean."""

from __future__ import annotations

import random

import pytest
import yaml
from pydantic import Field
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import Config, GRPOConfig, RewardConfig, build, load_config
from diptych.overrides import parse_overrides, parse_pairs, read_value
from diptych.rewards.base import configured, option_kind
from diptych.rewards.judges import LLMTextCritic
from diptych.userfiles import dump_yaml, load_yaml

PIECES = [
    "#", " #", ": ", ":", "- ", "[", "]", "{", "}", ",", "'", '"', "\\", "0123", "1e-4", "1.10", "no", "true", "null", "~", "2024-05-01",
    "12:30", "a", "é", " ", "*", "&x", "!tag", "%", "@", "|", ">", "?", "=", "--", "runs/exp", ".5", "0x10", "1_000", "\t", "…", "<<",
    ".inf",
]  # fmt: skip
TEXTS = [
    "runs/exp #3/model",
    "Answer in words: no pictures.",
    "2024-05-01",
    "0123",
    "no",
    "[draft]",
    "{a: b}",
    "*.jsonl",
    "a: b",
    "~",
    "%x",
    "- a",
]


def random_texts(count: int) -> list[str]:
    source = random.Random(0)
    return ["".join(source.choice(PIECES) for _ in range(source.randint(1, 5))) for _ in range(count)]


def is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


@pytest.mark.parametrize("key", ["model", "output_dir", "rewards.0.name", "code_cache", "prompts.0.name"])
def test_a_string_takes_the_text_as_it_stands(key):
    for text in [*TEXTS, *random_texts(1000 if key == "model" else 50)]:
        if is_quoted(text) or text == "null":
            continue
        config = load_config(GRPOConfig, "grpo", ["--prompts", "[{name: a}]", f"--{key}", text])
        value = config
        for part in key.split("."):
            value = value[int(part)] if part.isdigit() else getattr(value, part)
        assert value == text
        assert load_config(GRPOConfig, "grpo", ["--prompts", "[{name: a}]", f"--{key}={text}"]) == config


def test_quotes_around_the_whole_are_taken_off_and_null_unsets():
    for text, read in (("'runs/[draft]'", "runs/[draft]"), ('"0123"', "0123"), ('"null"', "null"), ("'tis", "'tis"), ('a "b"', 'a "b"')):
        assert load_config(GRPOConfig, "grpo", ["--model", text]).model == read
    assert load_config(GRPOConfig, "grpo", ["--code_cache", "null"]).code_cache is None
    assert load_config(GRPOConfig, "grpo", ["--code_cache", '"null"']).code_cache == "null"
    assert load_config(GRPOConfig, "grpo", ["--model", "null"]).model == "null"  # a string cannot be unset


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seed", "3 # three"], r"seed: .*\(given: '3 # three'\)"),
        (["--seed", "0x"], "seed: "),
        (["--gradient_checkpointing", "--seed"], "gradient_checkpointing: .*boolean"),
        (["--lora", "{r: 8} # why"], r"--lora '\{r: 8\} # why': '# why' would be lost"),
        (["--lora", "{r: 8, # why\n alpha: 3}"], "'# why' would be lost"),
        (["--optim.betas", "[0.8, 0.9"], "--optim.betas: cannot read the value"),
        (["--optim", "{lr: 1e-4, lr: 2e-4}"], "the key 'lr' stands twice"),
        (["--ptx.sources", "[{name: d, weight: 1, weight: 2}]"], "the key 'weight' stands twice"),
        (["--rewards.0.options.a", '{"x": 1, "x": 2}'], "the key 'x' stands twice"),
        (["--rewards.².name", "x"], "no index of a list"),
        (["--rewards.0.options.a"], "--rewards.0.options.a needs a value"),
    ],
)
def test_what_would_be_lost_or_misread_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        load_config(GRPOConfig, "grpo", arguments)


def test_parts_of_lists_and_groups_have_their_own_types():
    config = load_config(
        GRPOConfig, "grpo",
        ["--lora", "{r: 8, target_modules: [q_proj, 0123]}", "--rewards", "[{name: 0123, weight: 1e-1, options: {n: 3, s: 1.10, on: no}}]",
         "--optim.betas", "[.8, 0.9]", "--offload", "[optimizer]", "--seed", "0012"],
    )  # fmt: skip
    assert (config.lora.r, config.lora.target_modules, config.seed) == (8, ("q_proj", "0123"), 12)
    (reward,) = config.rewards
    assert (reward.name, reward.weight, reward.options) == ("0123", 0.1, {"n": 3, "s": "1.10", "on": "no"})
    assert config.optim.betas == (0.8, 0.9)


def test_an_option_of_unknown_type_is_a_number_only_where_nothing_is_lost():
    for text, read in {"3": 3, "0.5": 0.5, "1e-4": 1e-4, "-2": -2, "true": True, "False": False, "null": None, "[1, 2]": [1, 2]}.items():
        assert parse_pairs("option", [f"a={text}"]) == {"a": read}
        assert load_config(GRPOConfig, "grpo", ["--rewards.0.options.a", text]).rewards[0].options["a"] == read
    assert parse_pairs("option", ['a=[1.10, 2.5, {"v": 0.50}]']) == {"a": ["1.10", 2.5, {"v": "0.50"}]}
    for text in [*TEXTS, "1.10", "1e10", "1e-400", "1e+400", "007", "NaN", "Infinity", "9" * 5000, "[1, 2", "a=b"]:
        assert parse_pairs("column", [f"a={text}"]) == {"a": text}
    assert parse_pairs("option", ["my-key=1"]) == {"my-key": 1}  # names of one's own stand as they are
    assert load_config(GRPOConfig, "grpo", ["--rewards.0.options.my-key", "1"]).rewards[0].options == {"my-key": 1}
    for wrong in ("a", "=a", ""):
        with pytest.raises(ValueError, match="is no key=value"):
            parse_pairs("option", [wrong])
    with pytest.raises(ValueError, match="gives 'a' twice"):
        parse_pairs("option", ["a=1", "a=2"])


def test_options_take_the_types_of_the_reward():
    options = ["base_url=http://localhost:8000/v1", "model=0123", "revision=1e10", "timeout_seconds=1.50", "extra_body={top_k: 5}"]
    found = parse_pairs("option", options, lambda key: option_kind(LLMTextCritic, key))
    assert (found["model"], found["revision"], found["timeout_seconds"], found["extra_body"]) == (
        "0123",
        "1e10",
        1.5,
        {"top_k": "5"} | {"top_k": 5},
    )

    def reward(completions, word: str = "", bound: float = 0.5, times=1, **_):
        return [len(word) + bound + times] * len(completions)

    config = RewardConfig(name="mine", options=parse_pairs("option", ["word=0.50", "bound=1.10", "times=007"]))
    assert config.options == {"word": "0.50", "bound": "1.10", "times": "007"}  # nobody has been asked what they are
    found = parse_pairs("option", ["word=0.50", "bound=1.10", "times=007"], lambda key: option_kind(reward, key))
    assert found == {"word": "0.50", "bound": 1.1, "times": 7}
    assert configured(config.model_copy(update={"options": {"bound": "1.10", "times": "007"}}), reward)(completions=[0]) == [8.1]


def test_rewards_try_takes_options_and_columns_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "def tells(completions, answer, mark: str = '', **_):\n    raise RuntimeError(f'<{answer[0]!r} {mark!r}>')\n"
    )
    (tmp_path / "doc.json").write_text('[{"type": "text", "text": "a"}]')
    command = ["rewards", "try", "mine:tells", "--document", "doc.json", "--column", "answer=0123 #4", "--option", "mark=a: b #c"]
    result = CliRunner().invoke(app, command)
    assert "<'0123 #4' 'a: b #c'>" in str(result.exception)


# --- YAML ----------------------------------------------------------------------------------------------------------------


def test_recipes_say_what_people_mean():
    said = "a: 1e-4\nb: no\nc: 0123\nd: 12:30\ne: 2024-05-01\nf: true\ng: 0x10\nh: ~\ni: -3\nj: .5\nk: 1_000\nl: 1.\n"
    assert load_yaml(said, "it") == {
        "a": 1e-4, "b": "no", "c": "0123", "d": "12:30", "e": "2024-05-01", "f": True, "g": 16, "h": None, "i": -3, "j": 0.5, "k": "1_000",
        "l": 1.0,
    }  # fmt: skip
    for twice in ("a: 1\na: 2\n", "a: {b: 1, b: 2}\n", "x:\n  - {c: 1, c: 1}\n"):
        with pytest.raises(ValueError, match=r"it is no valid YAML: the key '.' stands twice"):
            load_yaml(twice, "it")
    with pytest.raises(ValueError, match="no valid YAML"):
        load_yaml("a: " + "9" * 5000, "it")


def test_every_text_comes_back_from_yaml():
    for text in [*TEXTS, *PIECES, *random_texts(1000), "1e5", "+1", "0o7", "yes", "Null", "", " a ", "a\nb"]:
        written = dump_yaml({"a": text, text: [text]})
        assert load_yaml(written, "it") == yaml.safe_load(written) == {"a": text, text: [text]}


def test_the_type_of_a_field_decides():
    class Inner(Config):
        words: list[str] = Field(default_factory=list)
        numbers: dict[str, float] = Field(default_factory=dict)

    class Outer(Config):
        inner: Inner | None = None
        many: tuple[Inner, ...] = ()
        either: int | str = 0

    assert read_value("007", str, "x") == "007"
    assert read_value("007", int, "x") == 7
    assert load_config(Outer, None, ["--inner.words", "[007, no]", "--inner.numbers.my-key", "1e3", "--either", "007"]) == build(
        Outer, {"inner": {"words": ["007", "no"], "numbers": {"my-key": 1000.0}}, "either": "007"}
    )
    assert load_config(Outer, None, ["--many", "[{words: [null]}, {numbers: {a: 1}}]"]).many[0].words == ["null"]
    assert parse_overrides(["--a=b=c", "--d", "--e"]) == [("a", "b=c"), ("d", "--e")]
