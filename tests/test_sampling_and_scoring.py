"""Design promise 2: the probability that the loss uses is the probability that the sampler used."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.document import Document, Image, Text
from diptych.models import load_model
from diptych.sampling import batch, engine, stream, texts
from diptych.sampling import logprobs as scorer
from diptych.sampling.distribution import draw, log_distribution
from diptych.sampling.engine import sample
from diptych.sampling.guidance import mix, num_branches
from diptych.sampling.logprobs import score
from diptych.sampling.rollout import Rollout
from diptych.tokens import Modality, TokenBatch, TokenRow, collate

WORDS = ("the ball grows", "tell the story . on the left a small red ball , at night .", "draw this . a big tree")


def prompts(model) -> list[TokenRow]:
    """Three prompts of different lengths, one with a picture."""
    codes = torch.randint(model.image_spec.codebook_size, (9, model.image_spec.depth), generator=torch.Generator().manual_seed(3))
    rows = [model.encode_prompt(Document((Text(words),))) for words in WORDS]
    rows[1] = model.encode_prompt(Document((Image(codes=codes), Text(WORDS[1]))))
    return rows


def roll(model, params, seed: int = 0, group: int = 6) -> list[Rollout]:
    return sample(model, prompts(model), params, num_generations=group, generator=torch.Generator().manual_seed(seed))


def sampled_logprobs(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([r.rollout_logprobs for r in rollouts], batch_first=True)


@torch.no_grad()
def reference_logprobs(model, rollout: Rollout, params: SamplingParams) -> torch.Tensor:
    """One token at a time, a fresh full forward without cache for each, guidance by a second forward: no shared code path
    beyond the model's own heads."""
    row, spec = rollout.row, model.image_spec

    def last_hidden(upto: TokenRow) -> torch.Tensor:
        batch = collate([upto])
        return model.backbone(model.embed(batch), torch.arange(len(upto))[None], torch.ones(1, len(upto), dtype=torch.bool))[:, -1]

    def cut(begin: int, end: int) -> TokenRow:
        return row[begin:end]

    values = torch.zeros(len(row), spec.depth)
    drawn, image_start = 0, 0
    for t in range(rollout.prompt_length, len(row)):
        if not row.completion_mask[t]:
            continue
        hidden = last_hidden(cut(0, t))
        if row.modality[t] == Modality.TEXT:
            logits = model.text_logits(hidden)[0].double()
            logits[model.forbidden_text_ids()] = -torch.inf
            if drawn >= params.max_images:
                logits[spec.begin_id] = -torch.inf
            token = int(row.text_ids[t])
            values[t, 0] = torch.log(torch.softmax(logits / params.text.temperature, -1)[token])
            if token == spec.begin_id:
                drawn, image_start = drawn + 1, t + 1
            continue
        head = TokenRow.text([*model.unconditional_prompt(rollout.prompt_length), spec.begin_id], spec.depth)
        other = last_hidden(TokenRow.concat([head, cut(image_start, t)]))
        for d in range(spec.depth):
            prefix = row.codes[t : t + 1, :d]
            conditional, unconditional = model.image_step(hidden, prefix)[0].double(), model.image_step(other, prefix)[0].double()
            guided = unconditional + params.image.guidance_scale * (conditional - unconditional)
            values[t, d] = torch.log(torch.softmax(guided / params.image.temperature, -1)[int(row.codes[t, d])])
    return values


def test_rollouts_cover_what_the_other_tests_need(tiny_model, guided_params):
    rollouts = roll(tiny_model, guided_params)
    assert len({len(r.document.images) for r in rollouts}) >= 3  # rows switch independently, 0..N images
    assert any(r.truncated for r in rollouts)
    assert any(not r.truncated for r in rollouts)


