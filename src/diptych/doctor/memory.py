"""GPU memory that a model needs, from its sizes alone. Estimates: what is not counted is named in each docstring."""

from __future__ import annotations

import dataclasses
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from diptych.config import LoraConfig
from diptych.models.base import UnifiedModel
from diptych.sampling.logprobs import CHUNK_LOGITS

GIB = 2**30
MODES = ("sampling", "lora", "qlora", "full")
USABLE = 0.9  # of a GPU's memory: the rest is the CUDA context, the allocator's gaps, and what the estimates leave out
_RANK = LoraConfig().r
# VILA-U's codebooks, Emu3.5's image tokenizer, Storyboard's
_KEPT_IN_FLOAT32 = ("rqvaesiglip.quantizer.codebooks.", "vision_tokenizer.", "codec.")
_SAMPLING_BYTES = 20  # a logit while sampling: logits, log-probabilities and probabilities in float32, their sum so far in float64
_SCORING_BYTES = 20  # a logit while training: bf16, float32, log-probability, its gradient and the gathered one, bf16 gradient


@dataclasses.dataclass(frozen=True)
class DocumentSize:
    """What is sampled and trained: `text_tokens` and `num_images` of one document, prompt included."""

    num_images: int = 3
    num_generations: int = 8
    text_tokens: int = 256
    num_prompts: int = 1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < (0 if name == "num_images" else 1):
                raise ValueError(f"{name} is {value}; give {'0 or more' if name == 'num_images' else 'at least 1'}")

    @property
    def rows(self) -> int:
        return self.num_prompts * self.num_generations


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the estimates need to know of a model.

    weight_bytes: all parameters and saved buffers, loaded in bf16. trained: parameters that full training trains.
    length: sequence positions of an image; positions: those of them with codes. branches: of guidance beside the conditional one.
    keeps_images: whether these hold the earlier images of the document too (Emu3.5).
    """

    weight_bytes: int
    trained: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    codebook: int
    positions: int
    depth: int
    length: int
    context: int
    branches: int
    keeps_images: bool = False

    @classmethod
    def of(cls, model: UnifiedModel) -> Sizes:
        """Of a model on any device, meta included; before adapters are attached."""
        text: Any = model.language_model.config
        spec, frozen = model.image_spec, {id(p) for module in model.frozen_modules() for p in module.parameters()}
        return cls(
            weight_bytes=sum(tensor.numel() * _loaded_itemsize(name, tensor) for name, tensor in stored_tensors(model).items()),
            trained=sum(p.numel() for p in model.parameters() if id(p) not in frozen),
            hidden=text.hidden_size, intermediate=text.intermediate_size, layers=text.num_hidden_layers, heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocab=model.vocab_size, codebook=spec.codebook_size, positions=spec.num_positions, depth=spec.depth, length=spec.length,
            context=model.max_positions, branches=int(model.default_sampling.image.guidance_scale != 1),
            keeps_images=type(model).unconditional_row is not UnifiedModel.unconditional_row,
        )  # fmt: skip

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of q, k, v, o, gate, up and down of one decoder layer."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(self.hidden, wide), (self.hidden, narrow), (self.hidden, narrow), (wide, self.hidden)]
        return [*attention, (self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden)]

    @property
    def linear(self) -> int:
        """Parameters of the decoder layers' matrices: what 4 bits quantise."""
        return self.layers * sum(a * b for a, b in self.matrices)

    @property
    def outer(self) -> int:
        """Trained parameters outside the decoder layers' matrices: embeddings, heads, projectors, norms."""
        return self.trained - self.linear

    @property
    def frozen_bytes(self) -> int:
        """Image tokenizer, vision encoder and saved buffers: what full training does not train."""
        return self.weight_bytes - 2 * self.trained

    def lora(self, rank: int = _RANK) -> int:
        """Adapter parameters on all matrices: r * (in + out) each. Source: arXiv:2106.09685, Sec. 4.1."""
        return self.layers * sum(rank * (a + b) for a, b in self.matrices)

    def nf4_bytes(self) -> int:
        """The matrices in NF4: half a byte a parameter, an 8-bit scale per 64, a float32 scale per 256 of those (0.127 bit in all).

        Source: arXiv:2305.14314, Sec. 3. Not counted: 1 kB of tables a matrix.
        """
        return self.layers * sum(ceil(a * b / 2) + ceil(a * b / 64) + 4 * ceil(ceil(a * b / 64) / 256) for a, b in self.matrices)

    def kv_bytes(self, positions: int, itemsize: int = 2) -> int:
        """KV cache of so many positions: 2 * layers * kv_heads * head_dim * bytes each."""
        return positions * 2 * self.layers * self.kv_heads * self.head_dim * itemsize

    def answer(self, document: DocumentSize) -> int:
        """Sequence positions of the document."""
        return document.text_tokens + document.num_images * self.length

    def branch_positions(self, num_images: int) -> tuple[int, int]:
        """Positions of the other branches of guidance for a document of so many images: of the longest, which is sampled in, and of all,
        which are scored together."""
        if not self.keeps_images:
            return self.branches * self.length * bool(num_images), self.branches * self.length * num_images
        return self.branches * self.length * num_images, self.branches * self.length * (num_images * (num_images + 1) // 2)

    def sampling_bytes(self, document: DocumentSize) -> tuple[int, int]:
        """KV cache of the documents sampled together, and the logits of one step of theirs."""
        longest, _ = self.branch_positions(document.num_images)
        choices = max(self.vocab, self.codebook * (1 + self.branches) * bool(document.num_images))
        return self.kv_bytes(document.rows * (self.answer(document) + longest)), document.rows * choices * _SAMPLING_BYTES

    def scoring_bytes(self, document: DocumentSize, lora: bool, rows: int = 1) -> tuple[int, int, int]:
        """Of a micro-batch of so many documents, gradient checkpointing and exact guidance included: the inputs of all layers, one layer
        anew, and logits, of which at most CHUNK_LOGITS of text and as many of codes exist at once."""
        positions = rows * (self.answer(document) + self.branch_positions(document.num_images)[1])
        codes = document.num_images * self.positions * self.depth * self.codebook * (1 + self.branches)
        logits = sum(min(rows * one, CHUNK_LOGITS) for one in (document.text_tokens * self.vocab, codes))
        return positions * self.layers * 2 * self.hidden, positions * self.layer_bytes(lora), logits * _SCORING_BYTES

    def kept_bytes(self, lora: bool) -> int:
        """What autograd keeps of one decoder layer per position in bf16 with scaled-dot-product attention: 20 H + 4 H_kv + 8 I;
        with adapters, which keep float32 copies of what they read, 36 H + 4 H_kv + 10 I + 28 r.

        Source: saved tensors of transformers' Llama, counted; `tests/test_doctor.py` counts again.
        """
        narrow = self.kv_heads * self.head_dim
        if lora:
            return 36 * self.hidden + 4 * narrow + 10 * self.intermediate + 28 * _RANK
        return 20 * self.hidden + 4 * narrow + 8 * self.intermediate

    def layer_bytes(self, lora: bool) -> int:
        """The most that one decoder layer takes per position in its backward pass: `kept_bytes`, 10 H for gradients, and 8 H + 8 I for
        those of adapters in float32. Source: measured peaks on toys, which `tests/test_doctor.py` measures again."""
        return self.kept_bytes(lora) + 10 * self.hidden + (8 * (self.hidden + self.intermediate) if lora else 0)


@dataclasses.dataclass(frozen=True)
class Memory:
    """GiB on one GPU. `total` counts what is there together: see `estimate`."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    kv_cache: float
    activations: float
    logits: float
    total: float

    def fits(self, gpu_gib: float) -> bool:
        return self.total <= USABLE * gpu_gib


def estimate(sizes: Sizes, document: DocumentSize, mode: str, *, kl: bool = False) -> Memory:
    """Memory of one GPU for one of MODES. T: positions of the document, L: of its images, R: rows sampled together, V, K, D as everywhere.

    sampling  weights in bf16
              + KV cache of R * T positions, and of R * (one image, or all that it keeps) for each other branch of guidance
              + logits: R * max(V, K * branches) * 20 bytes
    lora      bf16 weights, float32 adapters of rank 16 on all decoder matrices (4 bytes), their gradients (4), Adam's moments (8)
              + activations of a micro-batch of one row with gradient checkpointing, exact guidance included:
                (T + `Sizes.branch_positions`) * (layers * 2 H bytes, and one layer anew: `Sizes.layer_bytes`)
              + logits: (text * V + images * positions * D * K * branches) * 20 bytes, of each at most CHUNK_LOGITS
    qlora     the same with the decoder matrices in NF4 (`Sizes.nf4_bytes`)
    full      bf16 weights, gathered from those in float32 that are trained (4 bytes), their gradients (4), Adam's moments (8): 18 bytes a
              parameter in one process (`parallel.mode` auto or shard); with `kl`, for a run whose `beta` is not 0, a frozen copy of
              the bf16 weights (adapters need none); otherwise as lora without adapters

    total = weights + optimizer + reference + the largest of what is there one after the other: sampling (KV cache and its logits),
    scoring (gradients, inputs of the layers, and the larger of one layer and the logits), the optimizer step.
    Not counted: the image tokenizer's and the vision encoder's activations, rewards, CUDA context, gaps (see USABLE).

    Raises ValueError for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; allowed are {', '.join(MODES)}")
    adapted = mode in ("lora", "qlora")
    kv_cache, drawing = sizes.sampling_bytes(document)
    weights = sizes.weight_bytes
    if mode == "sampling":
        return _in_gib(weights=weights, kv_cache=kv_cache, logits=drawing, total=weights + kv_cache + drawing)
    if mode == "qlora":
        weights += sizes.nf4_bytes() - 2 * sizes.linear
    if adapted:
        weights += 4 * sizes.lora()
    else:
        weights += 4 * sizes.trained
    trained = sizes.lora() if adapted else sizes.trained
    gradients, optimizer = 4 * trained, 8 * trained
    reference = sizes.weight_bytes if kl and not adapted else 0
    inputs, layer, logits = sizes.scoring_bytes(document, adapted)
    phases = [kv_cache + drawing, gradients + inputs + max(layer, logits)]
    total = weights + optimizer + reference + max(phases)
    return _in_gib(
        weights=weights, gradients=gradients, optimizer=optimizer, reference=reference, kv_cache=kv_cache,
        activations=inputs + layer, logits=logits, total=total,
    )  # fmt: skip


def _in_gib(**terms: int) -> Memory:
    return Memory(**{field.name: terms.get(field.name, 0) / GIB for field in dataclasses.fields(Memory)})


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, a tied one once."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _loaded_itemsize(name: str, tensor: Tensor) -> int:
    """Bytes a number when loaded with dtype bfloat16."""
    if not tensor.is_floating_point():
        return tensor.element_size()
    return 4 if any(part in name for part in _KEPT_IN_FLOAT32) else torch.bfloat16.itemsize
