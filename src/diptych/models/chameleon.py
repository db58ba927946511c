"""Chameleon and Anole: one vocabulary for text and image codes.

arXiv:2405.09818, arXiv:2407.06135. Stock class: `ChameleonForConditionalGeneration`, whose forward sets the logits of image
tokens to the smallest number whatever was asked; so the backbone and the head are called here, never that forward.
The stock class cannot decode pictures either: the decoder is loaded from the original `vqgan.ckpt`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ChameleonForConditionalGeneration

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.models.base import check_image_size
from diptych.models.hf import OneVocabularyModel, load_image_processor
from diptych.models.image_spec import ImageSpec
from diptych.models.vila_u.config import DecoderConfig
from diptych.models.vila_u.decoder import PixelDecoder

BEGIN, END, PLACEHOLDER = "<racm3:break>", "<eoss>", "<image>"
DECODER_FILE = "picture_decoder.safetensors"
_ORIGINALS = ("vqgan.ckpt", "tokenizer/vqgan.ckpt")


class PictureDecoder(nn.Module):
    """Code vectors to pixels; names are those of the original VQGAN checkpoint."""

    def __init__(self, vq: Any) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(vq.embed_dim, vq.latent_channels, 1)
        self.decoder = PixelDecoder(
            DecoderConfig(
                ch=vq.base_channels,
                ch_mult=tuple(vq.channel_multiplier),
                num_res_blocks=vq.num_res_blocks,
                attn_resolutions=tuple(vq.attn_resolutions or ()),
                resolution=vq.resolution,
                z_channels=vq.latent_channels,
            )
        )

    def forward(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors))


class ChameleonModel(OneVocabularyModel):
    family = "chameleon"
    hf_class = ChameleonForConditionalGeneration
    image_marker = PLACEHOLDER
    default_template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}" + PLACEHOLDER + "{% else %}"
        "{{ c['text'] | trim }}{% endif %}{% endfor %}<reserved08706>{% endfor %}"
    )
    answer_lead = ""
    default_sampling = SamplingParams(
        text=TextSampling(temperature=0.7, top_p=0.9), image=ImageSampling(temperature=0.7, top_p=0.9, guidance_scale=1.0)
    )

    def __init__(self, hf: Any, tokenizer: Any, image_processor: Any, folder: Path) -> None:
        super().__init__(hf, tokenizer, image_processor, folder)
        vq, mapping = hf.config.vq_config, hf.model.vocabulary_mapping
        grid = vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)
        codes = sorted(mapping.img2bpe)
        if codes != list(range(vq.num_embeddings)):
            raise ValueError(
                f"the vocabulary_map in {folder / 'config.json'} names {len(codes)} image tokens (IMGIMG...); Chameleon needs one for each "
                f"of its {vq.num_embeddings} codes. Use the release's config.json"
            )
        self.set_code_ids(torch.tensor([mapping.img2bpe[code] for code in codes]))
        self.add_controls({number for token, number in self.vocabulary.items() if token.startswith("<reserved")})
        begin, end = self.token_id(BEGIN), self.token_id(END)
        self.image_spec = ImageSpec.plain(grid**2, 1, len(codes), vq.resolution, begin, end)
        self.picture_decoder: PictureDecoder | None = load_decoder(folder, vq, hf.dtype)
        self.freeze()

    # --- tensors ---
    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Raises ValueError where the checkpoint folder holds no picture decoder."""
        self.check_can_draw()
        assert self.picture_decoder is not None
        grid = int(codes.shape[1] ** 0.5)
        vectors = self.hf.model.vqmodel.quantize.embedding(codes[..., 0])  # (N, positions, C)
        return self.picture_decoder(vectors.transpose(1, 2).unflatten(2, (grid, grid)))

    def check_can_draw(self) -> None:
        if self.picture_decoder is None and self.image_decoder is None:
            raise ValueError(
                f"{self.folder} cannot turn codes into pictures: transformers' Chameleon has no decoder. Put the original release's "
                f"{' or '.join(_ORIGINALS)} into the folder, or name a decoder of your own (image_decoder)"
            )

    # --- words and pictures ---
    def unconditional_prompt(self, prompt_length: int) -> list[int]:
        return [self.bos_id]

    def target_pixels(self, image: PIL.Image.Image) -> Tensor:
        """As in prompts: the release has one preparation for both."""
        return self.processed(image)

    # --- files and training ---
    @property
    def language_model(self) -> nn.Module:
        return self.hf.model

    def frozen_modules(self) -> list[nn.Module]:
        return [self.hf.model.vqmodel, *([self.picture_decoder] if self.picture_decoder is not None else [])]

    def save_pretrained(self, folder: Path) -> None:
        super().save_pretrained(folder)
        if self.picture_decoder is not None:
            save_file({k: v.cpu().contiguous() for k, v in self.picture_decoder.state_dict().items()}, folder / DECODER_FILE)

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype | None = None, load_in_4bit: bool = False, image_size: int | None = None
    ) -> ChameleonModel:
        hf, tokenizer = cls.load_parts(folder, dtype, load_in_4bit, ["vqmodel", "lm_head"])
        model = cls(hf, tokenizer, load_image_processor(folder), folder)
        check_image_size(image_size, model.image_spec.pixel_size, cls.family)
        return model


def load_decoder(folder: Path, vq: Any, dtype: torch.dtype) -> PictureDecoder | None:
    """From our own file or the original VQGAN checkpoint; None where the folder has neither.

    Raises ValueError for a file that is damaged or does not fit.
    """
    found = next((folder / name for name in (DECODER_FILE, *_ORIGINALS) if (folder / name).is_file()), None)
    if found is None:
        return None
    try:
        if found.suffix == ".safetensors":
            tensors = load_file(found)
        else:
            loaded = torch.load(found, map_location="cpu", weights_only=True, mmap=True)
            tensors = loaded.get("state_dict", loaded)
        with torch.device("meta"):
            decoder = PictureDecoder(vq)
        wanted = decoder.state_dict()
        decoder.load_state_dict({key: tensors[key].to(dtype) for key in wanted}, assign=True)
    except (KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{found} is damaged or is not this model's picture decoder: {str(error)[:300]}") from error
    return decoder.eval()