def test_sampler_and_scorer_equal_a_plain_loop(tiny_model, guided_params):
    rollouts = roll(tiny_model, guided_params, group=2)
    batch = collate([r.row for r in rollouts])
    replayed = score(tiny_model, batch, guided_params).logprobs
    for i, rollout in enumerate(rollouts):
        expected = reference_logprobs(tiny_model, rollout, guided_params)
        torch.testing.assert_close(rollout.rollout_logprobs, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(replayed[i, : len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_text_tokens=8),
        SamplingParams(text=TextSampling(temperature=1.3, top_k=7), image=ImageSampling(top_p=0.6, guidance_scale=5.0), max_text_tokens=8),
        SamplingParams(text=TextSampling(top_p=0.5), image=ImageSampling(guidance_scale=1.0, top_k=3), max_images=1, max_text_tokens=8),
        SamplingParams(image=ImageSampling(guidance_scale=0.0), max_images=0, max_text_tokens=8),
    ],
)
def test_replay_equals_sampling_for_all_settings(tiny_model, params):
    rollouts = roll(tiny_model, params)
    batch = collate([r.row for r in rollouts])
    gap = (score(tiny_model, batch, params).logprobs - sampled_logprobs(rollouts)).abs()[batch.choice_mask]
    assert gap.max() <= 1e-4
    assert all(len(r.document.images) <= params.max_images for r in rollouts)


def test_packaged_model_with_guidance_meets_the_promise():
    model = load_model("storyboard")
    params = SamplingParams(image=ImageSampling(guidance_scale=3.0))
    rows = [model.encode_prompt(Document((Text("draw this . on the left a small red ball , at night ."),))), *prompts(model)[:1]]
    rollouts = sample(model, rows, params, num_generations=8, generator=torch.Generator().manual_seed(0))
    batch = collate([r.row for r in rollouts])
    assert any(r.document.images for r in rollouts)
    gap = (score(model, batch, params).logprobs - sampled_logprobs(rollouts)).abs()
    assert gap[batch.choice_mask & batch.text_mask[..., None]].max() <= 1e-4
    assert gap[batch.choice_mask & batch.image_mask[..., None]].max() <= 1e-4


# --- the field's faults (design.md section 7), each put in on purpose: the parity check must see it --------------------------


def parity_gap(model, rollouts, params) -> float:
    batch = collate([r.row for r in rollouts])
    gap = (score(model, batch, params).logprobs - sampled_logprobs(rollouts)).abs()
    return float(gap[batch.choice_mask].max())


def shift_other_branches(monkeypatch, by: int) -> None:
    right = scorer._states

    def shifted(*arguments):
        hidden, place, others = right(*arguments)
        return hidden, place, [at.roll(by) for at in others]

    monkeypatch.setattr(scorer, "_states", shifted)


def test_fault_image_logprobs_shifted_by_one(tiny_model, guided_params, monkeypatch):
    rollouts = roll(tiny_model, guided_params)
    assert parity_gap(tiny_model, rollouts, guided_params) < 1e-4
    shift_other_branches(monkeypatch, 1)
    assert parity_gap(tiny_model, rollouts, guided_params) > 0.1


def test_fault_conditional_logprobs_shifted_by_one(tiny_model, guided_params, monkeypatch):
    rollouts = roll(tiny_model, guided_params)
    right = type(tiny_model).backbone
    monkeypatch.setattr(type(tiny_model), "backbone", lambda self, *a, **k: right(self, *a, **k).roll(-1, dims=1))
    assert parity_gap(tiny_model, rollouts, guided_params) > 0.1


def test_fault_guidance_rows_mispaired(tiny_model, guided_params, monkeypatch):
    rollouts = roll(tiny_model, guided_params)
    shift_other_branches(monkeypatch, tiny_model.image_spec.num_positions)
    assert parity_gap(tiny_model, rollouts, guided_params) > 0.1


def test_fault_guided_sampling_scored_unguided_or_divided_by_the_scale(tiny_model, guided_params, monkeypatch):
    rollouts = roll(tiny_model, guided_params)
    batch = collate([r.row for r in rollouts])
    unguided = score(tiny_model, batch, guided_params, guided=False).logprobs
    assert (unguided - sampled_logprobs(rollouts)).abs()[batch.choice_mask].max() > 0.1
    monkeypatch.setattr(scorer, "mix", lambda c, others, image: mix(c, others, image) / image.guidance_scale)
    assert parity_gap(tiny_model, rollouts, guided_params) > 0.1


