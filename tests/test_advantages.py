from __future__ import annotations

import statistics

import pytest
import torch

from diptych.config import AdvantageConfig, RewardConfig
from diptych.rewards import RewardBatch
from diptych.tokens import Modality, TokenRow, collate
from diptych.training import advantages as adv
from diptych.training.credit import document_rewards, token_advantages

NAN = float("nan")


def test_group_advantages_by_hand():
    # group 0: 1, 3 -> mean 2, unbiased std sqrt(2); group 1: equal rewards -> zero
    rewards, groups = torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    result = adv.group_advantages(rewards, torch.ones(4, dtype=torch.bool), groups)
    expected = 1 / (2**0.5 + 1e-4)
    torch.testing.assert_close(result, torch.tensor([-expected, expected, 0.0, 0.0]))
    assert adv.group_advantages(rewards, torch.ones(4, dtype=torch.bool), groups, scale=False).tolist() == [-1, 1, 0, 0]


def test_missing_rewards_enter_no_mean():
    rewards, valid = torch.tensor([1.0, 3.0, NAN]), torch.tensor([True, True, False])
    result = adv.group_advantages(rewards, valid, torch.zeros(3, dtype=torch.long))
    without = adv.group_advantages(rewards[:2], valid[:2], torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(result, torch.cat([without, torch.zeros(1)]))


def test_process_supervision_equals_plain_loops():
    """Independent reference with the statistics module: one mean and std over all steps of the group, later steps add up."""
    torch.manual_seed(0)
    rewards = torch.randn(6, 4)
    lengths = [4, 2, 3, 1, 4, 3]
    valid = torch.arange(4) < torch.tensor(lengths)[:, None]
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    result = adv.collect_later_steps(adv.normalize_steps(rewards, valid, groups))
    for group in (0, 1):
        members = [i for i in range(6) if groups[i] == group]
        pool = [float(rewards[i, j]) for i in members for j in range(lengths[i])]
        mean, std = statistics.mean(pool), statistics.stdev(pool)
        for i in members:
            for j in range(lengths[i]):
                expected = sum((float(rewards[i, k]) - mean) / (std + 1e-4) for k in range(j, lengths[i]))
                assert float(result[i, j]) == pytest.approx(expected, abs=1e-5)


def test_normalising_per_step_index_compares_like_with_like():
    rewards = torch.tensor([[1.0, 10.0], [3.0, 20.0]])
    result = adv.normalize_steps(rewards, torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, dtype=torch.long), over="step", scale=False)
    assert result.tolist() == [[-1, -5], [1, 5]]
    with pytest.raises(ValueError, match="allowed are 'group' and 'step'"):
        adv.normalize_steps(rewards, rewards > 0, torch.zeros(2, dtype=torch.long), over="batch")


def test_discount_by_hand():
    values = torch.tensor([[1.0, 2.0, 4.0]])
    assert adv.collect_later_steps(values, 0.5).tolist() == [[3.0, 4.0, 4.0]]  # 1 + 0.5 * (2 + 0.5 * 4)
    assert adv.collect_later_steps(values, 1.0).tolist() == [[7.0, 6.0, 4.0]]
    assert adv.collect_later_steps(values, 0.0).tolist() == values.tolist()


def test_members_of_a_group_permute():
    torch.manual_seed(1)
    rewards, groups = torch.randn(8), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    order = torch.randperm(8)
    ok = torch.ones(8, dtype=torch.bool)
    torch.testing.assert_close(adv.group_advantages(rewards, ok, groups)[order], adv.group_advantages(rewards[order], ok, groups[order]))


def test_a_step_with_a_missing_reward_is_masked_out():
    rewards = torch.tensor([[[1.0, 2.0]], [[NAN, 3.0]]])  # two rewards, one document of two steps
    applies = torch.ones(2, 1, 2, dtype=torch.bool)
    values, valid = adv.combine_steps(rewards, applies, torch.tensor([1.0, 2.0]))
    assert valid.tolist() == [[False, True]]
    assert float(values[0, 1]) == 2 + 2 * 3
    applies[1, 0, 0] = False  # the missing value says nothing about this step
    assert adv.combine_steps(rewards, applies, torch.ones(2))[1].tolist() == [[True, True]]


