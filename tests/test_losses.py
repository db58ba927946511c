from __future__ import annotations

import math

import pytest
import torch

from diptych.training.losses import LOSSES, Counts, ModalityTerms, PolicyBatch, kl_to_reference, policy_loss

TEXT = ModalityTerms(weight=1.5, epsilon=0.2, epsilon_high=0.3, beta=0.05)
IMAGE = ModalityTerms(weight=0.5, epsilon=0.1, epsilon_high=0.15, beta=0.02)


def make_batch(seed: int = 0, spread: float = 0.5) -> PolicyBatch:
    g = torch.Generator().manual_seed(seed)
    b, t, d = 4, 6, 2
    image_mask = torch.rand(b, t, generator=g) < 0.5
    chosen = torch.rand(b, t, generator=g) < 0.8
    choice = chosen[..., None] & (image_mask[..., None] | (torch.arange(d) == 0))
    old = -torch.rand(b, t, d, generator=g) * 3
    new = (old + spread * torch.randn(b, t, d, generator=g)).requires_grad_()
    ref = old + 0.3 * torch.randn(b, t, d, generator=g)
    return PolicyBatch(new, old, ref, torch.randn(b, t, generator=g), choice, image_mask, torch.rand(b, t, d, generator=g))


def counts_of(batch: PolicyBatch) -> Counts:
    return Counts(len(batch.logprobs), int(batch.choice_mask.sum()), 50)


def plain_loop(batch: PolicyBatch, loss_type: str) -> float:
    """Every formula written out with floats."""
    total = 0.0
    size = [int(batch.choice_mask[i].sum()) for i in range(len(batch.logprobs))]
    for i, t, d in batch.choice_mask.nonzero().tolist():
        terms = IMAGE if batch.image_mask[i, t] else TEXT
        new, old, ref = (float(x[i, t, d]) for x in (batch.logprobs, batch.old_logprobs, batch.ref_logprobs))
        advantage = float(batch.advantages[i, t])
        ratio = math.exp(new - old)
        if loss_type == "gspo":
            where = batch.choice_mask[i].nonzero().tolist()
            ratio = math.exp(sum(float(batch.logprobs[i, a, b] - batch.old_logprobs[i, a, b]) for a, b in where) / len(where))
        if loss_type == "cispo":
            objective = min(ratio, 1 + terms.epsilon_high) * advantage * new
        else:
            clipped = min(max(ratio, 1 - terms.epsilon), 1 + terms.epsilon_high)
            objective = min(ratio * advantage, clipped * advantage)
        loss = -objective + terms.beta * (math.exp(ref - new) - (ref - new) - 1)
        if loss_type in ("grpo", "gspo"):
            weight = 1 / size[i] / len(size)
        elif loss_type in ("dapo", "cispo"):
            weight = 1 / sum(size)
        else:
            weight = 1 / (len(size) * 50)
        total += terms.weight * weight * loss
    return total


@pytest.mark.parametrize("loss_type", LOSSES)
def test_values_equal_plain_loops(loss_type):
    batch = make_batch()
    loss, _ = policy_loss(batch, loss_type, TEXT, IMAGE, counts_of(batch))
    assert loss.item() == pytest.approx(plain_loop(batch, loss_type), rel=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])  # gspo and cispo define their gradient: tests below
