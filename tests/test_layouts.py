"""The KV cache and packed rows against each sequence alone, in plain causal attention."""

from __future__ import annotations

import pytest
import torch
from family_data import prompts

from diptych.models import UnifiedModel, load_model
from diptych.models.attention import FEW, CacheAttention, KVCache, StepAttention, attention, new_buffer
from diptych.models.packing import pack
from diptych.tokens import TokenRow, collate


def alone(model: UnifiedModel, row: TokenRow) -> torch.Tensor:
    """(T, H)"""
    batch = collate([row])
    return model.backbone(model.embed(batch), batch.position_ids, batch.attention_mask)[0]


def row_of(model: UnifiedModel, words: list[int]) -> TokenRow:
    return TokenRow.text([1 + word % (model.vocab_size - 1) for word in words], model.image_spec.depth)


def some_rows(model: UnifiedModel) -> tuple[list[TokenRow], list[int]]:
    """Two groups that share a prompt of 4 and of 7, one sequence of its own, two that are equal, one without a prompt."""
    heads = [row_of(model, [5, 6, 7, 8]), row_of(model, [9, 3, 5, 6, 7, 8, 2])]
    tails = [[11], [12, 13, 14], [15, 16], [11, 12, 13, 14, 15, 16], [17, 18], [12, 13, 14]]
    rows = [TokenRow.concat([heads[i % 2], row_of(model, tail)]) for i, tail in enumerate(tails)]
    rows += [rows[1], row_of(model, [20, 21, 22]), row_of(model, [30, 31])]
    return rows, [4, 7, 4, 7, 4, 7, 7, 1, 0]


@pytest.fixture
def model(models, family, tiny_model) -> UnifiedModel:
    return tiny_model if family == "storyboard" else models[family]