def test_fault_top_k_left_on_while_the_full_vocabulary_is_scored(tiny_model):
    sampled_with = SamplingParams(text=TextSampling(top_k=5), max_text_tokens=8)
    rollouts = roll(tiny_model, sampled_with)
    assert parity_gap(tiny_model, rollouts, sampled_with) < 1e-4
    assert parity_gap(tiny_model, rollouts, SamplingParams(max_text_tokens=8)) > 0.1
    assert SamplingParams().text.top_k == 0
    assert SamplingParams().text.top_p == 1


def test_fault_sampled_tokens_overwritten(tiny_model, guided_params):
    """Every token in the row is the one that was drawn: replacing one is seen at once."""
    rollouts = roll(tiny_model, guided_params)
    row = rollouts[0].row
    ids = row.text_ids.clone()
    ids[rollouts[0].prompt_length] = (ids[rollouts[0].prompt_length] + 7) % 60 + 10
    rollouts[0] = dataclasses.replace(rollouts[0], row=dataclasses.replace(row, text_ids=ids))
    assert parity_gap(tiny_model, rollouts, guided_params) > 1e-3


def test_fault_left_padding_changes_positions(tiny_model, guided_params, monkeypatch):
    """Positions count a sequence's own real tokens; counting slots instead (as with left padding and no position ids) is seen."""
    rollouts = roll(tiny_model, guided_params)
    right = type(tiny_model).backbone
    shifted = lambda self, embeds, positions, layout: right(self, embeds, torch.arange(positions.shape[1])[None], layout)  # noqa: E731
    monkeypatch.setattr(type(tiny_model), "backbone", shifted)
    assert parity_gap(tiny_model, rollouts, guided_params) > 1e-2


def test_fault_truncation_judged_per_sequence(tiny_model, guided_params):
    """An image's length is constant: a document of pictures and short texts is not truncated, however long it is."""
    rollouts = roll(tiny_model, guided_params, group=8)
    for rollout in rollouts:
        longest = run = 0
        for kind, chosen in zip(rollout.row.modality.tolist(), rollout.row.completion_mask.tolist(), strict=True):
            run = run + 1 if chosen and kind == Modality.TEXT else 0
            longest = max(longest, run)
        ends = int(rollout.row.text_ids[-1]) == tiny_model.eos_id
        assert rollout.truncated == (not ends)
        assert not rollout.truncated or longest == guided_params.max_text_tokens
    assert any(len(r.row) - r.prompt_length > 2 * guided_params.max_text_tokens and not r.truncated for r in rollouts)


def test_every_token_of_a_rollout_belongs_to_its_segments_step(tiny_model, guided_params):
    """Credit goes by `step_ids`: an image's positions to the image's step, words to the step whose text they spell."""
    spec, seen = tiny_model.image_spec, 0
    for rollout in roll(tiny_model, guided_params):
        row = rollout.row[rollout.prompt_length :]
        assert (row.step_ids.diff() >= 0).all()
        assert set(row.step_ids.tolist()) <= set(range(rollout.num_steps))
        for step, (kind, segment) in enumerate(zip(rollout.step_modality, rollout.document, strict=True)):
            here = row.step_ids == step
            images = here & (row.modality == Modality.IMAGE)
            if kind == Modality.IMAGE:
                assert torch.equal(row.codes[images], segment.codes)
                assert int((here & (row.text_ids == spec.end_id)).sum()) >= 1
                seen += 1
            else:
                words = [i for i in row.text_ids[here].tolist() if i not in (spec.begin_id, tiny_model.eos_id)]
                assert not images.any()
                assert tiny_model.decode_text(words) == segment.text
    assert seen > 10


def test_guidance_by_hand():
    """One branch: 1 + 3 * (2 - 1) = 4. Two: 1 + 0.5 * (5 - 1) + 3 * (2 - 5) = -6. None: the conditional logits."""
    conditional, unconditional, pictures = torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([5.0])
    assert mix(conditional, [unconditional], ImageSampling(guidance_scale=3.0)).item() == pytest.approx(4.0)
    both = ImageSampling(guidance_scale=3.0, image_guidance_scale=0.5)
    assert mix(conditional, [unconditional, pictures], both).item() == pytest.approx(-6.0)
    assert mix(conditional, [], ImageSampling(guidance_scale=1.0)) is conditional
    counts = [num_branches(ImageSampling(guidance_scale=s, image_guidance_scale=i)) for s, i in ((1, None), (3, None), (1, 1), (1, 2))]
    assert counts == [0, 1, 0, 2]


