"""Both trainings on every family: what changes and what must not, adapters, 4 bits, gradient checkpointing, the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from family_data import SIZE, answer, picture, prompts, write_records
from typer.testing import CliRunner

from diptych.cli import app
from diptych.config import GRPOConfig, LoraConfig, SamplingParams, WarmupConfig, build
from diptych.document import Document
from diptych.models import UnifiedModel, load_model, open_policy
from diptych.models.lora import attach_lora
from diptych.runs import read_jsonl
from diptych.sampling.logprobs import score
from diptych.tokens import collate
from diptych.training.grpo import grpo
from diptych.training.warmup import warmup

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _own_rewards(monkeypatch):
    monkeypatch.syspath_prepend(str(TESTS))


@pytest.fixture(scope="session")
def records(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


def common(folder: Path, out: Path, family: str, **changes) -> dict:
    return {
        "model": str(folder), "output_dir": str(out), "image_size": SIZE.get(family), "max_steps": 1, "save_steps": 1, "num_threads": 1,
        "sampling": {"max_images": 1, "max_text_tokens": 6, "image": {"guidance_scale": 2.0}}, "optim": {"lr": 1e-2}, **changes,
    }  # fmt: skip


def warmup_config(folder: Path, out: Path, records: Path, family: str, **changes) -> WarmupConfig:
    sources = [{"name": str(records), "weight": 1}]
    return build(WarmupConfig, {"sources": sources, "batch_size": 4, "num_eval_records": 4, **common(folder, out, family, **changes)})


def grpo_config(folder: Path, out: Path, records: Path, family: str, **changes) -> GRPOConfig:
    settings = {
        "prompts": {"name": str(records), "weight": 1}, "rewards": [{"name": "toy_rewards:per_step"}], "num_generations": 4,
        "prompts_per_step": 2, "text": {"beta": 0.01}, "image": {"beta": 0.01},
    }  # fmt: skip
    return build(GRPOConfig, {**settings, **common(folder, out, family, **changes)})


def parameters_of(model: UnifiedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def frozen_names(model: UnifiedModel) -> set[str]:
    frozen = {id(p) for module in model.frozen_modules() for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in frozen}


def logits_of(model: UnifiedModel) -> torch.Tensor:
    batch = collate([model.encode_example(prompts()[1], answer())])
    with torch.no_grad():
        return score(model, batch).logprobs


@pytest.mark.parametrize("stage", ["warmup", "grpo"])
def test_a_step_changes_all_that_should_train_and_nothing_else(family, stage, folders, records, tmp_path):
    before = load_model(folders[family], image_size=SIZE.get(family))
    frozen, old = frozen_names(before), parameters_of(before)
    if stage == "warmup":
        trained = warmup(warmup_config(folders[family], tmp_path / "run", records, family))
    else:  # enough words that some document draws
        sampling = {"max_images": 1, "max_text_tokens": 24, "image": {"guidance_scale": 2.0}}
        trained = grpo(grpo_config(folders[family], tmp_path / "run", records, family, num_generations=16, sampling=sampling))
    changed = {name for name, p in trained.named_parameters() if not torch.equal(p, old[name])}
    assert frozen
    assert not changed & frozen
    if stage == "warmup":
        assert changed >= {name for name in set(old) - frozen if "aligner" not in name.split(".")}  # Janus' aligner: prompt pictures only
    else:
        assert any("layers.0" in name for name in changed)
        assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["parity/image_max"] <= 1e-4
        assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]["completions/mean_images"] > 0


def test_adapters_train_alone_and_the_reference_is_the_model_without_them(family, folders, records, tmp_path):
    base = load_model(folders[family], image_size=SIZE.get(family))
    old, logits = parameters_of(base), logits_of(base)
    config = grpo_config(folders[family], tmp_path / "run", records, family, lora={"r": 4, "alpha": 8}, max_steps=2)
    policy = grpo(config)
    assert policy.adapter is not None
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == {n for n, _ in policy.named_parameters() if "lora_" in n}
    for name, parameter in policy.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, old[name.replace("base_layer.", "")])
    assert not torch.equal(logits_of(policy), logits)
    with policy.adapter.off():
        assert torch.equal(logits_of(policy), logits)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["kl/text"] == pytest.approx(0, abs=1e-6)  # the first update starts at the reference
    assert lines[1]["kl/text"] > 0


def test_adapters_save_load_merge_and_fit_their_home_code(family, folders, records, tmp_path):
    from peft import PeftModel

    config = warmup_config(folders[family], tmp_path / "run", records, family, lora={"r": 4, "alpha": 8})
    trained = warmup(config).eval()
    expected = logits_of(trained)
    saved = tmp_path / "run/checkpoints/step_1/model"
    assert sum(file.stat().st_size for file in saved.rglob("*")) < 400_000  # the adapter alone
    loaded = load_model(saved)
    assert torch.equal(logits_of(loaded), expected)
    assert any(p.requires_grad for p in loaded.parameters())
    stock = load_model(folders[family], image_size=SIZE.get(family))
    PeftModel.from_pretrained(stock.lora_root, saved)  # the family's own class, without Diptych
    assert torch.equal(logits_of(stock), expected)
    result = CliRunner().invoke(app, ["merge", str(saved), "--out", str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    merged = load_model(tmp_path / "merged")
    assert merged.adapter is None
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="holds no adapter, so there is nothing to merge"):
        CliRunner().invoke(app, ["merge", str(folders[family]), "--out", str(tmp_path / "other")], catch_exceptions=False)


def test_a_killed_adapter_run_resumes_to_the_same_weights(folders, records, tmp_path):
    settings = {"lora": {"r": 4}, "max_steps": 4, "save_steps": 2}
    whole = grpo(grpo_config(folders["janus"], tmp_path / "whole", records, "janus", **settings))
    grpo(grpo_config(folders["janus"], tmp_path / "cut", records, "janus", **settings))
    shutil.rmtree(tmp_path / "cut/checkpoints/step_4")  # as if it had been killed after step 2
    again = grpo(grpo_config(folders["janus"], tmp_path / "cut", records, "janus", **settings))
    for (name, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_reference_is_the_model_from_which_the_run_started(family, folders, records, tmp_path):
    """GRPO from an adapter of warm-up: the KL is 0 at first and refers to that adapter, not to the base without it."""
    lora = {"lora": {"r": 4, "alpha": 8}}
    warmup(warmup_config(folders[family], tmp_path / "warm", records, family, **lora))
    start = tmp_path / "warm/checkpoints/step_1/model"
    policy = grpo(grpo_config(start, tmp_path / "rl", records, family, max_steps=2, **lora))
    lines = read_jsonl(tmp_path / "rl" / "metrics.jsonl")
    assert lines[0]["kl/text"] == pytest.approx(0, abs=1e-6)
    assert lines[0]["kl/image"] == pytest.approx(0, abs=1e-6)
    assert lines[1]["kl/text"] > 0
    started = load_model(start)
    with policy.adapter.as_reference():
        assert torch.equal(logits_of(policy), logits_of(started))
    assert not torch.equal(logits_of(policy), logits_of(started))
    assert all(p.requires_grad == (".default." in name) for name, p in policy.named_parameters() if "lora_" in name)
    loaded = load_model(tmp_path / "rl/checkpoints/step_2/model")  # holds the trained adapter alone
    assert torch.equal(logits_of(loaded), logits_of(policy))
    with pytest.raises(ValueError, match=r"has {'r': 4, 'alpha': 8}, but lora.r=16 and lora.alpha=32 were asked for"):
        grpo(grpo_config(start, tmp_path / "other", records, family, lora={}))


def test_a_killed_warm_up_resumes_to_the_same_weights(family, folders, records, tmp_path):
    """Emu3's config has dropout: a policy is trained without, or a resumed run could not repeat."""
    settings = {"max_steps": 4, "save_steps": 2, "batch_size": 2, "micro_batch_size": 1, "sample_steps": 2}
    whole = warmup(warmup_config(folders[family], tmp_path / "whole", records, family, **settings))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step_4")  # as if it had been killed before its last checkpoint
    (tmp_path / "cut/config.yaml").unlink()
    again = warmup(warmup_config(folders[family], tmp_path / "cut", records, family, **settings))
    for (name, p), (_, q) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_early_samples_fit_the_context_whatever_the_settings(folders, records, tmp_path):
    settings = {"sampling": {"max_images": 60}, "sample_steps": 1}
    warmup(warmup_config(folders["chameleon"], tmp_path / "run", records, "chameleon", **settings))
    assert (tmp_path / "run/samples/step_1.jsonl").is_file()


