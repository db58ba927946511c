"""The packaged unified model: a small Llama backbone, a depth transformer over residual image codes, a word tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from diptych.config import ImageSampling, SamplingParams
from diptych.models.attention import CausalAttention, Layout
from diptych.models.base import UnifiedModel, check_image_size
from diptych.models.hf import decode
from diptych.models.image_spec import ImageSpec
from diptych.models.storyboard.codec import PatchCodec
from diptych.tokens import TokenRow
from diptych.worlds.storyboard.world import look_alike

SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<vis>", "</vis>")
PAD, UNK, BOS, EOS, USER, ASSISTANT, BEGIN_IMAGE, END_IMAGE = range(len(SPECIAL_TOKENS))


@dataclasses.dataclass(frozen=True)
class StoryboardConfig:
    vocab_size: int
    hidden_size: int = 160
    num_layers: int = 6
    num_heads: int = 5
    intermediate_size: int = 432
    depth_hidden_size: int = 96
    depth_layers: int = 2
    max_positions: int = 512
    grid: int = 3
    patch: int = 32
    depth: int = 2
    levels: tuple[int, ...] = (8, 8, 8)
    codec_width: int = 48
    rope_theta: float = 10_000.0
    world: str = "standard"  # whose words and pictures it was made for


def build_tokenizer(words: list[str]) -> Tokenizer:
    """Whole words, lower case; punctuation stands alone."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


class StoryboardModel(UnifiedModel):
    family = "storyboard"
    tables = ("_depth_outputs",)
    default_sampling = SamplingParams(
        image=ImageSampling(guidance_scale=1.5)
    ).greedy()  # more guidance breaks pictures: see docs/lab_notes.md

    def __init__(self, config: StoryboardConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        width = config.hidden_size
        self.llama = LlamaModel(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=width,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                pad_token_id=PAD,
                max_position_embeddings=config.max_positions,
                attn_implementation="sdpa",  # type: ignore[call-arg]
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            )
        )
        self.codec = PatchCodec(config.grid, config.patch, config.depth, tuple(config.levels), config.codec_width)
        codebook = self.codec.codebook_size
        self.code_embeddings = nn.Parameter(torch.randn(config.depth, codebook, width) * 0.02)
        self.lm_head = nn.Linear(width, config.vocab_size, bias=False)
        inner = config.depth_hidden_size
        self.depth_in = nn.Linear(width, inner)
        self.depth_code_embeddings = nn.Parameter(torch.randn(config.depth - 1, codebook, inner) * 0.02)
        self.depth_model = LlamaModel(
            LlamaConfig(
                vocab_size=1,
                hidden_size=inner,
                intermediate_size=2 * inner,
                num_hidden_layers=config.depth_layers,
                num_attention_heads=inner // 32,
                max_position_embeddings=config.depth,
                attn_implementation="sdpa",  # type: ignore[call-arg]
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        self.depth_heads = nn.Parameter(torch.randn(config.depth, codebook, inner) * inner**-0.5)
        self.depth_tie = nn.Parameter(torch.randn(width, inner) * width**-0.5)
        self.image_spec = ImageSpec.plain(config.grid**2, config.depth, codebook, config.grid * config.patch, BEGIN_IMAGE, END_IMAGE)
        self.eos_id, self.vocab_size, self.max_positions = EOS, config.vocab_size, config.max_positions
        self.freeze()

    # --- tensors ---
    def embed_text(self, ids: Tensor) -> Tensor:
        return self.llama.embed_tokens(ids)

    def embed_codes(self, codes: Tensor) -> Tensor:
        return torch.stack([self.code_embeddings[d][codes[:, d]] for d in range(codes.shape[1])]).sum(0)

    def backbone(self, embeds: Tensor, position_ids: Tensor, attention: Tensor | Layout) -> Tensor:
        return decode(self.llama, embeds, position_ids, attention)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

    def _depth_hidden(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        """(N, H), (N, d) -> (N, d + 1, inner): the depth transformer over [hidden, code 0, .., code d - 1]."""
        inputs = [self.depth_in(hidden)]
        inputs += [self.depth_code_embeddings[d][code_prefix[:, d]] for d in range(code_prefix.shape[1])]
        stacked = torch.stack(inputs, dim=1)
        positions = torch.arange(stacked.shape[1], device=hidden.device)[None]
        return decode(self.depth_model, stacked, positions, CausalAttention())

    def image_logits(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return torch.einsum("ndi,dki->ndk", self._depth_hidden(hidden, codes[:, :-1]), self._depth_outputs())

    def image_step(self, hidden: Tensor, code_prefix: Tensor) -> Tensor:
        return self._depth_hidden(hidden, code_prefix)[:, -1] @ self._depth_outputs()[code_prefix.shape[1]].T

    def _depth_outputs(self) -> Tensor:
        """(D, K, inner) output vectors of the codes, tied to their input embeddings: what reading a code teaches (that it
        is red, say) helps in drawing it. Without the tie, colours were still wrong after 2000 steps of pretraining."""
        return self.depth_heads + self.code_embeddings @ self.depth_tie

    def encode_images(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(pixels)

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.codec.decode(codes)

    # --- words ---
    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        return [BOS]

    def encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def wrap_prompt(self, row: TokenRow) -> TokenRow:
        before, after = TokenRow.text([BOS, USER], self.config.depth), TokenRow.text([ASSISTANT], self.config.depth)
        return TokenRow.concat([before, row, after])

    def forbidden_text_ids(self) -> list[int]:
        return [PAD, UNK, BOS, USER, ASSISTANT, END_IMAGE]

    def check_world(self, world: str) -> None:
        own = self.config.world
        if not look_alike(world, own):
            raise ValueError(
                f"this model knows the words and pictures of the world {own!r} ({self.config.grid} x {self.config.grid} positions of "
                f"{self.config.depth} codes, {self.image_spec.pixel_size} pixels a side), and was asked for those of {world!r}; give a "
                f"model of that world (`diptych pretrain --setting`), or sources and prompts of {own!r}"
            )

    # --- files and training ---
    @property
    def language_model(self) -> nn.Module:
        return self.llama

    def frozen_modules(self) -> list[nn.Module]:
        return [self.codec]

    def save_pretrained(self, folder: Path) -> None:
        """Writes `config.json`, `tokenizer.json` and `model.safetensors`."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": "diptych_storyboard", **dataclasses.asdict(self.config)}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        self.tokenizer.save(str(folder / "tokenizer.json"))
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(
        cls, folder: Path | str, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> StoryboardModel:
        """Raises ValueError naming the file that is missing, truncated or does not fit."""
        folder = Path(folder)
        if load_in_4bit:
            raise ValueError("the Storyboard model has 3 M parameters and no 4-bit form; leave out load_in_4bit")
        try:
            fields = json.loads((folder / "config.json").read_text())
            fields.pop("model_type", None)
            fields["levels"] = tuple(fields["levels"])
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            model = cls(StoryboardConfig(**fields), tokenizer)
        except Exception as error:
            raise ValueError(f"{folder} is no Storyboard checkpoint: {error}") from error
        check_image_size(image_size, model.image_spec.pixel_size, cls.family)
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise ValueError(f"{weights} is missing; copy the whole checkpoint folder")
        try:
            model.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{weights} is damaged or does not fit its config.json: {str(error)[:400]}") from error
        model.to(dtype or torch.float32)
        model.codec.float()  # in less, rounding decides close calls between codes
        return model.eval()
