"""Models with random weights in given sizes, prompts and documents of a given shape, and this machine's matrix rate: what the
benchmarks stand on. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from diptych.models import UnifiedModel, load_model, products
from diptych.models.vila_u.config import VisionConfig
from diptych.models.vila_u.model import VilaUModel
from diptych.models.vila_u.vision import Projector, VisionTower
from diptych.tokens import TokenRow

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from toy_checkpoints import MAKERS, VILA_U  # tokenizers and layouts of the families


@dataclasses.dataclass(frozen=True)
class JanusShape:
    """A Janus by its Llama (hidden width, MLP width, layers, heads), and how large the rest is."""

    width: int
    intermediate: int
    layers: int
    heads: int
    vocab: int = 102_400
    context: int = 16_384
    grid: int = 24
    codes: int = 16_384
    vision_width: int = 1024
    vision_layers: int = 24
    codec_channels: int = 128
    dtype: torch.dtype = torch.bfloat16


JANUS = {
    "janus-pro-1b": JanusShape(2048, 5632, 24, 16),
    "janus-pro-7b": JanusShape(4096, 11_008, 30, 32),
    "janus-100m": JanusShape(768, 2048, 12, 12, 8192, 2048, grid=8, codes=4096, vision_width=64, vision_layers=1, codec_channels=32,
                             dtype=torch.float32),
}  # fmt: skip
SIZES = (*JANUS, "vila-u-7b")


def benchmark_model(name: str, device: torch.device, grid: int | None = None) -> UnifiedModel:
    """The packaged `storyboard`, or random weights in one of SIZES."""
    if name == "storyboard":
        return load_model(name).to(device)
    with tempfile.TemporaryDirectory() as scratch:
        return random_model(name, device, Path(scratch) / "toy", grid=grid)


def random_model(size: str, device: torch.device, folder: Path, *, grid: int | None = None) -> UnifiedModel:
    """Random weights in a release's size and dtype, made on the device; tokenizer and templates are a toy's.

    `grid`: codes a side of a Janus' pictures; None: the size's own.
    """
    if grid is not None:
        JANUS[size] = dataclasses.replace(JANUS[size], grid=grid)
    torch.manual_seed(0)
    torch.set_default_dtype(JANUS[size].dtype if size in JANUS else torch.bfloat16)
    try:
        return (random_janus(JANUS[size], device, folder) if size in JANUS else random_vila_u(device)).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def random_janus(shape: JanusShape, device: torch.device, folder: Path) -> UnifiedModel:
    toy = load_model(MAKERS["janus"](folder))
    config, width = toy.hf.config, shape.width
    sizes: dict[str, dict[str, Any]] = {
        "text_config": {
            "hidden_size": width, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.heads, "head_dim": width // shape.heads,
            "vocab_size": shape.vocab, "max_position_embeddings": shape.context,
        },
        "vision_config": {
            "hidden_size": shape.vision_width, "num_hidden_layers": shape.vision_layers, "num_attention_heads": shape.vision_width // 64,
            "image_size": 16 * shape.grid, "patch_size": 16, "num_image_tokens": shape.grid**2, "projection_dim": width,
        },
        "vq_config": {
            "num_embeddings": shape.codes, "embed_dim": 8, "latent_channels": 256, "base_channels": shape.codec_channels,
            "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "num_patches": shape.grid, "projection_dim": width,
            "image_token_embed_dim": width,
        },
    }  # fmt: skip
    for part, values in sizes.items():
        for name, value in values.items():
            setattr(getattr(config, part), name, value)
    with device:
        hf = type(toy.hf)(config).to(shape.dtype)  # transformers makes parts of it in the type that the toy's config names
    hf.generation_config = toy.hf.generation_config
    return type(toy)(hf, toy.tokenizer, toy.image_processor, folder)


def random_vila_u(device: torch.device) -> UnifiedModel:
    """As `spec`: Llama-2 7B with linear RoPE scaling, SigLIP large, a codebook of 16384, a depth transformer of width 2560."""
    toy = load_model(VILA_U)
    llm = LlamaConfig(
        vocab_size=32004, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    vision = VisionConfig.from_dicts(
        {
            "rqvaesiglip": {
                "embed_dim": 1024, "n_embed": 16384, "latent_shape": [16, 16, 1024], "code_shape": [16, 16, 4], "shared_codebook": True,
                "ddconfig": {"ch": 128, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "resolution": 256,
                             "z_channels": 256},
            },
            "rqtransformer": {
                "block_size": [16, 16, 4], "input_embed_dim_1": 1024, "input_embed_dim_2": 4096, "embed_dim": 2560, "vocab_size": 16384,
                "head": {"n_layer": 6, "block": {"n_head": 40}},
            },
        }
    )  # fmt: skip
    with device:
        parts = LlamaForCausalLM(llm), VisionTower(vision), Projector(1024, 4096)
    parts[1].rqvaesiglip.siglip_model.fill_position_ids(device)
    return VilaUModel(*parts, toy.tokenizer, VILA_U)


@contextlib.contextmanager
def documents_of(model: UnifiedModel, images: int, words: int) -> Iterator[None]:
    """Inside, every sampled document has `images` times `words` text tokens and a picture, then ends: random weights would not
    decide so. The head is computed all the same; only which text token comes is decided."""
    plain = model.encode_text("a")[-1]
    texts = [iter([plain] * words + [model.image_spec.begin_id]) for _ in range(images)] + [iter([model.eos_id])]
    token, drawn = model.eos_id, False
    head, draw = model.text_logits, model.image_step

    def decided(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal token, drawn
        if drawn:
            del texts[0]
        token, drawn = next(texts[0], token), False  # again where all rows are done: on a GPU the sampler asks only now and then
        return head(hidden).index_fill(-1, torch.full((1,), token, device=hidden.device), 1e4)  # an upload would wait for the GPU

    def drawing(*states: torch.Tensor) -> torch.Tensor:
        nonlocal drawn
        drawn = True
        return draw(*states)

    model.text_logits, model.image_step = decided, drawing  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.text_logits, model.image_step


def prompts(model: UnifiedModel, count: int, length: int) -> list[TokenRow]:
    """`count` prompts of `length` to 1.5 * `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    legal = torch.tensor(sorted(set(range(model.vocab_size)) - set(model.forbidden_text_ids()) - {model.image_spec.begin_id, model.eos_id}))
    lengths = [length + (i * length) // (2 * count) for i in range(count)]
    return [TokenRow.text(legal[torch.randint(len(legal), (n,), generator=generator)].tolist(), model.image_spec.depth) for n in lengths]


def clock_of(cpu_seconds: bool) -> Callable[[], float]:
    """What the time is read from: the clock, or the seconds that this process computed, on one thread."""
    if cpu_seconds:
        torch.set_num_threads(1)
    return time.process_time if cpu_seconds else time.perf_counter


@contextlib.contextmanager
def plain_layers(model: torch.nn.Module) -> Iterator[None]:
    """Inside, linear layers multiply as torch does it: the baseline's."""
    own = {module: module.__dict__.pop("forward") for module in model.modules() if "forward" in module.__dict__}
    try:
        yield
    finally:
        for module, forward in own.items():
            module.forward = forward


def matrix_rate(device: torch.device, dtype: torch.dtype, width: int, rows: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Floating-point operations a second of a linear layer from `width` to 4 * `width` on so many rows; the best of ten runs."""
    states, weight = torch.randn(rows, width, device=device, dtype=dtype), torch.randn(4 * width, width, device=device, dtype=dtype)
    multiply: Callable[[torch.Tensor], torch.Tensor] = functools.partial(torch.nn.functional.linear, weight=weight)
    if device.type == "cpu" and dtype == torch.float32 and products.available():
        multiply = products.Prepared(weight)
    best = float("inf")
    for _ in range(10):
        began = clock()
        for _ in range(10):
            multiply(states)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (clock() - began) / 10)
    return 2 * states.numel() * 4 * width / best