def test_an_example_that_does_not_fit_is_named(folders, tmp_path):
    line = {"messages": [{"role": "user", "content": "a very long story"}, {"role": "assistant", "content": "word " * 800}]}
    (tmp_path / "long.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"1 of the 1 rows of .*: .*long\.jsonl:1: the example has \d+ positions"):
        warmup(warmup_config(folders["janus"], tmp_path / "run", tmp_path / "long.jsonl", "janus"))


def test_modules_beside_the_adapter_train_in_full_and_are_saved(folders, records, tmp_path):
    lora = {"r": 4, "train_in_full": ["generation_head"]}
    before = parameters_of(load_model(folders["janus"]))
    trained = warmup(warmup_config(folders["janus"], tmp_path / "run", records, "janus", lora=lora))
    name = "hf.model.generation_head.vision_head.weight"
    assert not torch.equal(trained.get_parameter(name), before[name])
    loaded = load_model(tmp_path / "run/checkpoints/step_1/model")
    assert torch.equal(loaded.get_parameter(name), trained.get_parameter(name))
    with pytest.raises(ValueError, match=r"lora.train_in_full 'image_head' matches no parameter of janus; it has hf\."):
        attach_lora(load_model(folders["janus"]), LoraConfig(train_in_full=("image_head",)), {"source": "x"})
    with pytest.raises(ValueError, match="match nothing in the decoder layers"):
        attach_lora(load_model(folders["janus"]), LoraConfig(target_modules=("w1",)), {"source": "x"})


def test_gradient_checkpointing_changes_no_gradient(family, folders, tmp_path):
    gradients = []
    for checkpointing in (False, True):
        settings = common(folders[family], tmp_path / "run", family, gradient_checkpointing=checkpointing)
        config = build(GRPOConfig, {"rewards": [{"name": "format"}], **settings})
        model = open_policy(config).eval()
        calls = []
        model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        batch = collate([model.encode_example(prompts()[1], answer())])
        (-score(model, batch).logprobs.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (2 if checkpointing else 1)  # computed again in the backward pass
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_4_bit_weights_take_adapters_only(family, folders, records, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = {"load_in_4bit": True, "dtype": "float32"}
    with pytest.raises(ValueError, match=r"4-bit weights cannot be trained. Add adapters: --lora.r 16"):
        warmup(warmup_config(folders[family], tmp_path / "full", records, family, **settings))
    config = grpo_config(folders[family], tmp_path / "run", records, family, lora={"r": 4}, **settings)
    policy = grpo(config)
    quantized = [n for n, m in policy.named_modules() if type(m).__name__ == "Linear4bit"]
    assert any("layers.0" in name for name in quantized)
    assert not any("vq" in n or "vision" in n or "lm_head" in n for n in quantized)
    loaded = load_model(tmp_path / "run/checkpoints/step_1/model")
    torch.testing.assert_close(logits_of(loaded), logits_of(policy), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="load the adapter with load_in_4bit=False to merge it"):
        loaded.adapter.merge()
    assert load_model(tmp_path / "run/checkpoints/step_1/model", load_in_4bit=False).adapter.merge().adapter is None


def test_a_run_that_starts_from_a_4_bit_adapter_resumes_in_4_bits(folders, records, tmp_path):
    """Without settings of its own for adapters: what it started from says how the base is loaded, also after a kill."""
    pytest.importorskip("bitsandbytes")
    quantised = {"load_in_4bit": True, "dtype": "float32", "lora": {"r": 4}}
    warmup(warmup_config(folders["janus"], tmp_path / "start", records, "janus", **quantised))
    start = tmp_path / "start/checkpoints/step_1/model"
    settings = {"max_steps": 2}
    whole = warmup(warmup_config(start, tmp_path / "run", records, "janus", **settings))
    assert any(type(module).__name__ == "Linear4bit" for module in whole.modules())
    shutil.rmtree(tmp_path / "run/checkpoints/step_2")
    again = warmup(warmup_config(start, tmp_path / "run", records, "janus", **settings))
    assert torch.equal(logits_of(again), logits_of(whole))


def test_half_precision_trains_through_adapters(folders, records, tmp_path):
    config = grpo_config(folders["janus"], tmp_path / "run", records, "janus", dtype="bfloat16", lora={"r": 4}, parity_bound=10.0)
    policy = grpo(config)
    assert policy.dtype == torch.bfloat16
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}  # PEFT keeps adapters in full precision


def test_damaged_adapters_are_named(folders, records, tmp_path):
    warmup(warmup_config(folders["janus"], tmp_path / "run", records, "janus", lora={"r": 4}))
    saved = tmp_path / "run/checkpoints/step_1/model"
    file = saved / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the adapter in .* is damaged or does not fit"):
        load_model(saved)
    description = json.loads((saved / "diptych_adapter.json").read_text())
    description["base"]["source"] = str(tmp_path / "gone")
    (saved / "diptych_adapter.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"the base model of the adapter in .*run.* cannot be loaded: no model at .*gone"):
        load_model(saved)
    for content in ("{", '{"base": {}}'):
        (saved / "diptych_adapter.json").write_text(content)
        with pytest.raises(ValueError, match=r"diptych_adapter.json is damaged .*; copy the adapter folder again"):
            load_model(saved)


def test_an_adapter_takes_the_picture_size_that_is_asked_for(folders, records, tmp_path):
    warmup(warmup_config(folders["emu3"], tmp_path / "run", records, "emu3", lora={"r": 4}))
    saved = tmp_path / "run/checkpoints/step_1/model"
    assert load_model(saved).image_spec.pixel_size == 32
    assert load_model(saved, image_size=48).image_spec.pixel_size == 48


def test_the_command_line_trains_and_generates(family, folders, records, tmp_path, monkeypatch):
    """`warmup`, `grpo` from its checkpoint, and `generate` with a picture in the prompt, as a user types them."""
    monkeypatch.chdir(tmp_path)
    recipes = {"warm.yaml": warmup_config, "grpo.yaml": grpo_config}
    start = {"warm.yaml": folders[family], "grpo.yaml": Path("warm/checkpoints/step_1/model")}
    for name, config in recipes.items():
        settings = config(start[name], Path(name).stem.replace("grpo", "rl"), records, family).model_dump(mode="json")
        Path(name).write_text(json.dumps(settings))  # JSON is YAML
    picture(3).save("a.png")
    size = ["--image-size", "32"] if family == "emu3" else []
    small = ["--num_prompts", "3", "--num_retention", "2", "--max_images", "1", "--max_text_tokens", "8", "--batch_size", "3"]
    commands = [
        ["warmup", "warm.yaml", "--optim.lr", "1e-3"],
        ["grpo", "grpo.yaml"],
        ["generate", "what is next?", "--model", "rl/checkpoints/step_1/model", "--image", "a.png", "--out", "out.json", *size],
        [
            "generate",
            "hello",
            "--model",
            "rl/checkpoints/step_1/model",
            "--temperature",
            "1",
            "--max-images",
            "1",
            "--out",
            "out.html",
            *size,
        ],
    ]
    commands.append(["evaluate", "storyboard", "--model", "rl/checkpoints/step_1/model", "--out", "rates.json", *small])
    for command in commands:
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (result.output, result.exception)
    document = Document.from_blocks(json.loads(Path("out.json").read_text()))
    assert all(image.pixels.size == (32, 32) for image in document.images)
    assert "<html" in Path("out.html").read_text()
    assert json.loads(Path("rates.json").read_text())["greedy"]["document"] == 0


def test_sampling_settings_left_open_are_the_familys(family, folders):
    model = load_model(folders[family], image_size=SIZE.get(family))
    scales = {"janus": 5.0, "vila_u": 3.0, "emu3": 3.0, "chameleon": 1.0}
    assert model.default_sampling.image.guidance_scale == scales[family]
    batch = collate([model.encode_example(prompts()[0], answer())])
    with torch.no_grad():
        left_open = score(model, batch, SamplingParams()).logprobs
        given = score(model, batch, build(SamplingParams, {"image": {"guidance_scale": scales[family]}})).logprobs
    assert torch.equal(left_open, given)