# --- invariances ---------------------------------------------------------------------------------------------------------


def test_batch_of_many_equals_many_of_one(tiny_model, guided_params):
    rollouts = roll(tiny_model, guided_params)
    together = score(tiny_model, collate([r.row for r in rollouts]), guided_params).logprobs
    for i, rollout in enumerate(rollouts):
        alone = score(tiny_model, collate([rollout.row]), guided_params).logprobs[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=2e-5, rtol=0)


def test_padding_changes_nothing(tiny_model, guided_params):
    rollouts = roll(tiny_model, guided_params)[:2]
    batch = collate([r.row for r in rollouts])
    long = TokenRow.text([9] * 300, tiny_model.image_spec.depth)
    padded = collate([*(r.row for r in rollouts), long])
    width = batch.text_ids.shape[1]
    a = score(tiny_model, batch, guided_params).logprobs
    b = score(tiny_model, padded, guided_params).logprobs[:2, :width]
    torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_prompts_prefilled_together_sample_as_if_alone(tiny_model, guided_params):
    """Greedy answers do not depend on the other rows (masked slots, compaction, shared prefill)."""
    greedy = guided_params.greedy()
    together = sample(tiny_model, prompts(tiny_model), greedy, generator=torch.Generator())
    for prompt, rollout in zip(prompts(tiny_model), together, strict=True):
        alone = sample(tiny_model, [prompt], greedy, generator=torch.Generator())[0]
        assert torch.equal(alone.row.text_ids, rollout.row.text_ids)
        assert torch.equal(alone.row.codes, rollout.row.codes)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_steps_of_unchanging_shape_sample_the_same_documents(models, family, tiny_model, guided_params, monkeypatch, scale):
    """What a CUDA graph replays, run here without recording: the same tokens under the same seed; asking the device rarely whether
    all rows are done changes nothing either."""
    model = tiny_model if family == "storyboard" else models[family]
    begin, eos, plain = model.image_spec.begin_id, model.eos_id, type(model).text_logits

    def favouring(self, hidden):
        """Documents that switch and end often, with random weights too."""
        logits = plain(self, hidden).clone()
        highest = logits.max(-1).values
        logits[..., begin], logits[..., eos] = highest + 2, highest + 1
        return logits

    monkeypatch.setattr(type(model), "text_logits", favouring)
    params = guided_params.model_copy(update={"image": guided_params.image.model_copy(update={"guidance_scale": scale}), "max_images": 2})
    rows = [model.encode_prompt(Document((Text(words),))) for words in ("the ball", "draw this . a big tree")]

    def run(**options) -> list[Rollout]:
        return sample(model, rows, params, num_generations=4, generator=torch.Generator().manual_seed(3), **options)

    plainly = run()
    stepwise = run(graphs=True)
    monkeypatch.setattr(texts, "ASK_EVERY", {"cpu": 5})
    monkeypatch.setattr(stream, "POSITIONS_PER_GRAPH", 3)
    rarely = run(graphs=True)
    assert len({len(r.document.images) for r in plainly}) >= 2
    for one, two, three in zip(plainly, stepwise, rarely, strict=True):
        for other in (two, three):
            assert torch.equal(one.row.text_ids, other.row.text_ids)
            assert torch.equal(one.row.codes, other.row.codes)
            torch.testing.assert_close(one.rollout_logprobs, other.rollout_logprobs, atol=1e-4, rtol=0)


def test_rows_that_wait_for_a_long_text_are_not_computed(tiny_model, guided_params, monkeypatch):
    """Of 24 rows a few write to the limit. 1.1 times as many positions are computed as are fed; 1.7 times if all rows stayed together."""
    begin, plain = tiny_model.image_spec.begin_id, type(tiny_model).text_logits

    def short(self, hidden):
        logits = plain(self, hidden).clone()
        logits[..., begin] = logits.max(-1).values + 1.5
        return logits

    monkeypatch.setattr(type(tiny_model), "text_logits", short)
    computed, real = [], batch.advance

    def counting(model, streams, embeds, active=None):
        if len(streams) == 1 and embeds[0].shape[1] == 1:  # text: pictures have other branches
            num_rows = len(embeds[0])
            computed.append((num_rows, num_rows if active is None else int(active.sum())))
        real(model, streams, embeds, active)

    monkeypatch.setattr(batch, "advance", counting)
    roll(tiny_model, guided_params, group=8)
    rows, fed = map(sum, zip(*computed, strict=True))
    assert fed <= rows <= 1.3 * fed


