"""Products by oneDNN and prepared decoders: the same numbers as the plain way, in sampling, scoring and gradients."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from diptych.config import ImageSampling, SamplingParams
from diptych.document import Document, Text
from diptych.models import load_model, products
from diptych.models.attention import accept_layouts
from diptych.models.steps import _LlamaStep, prepared
from diptych.sampling import engine, logprobs
from diptych.sampling.engine import sample
from diptych.sampling.logprobs import score
from diptych.tokens import collate

pytestmark = pytest.mark.skipif(not products.available(), reason="torch was built without oneDNN")
CLOSE = {"rtol": 1e-5, "atol": 1e-4}  # of sums of up to a thousand terms of size 1, in another order


@pytest.fixture(scope="module")
def model():
    return load_model("storyboard")


def drawn(model, num_generations=4):
    params = SamplingParams(image=ImageSampling(guidance_scale=1.5), max_images=2, max_text_tokens=20)
    texts = ("tell the story . on the left a small red ball , at night . first the ball grows .", "draw this . a small red ball .")
    rows = [model.encode_prompt(Document((Text(text),))) for text in texts]
    return sample(model, rows, params, num_generations=num_generations, generator=torch.Generator().manual_seed(3)), params


@pytest.mark.parametrize("width", [1, 7, 96, 192, 193, 257, 384, 385, 432, 1000])
def test_products_are_those_of_double_precision(width):
    states, weight = torch.randn(3, 50, width), torch.randn(40, width)
    expected = torch.einsum("abk,ok->abo", states.double(), weight.double())
    for found in (products.product(states, weight), products.Prepared(weight)(states)):
        torch.testing.assert_close(found.double(), expected, **CLOSE)


@pytest.mark.parametrize(("rows", "width", "out"), [(4, 160, 480), (200, 432, 160), (193, 160, 99), (3001, 384, 96), (1000, 700, 32)])
def test_products_of_transposed_matrices_are_as_exact_as_those_of_torch(rows, width, out):
    """As a backward pass takes them. Each sum is off by a few float32 roundings at most; torch's own by about half as many."""
    states, weight, gradient = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
    for one, other in ((states, weight), (gradient, weight.t()), (gradient.t(), states.t())):
        exact = one.double() @ other.double().t()
        errors = [float((found.double() - exact).norm() / exact.norm()) for found in (products.product(one, other), one @ other.t())]
        assert errors[0] < 1e-6
        assert errors[0] < 4 * errors[1]


def test_gradients_are_those_of_double_precision():
    layer, plain = nn.Linear(432, 160, bias=False), nn.Linear(432, 160, bias=False).double()
    plain.weight.data.copy_(layer.weight)
    products.use(layer)
    states, weights = torch.randn(2, 150, 432, requires_grad=True), torch.randn(2, 150, 160)
    other = states.detach().double().requires_grad_()
    (layer(states) * weights).sum().backward()
    (plain(other) * weights.double()).sum().backward()
    torch.testing.assert_close(states.grad.double(), other.grad, **CLOSE)
    torch.testing.assert_close(layer.weight.grad.double(), plain.weight.grad, rtol=1e-5, atol=2e-4)


def test_a_copy_of_a_model_in_use_has_weights_of_its_own():
    layer = nn.Sequential(nn.Linear(8, 8, bias=False))
    products.use(layer)
    other, states = copy.deepcopy(layer), torch.randn(200, 8)
    other[0].weight.data.zero_()
    assert not other(states).any()
    assert layer(states).all()


def test_other_layers_are_left_alone():
    class Own(nn.Linear):
        pass

    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False).bfloat16(), Own(8, 8, bias=False)])
    products.use(layers)
    with torch.no_grad(), prepared(layers):
        assert not any("forward" in layer.__dict__ for layer in layers)


@pytest.mark.parametrize("rows", [1, 3, 4, 130])
def test_a_prepared_decoder_layer_gives_what_transformers_gives(model, rows):
    accept_layouts(model.llama.config)
    layer, states = model.llama.layers[1], torch.randn(rows, 1, 160)
    positions = torch.arange(rows)[:, None]

    class Own:  # attends to itself and a constant
        def attend(self, module, query, key, value, scaling):
            weight = ((query * key).sum(-1, keepdim=True) * scaling).sigmoid()
            return (weight * value).transpose(1, 2)

    named = {"position_embeddings": model.llama.rotary_emb(states, positions), "position_ids": positions, "layout": Own()}
    with torch.no_grad():
        torch.testing.assert_close(_LlamaStep(layer)(states, **named), layer(states, **named), **CLOSE)


def test_sampling_and_scoring_are_the_same_as_the_plain_way(model, monkeypatch):
    """Same documents under the same seed; log-probabilities as near as float32 is."""
    found, params = drawn(model)
    batch = collate([rollout.row for rollout in found])
    with torch.no_grad():
        scores = score(model, batch, params)
    for module in (engine, logprobs):
        monkeypatch.setattr(module, "prepared", lambda _: contextlib.nullcontext())
    plain, _ = drawn(model)
    with torch.no_grad():
        plain_scores = score(model, batch, params)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.row.text_ids, other.row.text_ids)
        assert torch.equal(one.row.codes, other.row.codes)
        torch.testing.assert_close(one.rollout_logprobs, other.rollout_logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores.logprobs, plain_scores.logprobs, rtol=0, atol=1e-4)


def test_gradients_of_a_score_are_those_of_the_plain_way(model):
    found, params = drawn(model)
    batch = collate([rollout.row for rollout in found])
    gradients = []
    for use in (products.use, lambda _: None):
        own = copy.deepcopy(model)
        for module in own.modules():
            module.__dict__.pop("forward", None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(logprobs, "use", use)
            score(own, batch, params).logprobs.sum().backward()
        assert ("forward" in own.lm_head.__dict__) == (use is products.use)
        gradients.append({name: p.grad for name, p in own.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    whole = torch.stack([gradient.norm() for gradient in gradients[1].values()]).norm()
    for name, gradient in gradients[0].items():  # sums in another order
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * gradients[1][name].norm() + 1e-7 * whole, name


def test_weights_that_change_between_two_phases_are_read_again(model):
    own = copy.deepcopy(model)
    before, _ = drawn(own, 1)
    with torch.no_grad():
        own.depth_tie.neg_()
    other_pictures, _ = drawn(own, 1)
    assert any(not torch.equal(one.row.codes, other.row.codes) for one, other in zip(before, other_pictures, strict=True))
    with torch.no_grad():
        own.lm_head.weight.zero_()
    after, _ = drawn(own, 1)
    assert any(not torch.equal(one.row.text_ids, other.row.text_ids) for one, other in zip(before, after, strict=True))
    assert not any({"forward", "_depth_outputs"} & set(module.__dict__) for module in own.modules())


def test_what_the_model_makes_of_weights_alone_is_made_once_for_a_sampling(model, monkeypatch):
    made, own = [], type(model)._depth_outputs
    monkeypatch.setattr(type(model), "_depth_outputs", lambda self: made.append(0) or own(self))
    drawn(model)
    assert len(made) == 1
