"""What the tests of Emu3.5 share: recordings of the official code, its toy checkpoint, and recorded ids as sequences of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import PIL.Image
import torch
from safetensors.torch import load_file

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.models.emu3_5.model import Emu35Model
from diptych.tokens import Modality, TokenBatch, TokenRow, collate

DATA = Path(__file__).parent / "data" / "emu3_5"
RECORDED = load_file(DATA / "reference_fp32.safetensors")
FACTS = json.loads((DATA / "reference_fp32.json").read_text())
IDS, FIRST = FACTS["special_token_ids"], FACTS["first_visual_id"]
TOY = DATA / "toy_checkpoint" / "Emu3.5"
VISION = DATA / "toy_checkpoint" / "Emu3.5-VisionTokenizer"


def copy_toy(folder: Path, **options) -> Path:
    """Both repositories, side by side; returns the language model's folder. `options`: of `diptych.json`."""
    shutil.copytree(DATA / "toy_checkpoint", folder, dirs_exist_ok=True)
    if options:
        (folder / TOY.name / "diptych.json").write_text(json.dumps(options))
    return folder / TOY.name


def recorded_picture(name: str) -> PIL.Image.Image:
    return PIL.Image.fromarray(RECORDED[f"image.{name}.rgb"].numpy())


def ids_of(row: TokenRow) -> list[int]:
    """A sequence as ids of the one vocabulary."""
    return torch.where(row.modality == Modality.IMAGE, row.codes[:, 0] + FIRST, row.text_ids).tolist()


def prompt_row(ids: list[int]) -> TokenRow:
    """Recorded ids, nothing chosen."""
    found = torch.tensor(ids)
    is_code = found >= FIRST
    row = TokenRow.text(found.masked_fill(is_code, 0).tolist(), 1)
    modality = torch.where(is_code, int(Modality.IMAGE), int(Modality.TEXT))
    return TokenRow(row.text_ids, (found - FIRST).clamp(min=0)[:, None], modality, row.step_ids, row.completion_mask)


def answer_row(ids: list[int]) -> TokenRow:
    """The same as an answer, in which text, the choice to draw and codes are choices; steps do not matter here."""
    row, inside, chosen = prompt_row(ids), False, []
    for number in ids:
        chosen.append(number >= FIRST if inside else True)
        inside = number == IDS["BOI"] or (inside and number != IDS["EOI"])
    return TokenRow(row.text_ids, row.codes, row.modality, torch.zeros_like(row.step_ids), torch.tensor(chosen))


def settings_of(run: str) -> SamplingParams:
    facts = FACTS["generation"][run]
    told = facts["sampling"]
    text, image = ({key: told[f"{kind}_{key}"] for key in ("top_k", "top_p", "temperature")} for kind in ("text", "image"))
    return SamplingParams(text=TextSampling(**text), image=ImageSampling(**image, guidance_scale=facts["guidance_scale"]), max_images=3)


@torch.no_grad()
def logits_of(model: Emu35Model, row: TokenRow) -> torch.Tensor:
    """(T, all ids): what the two heads say together."""
    hidden = model.backbone(model.embed(collated(row)), torch.arange(len(row))[None], torch.ones(1, len(row), dtype=torch.bool))[0]
    return torch.cat([model.text_logits(hidden), model.image_step(hidden, row.codes[:, :0])], -1)


def collated(row: TokenRow) -> TokenBatch:
    return collate([row])


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