def test_sampled_documents_do_not_depend_on_the_rest_of_the_batch(tiny_model, guided_params):
    """Three prompts together or one after the other: each choice has the same random number, although rows are dropped on the way."""
    together = roll(tiny_model, guided_params)
    generator = torch.Generator().manual_seed(0)
    alone = [r for row in prompts(tiny_model) for r in sample(tiny_model, [row], guided_params, num_generations=6, generator=generator)]
    assert len({len(r.document.images) for r in together}) >= 3
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.row.text_ids, other.row.text_ids)
        assert torch.equal(one.row.codes, other.row.codes)


def test_with_a_generator_for_each_prompt_the_order_of_prompts_is_free(tiny_model, guided_params):
    rows = prompts(tiny_model)
    order = list(reversed(range(len(rows))))

    def sampled(which: list[int]) -> list:
        generators = [torch.Generator().manual_seed(100 + i) for i in which]
        return sample(tiny_model, [rows[i] for i in which], guided_params, num_generations=2, generator=generators)

    straight, reverse = sampled(list(range(len(rows)))), sampled(order)
    for place, i in enumerate(order):
        for member in range(2):
            one, other = straight[2 * i + member], reverse[2 * place + member]
            assert torch.equal(one.row.text_ids, other.row.text_ids)
            assert torch.equal(one.row.codes, other.row.codes)
    with pytest.raises(ValueError, match="1 generators were given for 3 prompts"):
        sample(tiny_model, rows[:3], guided_params, generator=[torch.Generator()])


@pytest.mark.gpu
def test_cuda_graphs_sample_what_plain_steps_sample(guided_params):
    model = load_model("storyboard").to("cuda")
    rows = [model.encode_prompt(Document((Text(words),))) for words in WORDS]
    params = guided_params.model_copy(update={"max_text_tokens": 24})
    found = [
        sample(model, rows, params, num_generations=4, generator=torch.Generator().manual_seed(3), graphs=graphs)
        for graphs in (False, True)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.row.text_ids, other.row.text_ids)
        assert torch.equal(one.row.codes, other.row.codes)


def test_same_seed_same_documents(tiny_model, guided_params):
    first, second, third = (roll(tiny_model, guided_params, seed=s) for s in (5, 5, 6))
    assert all(
        torch.equal(a.row.text_ids, b.row.text_ids) and torch.equal(a.row.codes, b.row.codes) for a, b in zip(first, second, strict=True)
    )
    assert any(len(a.row) != len(c.row) or not torch.equal(a.row.codes, c.row.codes) for a, c in zip(first, third, strict=True))


def test_gradient_reaches_only_chosen_positions(tiny_model, guided_params):
    rollouts = roll(tiny_model, guided_params)[:3]
    batch = collate([r.row for r in rollouts])
    values = score(tiny_model, batch, guided_params).logprobs
    assert torch.equal(values != 0, batch.choice_mask & (values != 0))
    forced = batch.text_mask & (batch.text_ids == tiny_model.image_spec.end_id)
    assert forced.any()
    assert not batch.completion_mask[forced].any()


