"""The recipe of what is packaged, at a tiny size."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from diptych.models import load_model, packaged_folder
from diptych.models.storyboard.model import StoryboardModel
from diptych.pretrain import pretrain
from diptych.pretrain.base_model import (
    PatchCodes,
    attention_cap,
    lesson,
    likelihood_loss,
    make_batch,
    measure_answers,
    new_model,
)
from diptych.pretrain.muon import AttentionCap, Muon, MuonAdamW, orthogonalise
from diptych.pretrain.settings import STANDARD_COURSE, Lesson
from diptych.sampling.logprobs import score


def test_a_part_goes_on_from_a_checkpoint_and_keeps_its_image_tokenizer(tmp_path):
    old = packaged_folder("storyboard")
    pretrain(tmp_path / "out", seed=0, scale=0.001, log=lambda line: None, parts=("storyboard",), init_from=old)
    assert not (tmp_path / "out" / "image_text").exists()
    assert set(json.loads((tmp_path / "out" / "storyboard" / "measures.json").read_text())) == {"codec", "answers"}
    before, after = StoryboardModel.load(old).state_dict(), StoryboardModel.load(str(tmp_path / "out" / "storyboard")).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("codec.")} <= same
    assert "lm_head.weight" not in same
    assert not any(".layers." in name and name.endswith("proj.weight") for name in same)


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(ValueError, match="no part 'critic' to pretrain; the parts are storyboard, image_text, text_critic, next_picture"):
        pretrain(tmp_path / "out", seed=0, scale=1, log=print, parts=("critic",))
    assert not (tmp_path / "out").exists()


def test_lessons_begin_with_facts_and_words_only_from_scratch():
    course = STANDARD_COURSE
    assert [lesson(step, 12, True) for step in range(7)] == [course.facts] * 3 + [course.words] * 2 + [course.amid, course.alone]
    assert [lesson(step, 12, False) for step in range(2)] == [course.alone, course.amid]


def test_loss_is_the_mean_over_all_batches():
    """Conversations and bare pictures have one mean for text and one for codes, not a mean of means."""
    model = load_model("storyboard")
    batches = make_batch(model, PatchCodes(model), 0, 0, Lesson(("draw", "question"), 3, 64))
    loss, parts = likelihood_loss(model, batches)
    values: dict[str, list[float]] = {"text": [], "image": []}
    for batch in batches:
        logprobs = score(model, batch).logprobs.detach()
        for kind, mask in (("text", batch.text_mask), ("image", batch.image_mask)):
            values[kind] += (-logprobs[batch.choice_mask & mask[..., None]]).tolist()
    means = {kind: sum(found) / len(found) for kind, found in values.items()}
    assert parts["text_loss"] == pytest.approx(means["text"], rel=1e-4)
    assert float(loss.detach()) == pytest.approx(means["text"] + means["image"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["storyboard", "storyboard_terse"])
def test_a_packaged_base_answers_as_its_measures_say(name):
    """Some of the 240 prompts of each kind that `measures.json` is about; and a model that knows nothing has none right."""
    model = load_model(name)
    stored = json.loads((packaged_folder(name) / "measures.json").read_text())["answers"]
    found = measure_answers(model, 24)
    assert {kind: found[kind] for kind in stored} == pytest.approx(stored, abs=1.01 / 24)
    assert set(measure_answers(new_model(model.codec, 0), 2).values()) == {0.0}


def test_optimizer_resumes_exactly():
    def run(steps: int, optimizer: MuonAdamW, model: torch.nn.Linear) -> None:
        for step in range(steps):
            optimizer.step((model(torch.full((1, 4), 1.0 + step)) ** 2).sum())

    def fresh() -> tuple[torch.nn.Module, MuonAdamW]:
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])  # ".layers." makes its matrix Muon's
        model.forward = model.layers[0].forward
        body = torch.nn.ModuleDict({"body": model})
        return body, MuonAdamW(body, 1e-2, 20)

    body, optimizer = fresh()
    assert [len(o.param_groups[0]["params"]) for o in optimizer.optimizers] == [1, 1]
    run(3, optimizer, body["body"])
    other, resumed = fresh()
    other.load_state_dict(body.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as through a file
    run(2, optimizer, body["body"])
    run(2, resumed, other["body"])
    assert torch.equal(body["body"].layers[0].weight, other["body"].layers[0].weight)


def test_muon_is_torchs_but_for_its_rounding():
    shapes, rate = [(160, 160), (432, 160), (160, 432), (160, 160)], 0.02
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    optimizers = [Muon(ours, rate, 0.1), torch.optim.Muon(theirs, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, begin in zip(ours, theirs, start, strict=True):
        moved, expected = one.detach() - begin, other.detach() - begin
        assert float((moved - expected).norm() / expected.norm()) < 0.02  # bfloat16 has 8 bits; another shape's update differs by 1


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 96, 40, generator=torch.Generator().manual_seed(0))))
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_muon_takes_matrices_only():
    with pytest.raises(ValueError, match=r"takes matrices; got a parameter of shape \(4,\)"):
        Muon([torch.nn.Parameter(torch.zeros(4))], 0.1, 0.1)


def test_attention_cap_comes_down_late():
    caps = [attention_cap(step, 4500) for step in (0, 3000, 3375, 3750, 4499)]
    assert caps == pytest.approx([50, 50, (50 * 15) ** 0.5, 15, 15])


def test_attention_cap_bounds_every_logit_and_leaves_small_heads_alone():
    model = load_model("storyboard").llama
    head = model.layers[0].self_attn.head_dim
    with torch.no_grad():
        model.layers[0].self_attn.q_proj.weight[:head] *= 40  # one head, far above any cap
        model.layers[1].self_attn.q_proj.weight[:head] *= 1e-3  # and one far below
    small = model.layers[1].self_attn.q_proj.weight[:head].clone()
    embeds = torch.randn(2, 12, model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def largest_logit(layer: int) -> float:
        """Over all pairs of positions, before rotation."""
        attention, seen = model.layers[layer].self_attn, {}
        hooks = [p.register_forward_hook(lambda m, _, out: seen.update({m: out})) for p in (attention.q_proj, attention.k_proj)]
        model(inputs_embeds=embeds)
        for hook in hooks:
            hook.remove()
        query, key = (seen[p].detach().reshape(24, -1, head) for p in (attention.q_proj, attention.k_proj))
        return float(torch.einsum("ihd,jhd->hij", query, key).abs().max()) / head**0.5

    assert largest_logit(0) > 20.0
    cap = AttentionCap(model)
    model(inputs_embeds=embeds)
    assert cap.apply(20.0) > 20.0
    assert largest_logit(0) <= 20.0
    assert torch.equal(model.layers[1].self_attn.q_proj.weight[:head], small)
