"""Decoders prepared for a phase of sampling on a CPU, during which their weights do not change.

A position of a small model is a few dozen small operations, which cost more by their number than by what they compute. Inside `prepared`
a Llama layer is written with fewer of them: queries, keys and values are one product, gate and up are one, rotation takes queries and
keys together, and what can be done in place is. Every number is computed as transformers computes it, but for the order of sums.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from diptych.models.products import FEWEST_ROWS, Prepared, available, fits

MOST_BYTES = 2**30  # weights are held twice while they are prepared


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Inside, the model's linear layers in float32 on the CPU multiply by oneDNN with weights laid out for it (where torch has oneDNN and
    they are small enough to be held twice), and what the model makes of weights alone (`UnifiedModel.tables`) is made once. Weights must
    not change inside."""
    changed = {} if torch.is_grad_enabled() else {**_tables(model), **_forwards(model)}
    before = {place: place[0].__dict__.get(place[1]) for place in changed}
    for (module, name), stand_in in changed.items():
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name), own in before.items():
            if own is None:
                delattr(module, name)
            else:
                setattr(module, name, own)


def _tables(model: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    """Not of a sharded model: outside `UnifiedModel.run` its weights are parts."""
    if getattr(model, "sharding", None) is not None:
        return {}
    made = {name: getattr(model, name)() for name in getattr(model, "tables", ())}
    return {(model, name): functools.partial(_as_it_is, table) for name, table in made.items()}


def _as_it_is(table: Tensor) -> Tensor:
    return table


def _forwards(model: nn.Module) -> dict[tuple[nn.Module, str], Any]:
    linear = [module for module in model.modules() if fits(module)] if available(model) else []
    if not linear or sum(layer.weight.nbytes for layer in linear) > MOST_BYTES:
        return {}
    changed: dict[nn.Module, Any] = {}
    inside: set[nn.Module] = set()
    for layer in model.modules():
        if type(layer) is LlamaDecoderLayer and all(map(fits, _products(layer))):
            changed[layer] = _LlamaStep(layer)
            inside |= set(_products(layer))
    for decoder in model.modules():
        if type(decoder) is LlamaModel and all(layer in changed for layer in decoder.layers):
            changed[decoder] = functools.partial(_decoded, decoder, _forward_of(decoder))
    changed |= {layer: functools.partial(_product, layer.weight, Prepared(layer.weight)) for layer in linear if layer not in inside}
    return {(module, "forward"): forward for module, forward in changed.items()}


def _forward_of(module: nn.Module) -> Any:
    return module.__dict__.get("forward") or functools.partial(type(module).forward, module)


def _products(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _product(weight: Tensor, ready: Prepared, states: Tensor) -> Tensor:
    if torch.is_grad_enabled() or states.numel() < FEWEST_ROWS * states.shape[-1] or states.dtype != torch.float32:
        return nn.functional.linear(states, weight)
    return ready(states)


def _decoded(decoder: Any, plain: Any, **named: Any) -> Any:
    """The forward of a `LlamaModel`, for positions that attend through a layout: its layers in turn, without transformers' masks and
    hooks."""
    states, positions, layout = named.get("inputs_embeds"), named.get("position_ids"), named.get("layout")
    if states is None or positions is None or layout is None:
        return plain(**named)
    tables = decoder.rotary_emb(states, position_ids=positions)
    for layer in decoder.layers:
        states = layer.forward(states, position_embeddings=tables, layout=layout)
    return BaseModelOutput(last_hidden_state=decoder.norm(states))


class _LlamaStep:
    """The forward of a `LlamaDecoderLayer`, for positions that attend through a layout."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.attention, self.activation = layer, layer.self_attn, layer.mlp.act_fn
        query, key, value, out, gate, up, down = (linear.weight for linear in _products(layer))
        self.width = self.attention.head_dim
        self.sizes = [weight.shape[0] // self.width for weight in (query, key, value)]  # heads
        self.inner = gate.shape[0]
        self.qkv, self.out = Prepared(torch.cat([query, key, value])), Prepared(out)
        self.gate_up, self.down = Prepared(torch.cat([gate, up])), Prepared(down)
        self.plain = _forward_of(layer)

    def __call__(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        layout, tables = named.get("layout"), named.get("position_embeddings")
        few = hidden_states.numel() < FEWEST_ROWS * hidden_states.shape[-1]
        if few or layout is None or tables is None or arguments or torch.is_grad_enabled() or hidden_states.dtype != torch.float32:
            return self.plain(hidden_states, *arguments, **named)
        size, length, _ = hidden_states.shape
        joined = self.qkv(_normed(self.layer.input_layernorm, hidden_states)).view(size, length, -1, self.width)
        turned, values = joined.split([self.sizes[0] + self.sizes[1], self.sizes[2]], 2)
        queries, keys = _rotated(turned, *tables).split(self.sizes[:2], 2)
        parts = (states.transpose(1, 2) for states in (queries, keys, values))  # (B, heads, T, head_dim)
        attended = layout.attend(self.attention, *parts, self.attention.scaling)
        hidden_states = self.out(attended.reshape(size, length, -1)).add_(hidden_states)
        gate, up = self.gate_up(_normed(self.layer.post_attention_layernorm, hidden_states)).split(self.inner, -1)
        inner = self.activation(gate.contiguous()).mul_(up)  # of a view, torch computes exponentials in another way
        return self.down(inner).add_(hidden_states)


def _normed(norm: Any, states: Tensor) -> Tensor:
    """As `LlamaRMSNorm`, in float32."""
    scale = states.square().mean(-1, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (states * scale).mul_(norm.weight)


def _rotated(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of states (B, T, heads, head_dim); tables (B or 1, T, head_dim)."""
    first, second = states.chunk(2, -1)
    return (states * cosines[:, :, None]).add_(torch.cat([-second, first], -1).mul_(sines[:, :, None]))