def _batch() -> tuple:
    """Two documents: prompt, a text step (0), an image step (1)."""
    rows = []
    for words in (2, 3):
        rows.append(
            TokenRow.concat([
                TokenRow.text([5], 2),
                TokenRow.text([6] * words, 2, chosen=True, step=0),
                TokenRow.image(torch.zeros(2, 2, dtype=torch.long), chosen=True, step=1),
            ])
        )  # fmt: skip
    rewards = RewardBatch(
        steps=torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.2], [0.0, 0.8]]]),  # text critic, then image reward
        applies=torch.tensor([[[True, False], [True, False]], [[False, True], [False, True]]]),
        documents=torch.zeros(2, 2), documents_apply=torch.zeros(2, 2, dtype=torch.bool), missing={}, errors={},
    )  # fmt: skip
    return collate(rows), rewards


def test_token_advantages_by_modality():
    batch, rewards = _batch()
    configs = (RewardConfig(name="text_critic", modality="text"), RewardConfig(name="image_text", modality="image"))
    config = AdvantageConfig(credit="process", normalize="step", scale_rewards=False)
    result = token_advantages(rewards, configs, torch.zeros(2, dtype=torch.long), batch, config)
    assert result[:, 0].tolist() == [0, 0]  # prompt
    torch.testing.assert_close(result[0, 1:5], torch.tensor([-0.5, -0.5, -0.3, -0.3]))
    torch.testing.assert_close(result[1, 1:6], torch.tensor([0.5, 0.5, 0.5, 0.3, 0.3]))
    assert (batch.modality[0] == Modality.PAD).sum() == 1
    both = token_advantages(
        rewards, tuple(c.model_copy(update={"modality": "both"}) for c in configs), torch.zeros(2, dtype=torch.long), batch, config
    )
    torch.testing.assert_close(both[0, 1:5], torch.tensor([-0.8, -0.8, -0.3, -0.3]))  # text collects the later picture


def test_outcome_is_the_mean_over_steps_and_reaches_every_token():
    batch, rewards = _batch()
    configs = (RewardConfig(name="text_critic"), RewardConfig(name="image_text", weight=2.0))
    config = AdvantageConfig(credit="outcome", scale_rewards=False)
    result = token_advantages(rewards, configs, torch.zeros(2, dtype=torch.long), batch, config)
    # totals 0 + 2 * 0.2 = 0.4 and 1 + 2 * 0.8 = 2.6; mean 1.5
    torch.testing.assert_close(result[0, 1:5], torch.full((4,), -1.1))
    torch.testing.assert_close(result[1, 1:6], torch.full((5,), 1.1))
    halfway = config.model_copy(update={"credit": "mixed", "outcome_share": 0.5})
    process = config.model_copy(update={"credit": "process"})
    groups = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(
        token_advantages(rewards, configs, groups, batch, halfway),
        0.5 * result + 0.5 * token_advantages(rewards, configs, groups, batch, process),
    )


def test_normalize_then_sum_gives_each_reward_the_same_say():
    batch, rewards = _batch()
    configs = (RewardConfig(name="text_critic"), RewardConfig(name="image_text", weight=100.0, scale=1.0))
    config = AdvantageConfig(credit="outcome", aggregation="normalize_then_sum")
    result = token_advantages(rewards, configs, torch.zeros(2, dtype=torch.long), batch, config)
    unit_text, unit_image = 0.5 / (0.5**0.5 + 1e-4), 0.3 / (0.6 / 2**0.5 + 1e-4)
    assert float(result[1, 1]) == pytest.approx(unit_text + 100 * unit_image, rel=1e-5)


def test_saying_nothing_is_not_zero_and_missing_is_not_zero():
    """Three documents of one group: rewarded 1, not spoken of (None), missing (NaN); then one rewarded 3."""
    steps = torch.zeros(1, 4, 1)
    documents = torch.tensor([[1.0, 0.0, NAN, 3.0]])
    apply = torch.tensor([[True, False, True, True]])
    values, speaks, missing = document_rewards(steps, torch.zeros(1, 4, 1, dtype=torch.bool), documents, apply)
    assert values.tolist() == [[1, 0, 0, 3]]
    assert speaks.tolist() == [[True, False, True, True]]
    assert missing.tolist() == [[False, False, True, False]]
    rows = [TokenRow.concat([TokenRow.text([5], 1), TokenRow.text([6], 1, chosen=True, step=0)]) for _ in range(4)]
    rewards = RewardBatch(steps, torch.zeros(1, 4, 1, dtype=torch.bool), documents, apply, {}, {})
    for credit in ("outcome", "process", "mixed"):
        config = AdvantageConfig(credit=credit, scale_rewards=False)
        result = token_advantages(rewards, (RewardConfig(name="a"),), torch.zeros(4, dtype=torch.long), collate(rows), config)
        assert result[:, 1].tolist() == [-1, 0, 0, 1]  # mean of 1 and 3 is 2
