"""How a family writes a picture into a sequence."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diptych.tokens import Modality, TokenRow

CODE = -1


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a family writes an image: the text token `begin_id`, which the model chooses, then what `layout` says.

    layout: CODE for a position whose `depth` codes are chosen, otherwise the id of a forced text token. Most families have
        `num_positions` times CODE and an end token. Emu3 writes the size of the grid first and a separator after each row:
        `(size tokens, CODE * W, separator, CODE * W, separator, ..., end tokens)`.
    codebook_size: K, the codes to choose from. pixel_size: pixels a side.
    """

    layout: tuple[int, ...]
    depth: int
    codebook_size: int
    pixel_size: int
    begin_id: int

    def __post_init__(self) -> None:
        if not self.layout or self.layout[-1] == CODE:
            raise ValueError("an image's layout must end with a forced token")

    @classmethod
    def plain(cls, num_positions: int, depth: int, codebook_size: int, pixel_size: int, begin_id: int, end_id: int) -> ImageSpec:
        """`num_positions` positions in a row and one end token."""
        return cls((CODE,) * num_positions + (end_id,), depth, codebook_size, pixel_size, begin_id)

    def row(self, codes: Tensor, *, chosen: bool, step: int, begin_step: int) -> TokenRow:
        """An image from `begin_id` on: (num_positions, D) codes at their places, forced tokens never chosen."""
        layout = torch.tensor(self.layout)
        is_code = layout == CODE
        placed = torch.zeros(len(layout), self.depth, dtype=torch.long)
        placed[is_code] = codes.long()
        span = TokenRow(
            text_ids=layout.masked_fill(is_code, 0),
            codes=placed,
            modality=torch.where(is_code, int(Modality.IMAGE), int(Modality.TEXT)),
            step_ids=torch.full((len(layout),), step, dtype=torch.long),
            completion_mask=is_code & chosen,
        )
        return TokenRow.concat([TokenRow.text([self.begin_id], self.depth, chosen=chosen, step=begin_step), span])

    @property
    def num_positions(self) -> int:
        return self.layout.count(CODE)

    @property
    def length(self) -> int:
        """Sequence positions of one image, `begin_id` included."""
        return 1 + len(self.layout)

    @property
    def end_id(self) -> int:
        return self.layout[-1]

    @property
    def code_offsets(self) -> list[int]:
        """Where the code positions stand behind `begin_id`, counted from 0."""
        return [offset for offset, kind in enumerate(self.layout) if kind == CODE]