def test_gradients_equal_finite_differences(loss_type):
    batch = make_batch(spread=0.02)  # inside the clip range, where the loss has no kinks
    double = {k: v.detach().double() if v.dtype == torch.float32 else v for k, v in vars(batch).items()}

    def value(new: torch.Tensor) -> torch.Tensor:
        return policy_loss(PolicyBatch(**{**double, "logprobs": new}), loss_type, TEXT, IMAGE, counts_of(batch))[0]

    new = double["logprobs"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(new), new)
    step = 1e-6
    for index in map(tuple, batch.choice_mask.nonzero().tolist()):
        up, down = new.detach().clone(), new.detach().clone()
        up[index] += step
        down[index] -= step
        numeric = float(value(up) - value(down)) / (2 * step)
        assert float(gradient[index]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_cispo_keeps_the_gradient_of_clipped_choices():
    batch = make_batch(spread=2.0)
    counts = counts_of(batch)
    free = ModalityTerms()
    (gradient,) = torch.autograd.grad(policy_loss(batch, "cispo", free, free, counts)[0], batch.logprobs)
    for i, t, d in batch.choice_mask.nonzero().tolist():
        ratio = math.exp(float(batch.logprobs[i, t, d] - batch.old_logprobs[i, t, d]))
        expected = -min(ratio, 1.2) * float(batch.advantages[i, t]) / counts.num_choices
        assert float(gradient[i, t, d]) == pytest.approx(expected, rel=1e-4)


def test_gspo_gradient_is_that_of_the_sequence_ratio():
    """With one advantage per rollout and no clipping, the gradient is d/dx of ratio * A."""
    batch = make_batch(spread=0.05)
    same = PolicyBatch(**{**vars(batch), "advantages": batch.advantages[:, :1].expand(-1, 6), "ref_logprobs": None})
    free = ModalityTerms(epsilon=10, epsilon_high=10)
    (gradient,) = torch.autograd.grad(policy_loss(same, "gspo", free, free, counts_of(batch))[0], batch.logprobs)
    mask = batch.choice_mask
    difference = (batch.logprobs - batch.old_logprobs) * mask
    ratio = (difference.sum((1, 2)) / mask.sum((1, 2))).exp()
    (expected,) = torch.autograd.grad(-(ratio * same.advantages[:, 0]).mean(), batch.logprobs)
    torch.testing.assert_close(gradient, expected)


def test_equal_rewards_give_zero_gradient_and_masked_choices_get_none():
    batch = make_batch()
    zero = PolicyBatch(**{**vars(batch), "advantages": torch.zeros(4, 6), "ref_logprobs": None})
    free = ModalityTerms()
    for loss_type in LOSSES:
        (gradient,) = torch.autograd.grad(policy_loss(zero, loss_type, free, free, counts_of(batch))[0], batch.logprobs)
        assert not gradient.any()
        (gradient,) = torch.autograd.grad(policy_loss(batch, loss_type, TEXT, IMAGE, counts_of(batch))[0], batch.logprobs)
        assert not gradient[~batch.choice_mask].any()
        assert gradient[batch.choice_mask].any()


@pytest.mark.parametrize("loss_type", LOSSES)
def test_micro_batches_cannot_change_the_gradient(loss_type):
    batch = make_batch()
    counts = counts_of(batch)
    (whole,) = torch.autograd.grad(policy_loss(batch, loss_type, TEXT, IMAGE, counts)[0], batch.logprobs)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = PolicyBatch(*(x[rows] for x in vars(batch).values()))
        parts.append(torch.autograd.grad(policy_loss(part, loss_type, TEXT, IMAGE, counts)[0], batch.logprobs)[0])
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_fault_clip_configured_but_inert():
    """A ratio beyond the range with the advantage pushing further has no gradient, and is counted."""
    old = torch.zeros(1, 2, 1)
    new = torch.tensor([[[0.5], [-0.5]]], requires_grad=True)  # ratios 1.65 and 0.61
    ones = torch.ones(1, 2, dtype=torch.bool)
    batch = PolicyBatch(new, old, None, torch.tensor([[1.0, -1.0]]), ones[..., None], ~ones, torch.zeros(1, 2, 1))
    loss, sums = policy_loss(batch, "grpo", ModalityTerms(), ModalityTerms(), Counts(1, 2, 2))
    loss.backward()
    assert not new.grad.any()
    assert sums["text/clipped"] == 2
    wide = ModalityTerms(epsilon=0.9, epsilon_high=0.9)
    loss, sums = policy_loss(batch, "grpo", wide, wide, Counts(1, 2, 2))
    assert torch.autograd.grad(loss, new)[0].all()
    assert sums["text/clipped"] == 0


def test_each_modality_has_its_own_terms():
    batch = make_batch()
    counts = counts_of(batch)
    off = ModalityTerms(weight=0.0)
    (gradient,) = torch.autograd.grad(policy_loss(batch, "dapo", TEXT, off, counts)[0], batch.logprobs)
    assert not gradient[batch.image_mask].any()
    assert gradient[~batch.image_mask].any()


def test_kl_by_hand():
    # d = ref - new = ln 2: 2 - ln 2 - 1
    value = kl_to_reference(torch.tensor(-1.0), torch.tensor(-1.0 + math.log(2)))
    assert float(value) == pytest.approx(1 - math.log(2))


def test_entropy_bonus_raises_entropy():
    logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
    log_dist = logits.log_softmax(-1)
    entropy = -(log_dist.exp() * log_dist).sum(-1).reshape(1, 1, 1)
    new = log_dist[:, :1].reshape(1, 1, 1)
    one = torch.ones(1, 1, dtype=torch.bool)
    batch = PolicyBatch(new, new.detach(), None, torch.zeros(1, 1), one[..., None], ~one, entropy)
    terms = ModalityTerms(entropy_coef=1.0)
    loss, _ = policy_loss(batch, "grpo", terms, terms, Counts(1, 1, 1))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0] > 0  # descending lowers the larger logit


def test_errors():
    batch = make_batch()
    with pytest.raises(ValueError, match="allowed are grpo, dapo, dr_grpo, gspo, cispo"):
        policy_loss(batch, "ppo", TEXT, IMAGE, counts_of(batch))
    bare = PolicyBatch(**{**vars(batch), "ref_logprobs": None})
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        policy_loss(bare, "grpo", TEXT, IMAGE, counts_of(batch))