def test_chunks_change_neither_values_nor_gradients(tiny_model, guided_params, monkeypatch):
    rollouts = roll(tiny_model, guided_params)[:6]
    batch = collate([r.row for r in rollouts])
    found = []
    for chunk in (2**24, 700):  # whole; 7 text tokens or 12 image positions at a time
        monkeypatch.setattr(scorer, "CHUNK_LOGITS", chunk)
        tiny_model.zero_grad()
        scores = score(tiny_model, batch, guided_params, entropy_gradient=True)
        (scores.logprobs.sum() + 0.3 * scores.entropy.sum()).backward()
        found.append((scores, {name: p.grad.clone() for name, p in tiny_model.named_parameters() if p.grad is not None}))
    (whole, gradients), (chunked, others) = found
    torch.testing.assert_close(chunked.logprobs, whole.logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(chunked.entropy, whole.entropy, atol=1e-5, rtol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-3, rtol=1e-4)
    tiny_model.zero_grad()


def test_chunks_bound_how_many_logits_exist(tiny_model, guided_params, monkeypatch):
    batch = collate([r.row for r in roll(tiny_model, guided_params)])
    seen = []
    right = scorer.log_distribution
    monkeypatch.setattr(scorer, "log_distribution", lambda logits, *a: (seen.append(logits.numel()), right(logits, *a))[1])
    monkeypatch.setattr(scorer, "CHUNK_LOGITS", 1000)
    score(tiny_model, batch, guided_params)
    assert len(seen) > 10
    assert max(seen) <= 1000


# --- distributions -------------------------------------------------------------------------------------------------------


def test_draw_follows_the_distribution():
    log_probs = torch.tensor([0.1, 0.2, 0.7]).log().expand(20_000, 3)
    uniforms = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = draw(log_probs, TextSampling(), uniforms)
    frequency = torch.bincount(tokens, minlength=3) / 20_000
    torch.testing.assert_close(frequency, torch.tensor([0.1, 0.2, 0.7]), atol=0.012, rtol=0)  # about 4 standard errors


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    top_k = log_distribution(logits, TextSampling(top_k=2)).exp()
    torch.testing.assert_close(top_k, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))  # 0.5 / 0.8, 0.3 / 0.8
    top_p = log_distribution(logits, TextSampling(top_p=0.6)).exp()  # 0.5 < 0.6, so the second is still needed
    torch.testing.assert_close(top_p, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))
    cool = log_distribution(torch.tensor([[0.0, 1.0]]), TextSampling(temperature=0.5)).exp()
    torch.testing.assert_close(cool, torch.softmax(torch.tensor([[0.0, 2.0]]), -1))


def test_illegal_tokens_are_never_sampled(tiny_model):
    rollouts = roll(tiny_model, SamplingParams(max_text_tokens=20), group=8)
    for rollout in rollouts:
        chosen = rollout.row.text_ids[rollout.row.completion_mask & (rollout.row.modality == Modality.TEXT)]
        assert not set(chosen.tolist()) & set(tiny_model.forbidden_text_ids())


def test_logits_that_are_not_finite_are_refused(tiny_model, guided_params, monkeypatch):
    right = type(tiny_model).image_step
    monkeypatch.setattr(type(tiny_model), "image_step", lambda self, *a: right(self, *a) * torch.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        roll(tiny_model, guided_params)


def test_a_draw_at_the_edges():
    """0 and the largest number below 1 fall on the first and the last token that has a share, never on one of probability 0."""
    log_probs = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log()
    edges = torch.tensor([0.0, 0.25 - 1e-9, 0.25, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(log_probs.expand(4, -1), TextSampling(), edges).tolist() == [1, 1, 3, 3]


# --- errors --------------------------------------------------------------------------------------------------------------


def test_prompt_too_long_for_the_context(tiny_model):
    with pytest.raises(ValueError, match="the prompt has 603 positions and the model's context 512"):
        tiny_model.encode_prompt(Document((Text("ball " * 600),)))
    with pytest.raises(ValueError, match="shorten the prompt or lower max_images or max_text_tokens"):
        sample(tiny_model, [tiny_model.encode_prompt(Document((Text("ball " * 400),)))], SamplingParams(), generator=torch.Generator())


def test_scoring_position_zero_is_refused(tiny_model):
    row = TokenRow.text([9, 10], tiny_model.image_spec.depth, chosen=True)
    with pytest.raises(ValueError, match="position 0"):
        score(tiny_model, collate([row]))


def test_engine_context_bound_is_reached_by_the_longest_answer(tiny_model):
    params = SamplingParams(max_images=2, max_text_tokens=5)
    assert engine.context_needed(tiny_model, params) == 3 * 5 + 2 * 10  # three texts of 5, two images of 9 + 1
    assert isinstance(collate(prompts(tiny_model)), TokenBatch)