def test_packed_states_and_gradients_equal_those_of_each_sequence_alone(model):
    rows, beginnings = some_rows(model)
    weights = [torch.randn(len(row), 1, generator=torch.Generator().manual_seed(i)) for i, row in enumerate(rows)]
    found = []
    for packed in (False, True):
        model.zero_grad()
        if packed:
            whole = pack(rows, beginnings, model.device)
            flat = model.backbone(model.embed(whole.batch), whole.batch.position_ids, whole.layout)[0]
            states = [flat[place] for place in whole.place]
            assert len(flat) == 4 + 7 + sum(len(row) - b for row, b in zip(rows[:7], beginnings, strict=False)) + 3 + 2
        else:
            states = [alone(model, row) for row in rows]
        sum((s * w).sin().sum() for s, w in zip(states, weights, strict=True)).backward()
        found.append((states, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (together, others) = found
    for a, b in zip(plain, together, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-5 + 1e-4 * float(gradient.abs().max()), rtol=1e-4)
    model.zero_grad()


def test_a_common_prompt_with_pictures_is_one_object_and_stands_once(models):
    """Janus reads pictures as features: rows that hold the same objects share them, equal pictures elsewhere do not."""
    janus = models["janus"]
    first, second = janus.encode_prompt(prompts()[1]), janus.encode_prompt(prompts()[1])
    rows = [TokenRow.concat([prompt, row_of(janus, [5, 6, i])]) for i, prompt in enumerate((first, first, second))]
    whole = pack(rows, [len(first)] * 3, janus.device)
    assert whole.batch.text_ids.shape[1] == 2 * len(first) + 9
    with torch.no_grad():
        flat = janus.backbone(janus.embed(whole.batch), whole.batch.position_ids, whole.layout)[0]
        for row, place in zip(rows, whole.place, strict=True):
            torch.testing.assert_close(flat[place], alone(janus, row), atol=2e-5, rtol=0)


def test_packing_pads_no_position():
    model = load_model("storyboard")
    rows = [row_of(model, list(range(n))) for n in range(1, 48)]
    whole = pack(rows, [0] * len(rows), model.device)
    assert whole.batch.text_ids.shape[1] == sum(map(len, rows))
    assert whole.batch.attention_mask.all()
    assert torch.equal(torch.cat(whole.place).sort().values, torch.arange(sum(map(len, rows))))


@torch.no_grad()
def test_a_cache_with_holes_selected_rows_and_several_blocks_equal_each_sequence_alone(model):
    """Two blocks in one pass, one of them with rows that wait; rows dropped and repeated in between; buffers that grow."""
    prompt_rows = [row_of(model, [5, 6, 7]), row_of(model, [8, 9])]
    other_rows = [row_of(model, [40, 41, 42, 43, 44])]
    blocks = [KVCache(2, model.device), KVCache(1, model.device)]
    said: list[list[TokenRow]] = [list(prompt_rows), list(other_rows)]
    for block, rows in zip(blocks, (prompt_rows, other_rows), strict=True):
        batch = collate(rows)
        layout = CacheAttention([block], batch.text_ids.shape[1], [None if len(rows) == 1 else batch.attention_mask])
        model.backbone(model.embed(batch), batch.position_ids, layout)
        layout.finish()
    for block, order, rows in zip(blocks, ([0, 0, 1], [0, 0]), range(2), strict=True):
        block.select(torch.tensor(order), room=1)
        said[rows] = [said[rows][i] for i in order]
    pattern = [[True, False, True], [False, True, True], [True, True, True], [True, True, False]]
    for step, active in enumerate(pattern):
        layout = CacheAttention(blocks, 2, [torch.tensor(active)[:, None].expand(-1, 2), None])
        new = [[row_of(model, [50 + 9 * step + i, 51 + 9 * step + i]) for i in range(len(rows))] for rows in said]
        positions = torch.tensor([len(row) for rows in said for row in rows])[:, None] + torch.arange(2)
        states = model.backbone(model.embed_text(torch.stack([r.text_ids for rows in new for r in rows])), positions, layout)
        layout.finish()
        grown = [[TokenRow.concat([a, b]) for a, b in zip(rows, more, strict=True)] for rows, more in zip(said, new, strict=True)]
        for row, state, goes_on in zip([*grown[0], *grown[1]], states, [*active, True, True], strict=True):
            if goes_on:
                torch.testing.assert_close(state, alone(model, row)[-2:], atol=3e-5, rtol=0)
        said[0] = [new_row if goes_on else row for row, new_row, goes_on in zip(said[0], grown[0], active, strict=True)]
        said[1] = grown[1]
    assert not blocks[0].full
    assert blocks[1].full
    assert blocks[1].visible(None, 1) is None


@torch.no_grad()
def test_a_cache_that_was_copied_and_put_back_equals_each_sequence_alone(tiny_model):
    """Three rows, of which two go on by themselves; a hole before that and unused memory that holds NaN; then all in another order; few
    holes stay, many are closed."""
    said = [row_of(tiny_model, words) for words in ([5, 6, 7], [8, 9], [10, 11, 12, 13])]
    cache = KVCache(3, tiny_model.device)
    batch = collate(said)
    layout = CacheAttention([cache], 4, [batch.attention_mask])
    tiny_model.backbone(tiny_model.embed(batch), batch.position_ids, layout)
    layout.finish()

    def feed(which: KVCache, rows: list[int], active: list[bool]) -> None:
        layout = CacheAttention([which], 1, [torch.tensor(active)[:, None]])
        new = [row_of(tiny_model, [60 + 3 * row + len(said[row])]) for row in rows]
        positions = torch.tensor([[len(said[row])] for row in rows])
        states = tiny_model.backbone(tiny_model.embed_text(torch.stack([n.text_ids for n in new])), positions, layout)
        layout.finish()
        for row, more, state, goes_on in zip(rows, new, states, active, strict=True):
            if goes_on:
                said[row] = TokenRow.concat([said[row], more])
                torch.testing.assert_close(state, alone(tiny_model, said[row])[-1:], atol=3e-5, rtol=0)

    feed(cache, [0, 1, 2], [True, False, True])
    cache.reserve(20)
    for buffer in (*cache._keys, *cache._values):
        buffer[:, :, cache.length :] = torch.nan
    places = [buffer.data_ptr() for buffer in cache._keys]
    cache.select(torch.arange(3), room=1)
    assert places == [buffer.data_ptr() for buffer in cache._keys]  # all rows as they are, few holes, and room: nothing to do
    assert not {buffer.data_ptr() for buffer in cache.copy(torch.arange(3), room=1)._keys} & set(places)  # a copy of all shares none
    picked = torch.tensor([0, 1])
    branch = cache.copy(picked, room=2)
    assert (branch.length, cache.length) == (5, 5)  # one slot of five holds nothing of the two: moving the others is not worth it
    feed(branch, [0, 1], [True, True])
    feed(branch, [0, 1], [False, True])
    cache.put_back(branch, picked, 2)
    feed(cache, [0, 1, 2], [True, True, True])
    order = [2, 0, 1]
    cache.select(torch.tensor(order), room=1)
    assert cache.length == max(map(len, said)) == 6  # of eight slots: no holes
    assert cache.occupied.sum(1).tolist() == [len(said[row]) for row in order]
    feed(cache, order, [True, True, True])


@torch.no_grad()
def test_rows_that_wait_make_holes_in_the_cache_of_their_stream_alone(tiny_model):
    blocks = [KVCache(2, tiny_model.device), KVCache(1, tiny_model.device)]
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    layout = CacheAttention(blocks, 3, [None, None])
    tiny_model.backbone(tiny_model.embed_text(ids), torch.arange(3)[None], layout)
    layout.finish()
    assert [block.full for block in blocks] == [True, True]
    steps = StepAttention(blocks, 2)
    for active, full in (([True, True, True], [True, True]), ([True, False, True], [False, True])):
        steps.begin()
        tiny_model.backbone(tiny_model.embed_text(ids[:, :1]), torch.full((3, 1), blocks[0].length), steps)
        steps.finish(torch.tensor(active))
        steps.count(all(active))
        assert [block.full for block in blocks] == full
        assert [bool(block.occupied.all()) for block in blocks] == full


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("num_positions", [1, 2, FEW, FEW + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_a_buffer_is_that_of_double_precision(groups, num_positions, masked):
    """Few positions by products over slots that lie last in memory, more by the fused kernel; 6 heads that share keys and values."""
    slots = 37
    keys, values = (new_buffer(torch.empty(5, groups, 1, 16), 5, 50)[:, :, :slots].normal_() for _ in range(2))
    query = torch.randn(5, 6, num_positions, 16)
    mask = torch.rand(5, 1, num_positions, slots) < 0.6 if masked else None
    if mask is not None:
        mask[..., 3] = True  # a position sees itself at least
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // groups, False
    found = attention(module, query, keys, values, mask, 0.3)
    scores = 0.3 * query.double() @ keys.double().repeat_interleave(6 // groups, 1).transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ values.double().repeat_interleave(6 // groups, 1)).transpose(1, 2)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
