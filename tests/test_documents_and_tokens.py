"""Documents and their message form, token rows and batches, and how a model turns the one into the other."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import torch

from diptych.document import Document, Image, Text, join, to_json_blocks, to_message
from diptych.models.image_spec import CODE, ImageSpec
from diptych.pictures import image_data_address, open_image
from diptych.tokens import Modality, TokenBatch, TokenRow, collate

PAD, TEXT, IMAGE = Modality.PAD, Modality.TEXT, Modality.IMAGE
YES, NO = True, False


def picture(seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    array = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    return PIL.Image.fromarray(array).convert(mode)


def same(left: PIL.Image.Image, right: PIL.Image.Image) -> bool:
    return left.mode == right.mode and np.array_equal(np.asarray(left), np.asarray(right))


# --- documents ---------------------------------------------------------------------------------------------------------


def test_blocks_are_read_back():
    document = Document((Text("one"), Image(picture(1)), Text("two"), Image(picture(2))))
    blocks = document.to_blocks()
    assert [block["type"] for block in blocks] == ["text", "image", "text", "image"]
    assert blocks[0] == {"type": "text", "text": "one"}
    assert blocks[1]["image"] is document.images[0].pixels
    again = Document.from_blocks(blocks)
    assert len(again) == 4
    assert again.text == document.text == "one two"
    assert all(same(a.pixels, b.pixels) for a, b in zip(again.images, document.images, strict=True))
    assert to_message("user", document) == {"role": "user", "content": blocks}
    assert Document.from_blocks("hello").segments == (Text("hello"),)
    assert len(join([document, again, Document(())])) == 8


def test_captions_by_hand():
    a, b, c = (Image(picture(seed)) for seed in range(3))
    document = Document((a, Text("one"), b, c, Text("skipped"), Text(" two "), a, Text(" "), b, Text("last")))
    assert document.captions() == [(2, "one", b), (3, "one", c), (6, " two ", a)]
    assert Document(()).captions() == []


def test_pictures_travel_through_json_without_loss():
    document = Document((Text("a ball"), Image(picture(3))))
    again = Document.from_blocks(json.loads(json.dumps(to_json_blocks(document))))
    assert again.segments[0] == Text("a ball")
    assert same(again.images[0].pixels, picture(3))


def test_pictures_come_from_objects_paths_and_data_addresses(tmp_path):
    original = picture(4)
    original.save(tmp_path / "picture.png")
    for source in (original, tmp_path / "picture.png", str(tmp_path / "picture.png"), image_data_address(original)):
        assert same(Document.from_blocks([{"type": "image", "image": source}]).images[0].pixels, original)
    assert image_data_address(original).startswith("data:image/png;base64,")
    for mode in ("L", "RGBA", "P"):
        assert open_image(picture(4, mode)).mode == "RGB"


@pytest.mark.parametrize(
    "block",
    [{}, {"type": "text"}, {"type": "text", "text": None}, {"type": "text", "text": 3}, {"type": "image"},
     {"type": "image", "image": None}, {"type": "video", "video": "a.mp4"}, {"text": "no type"}],
)  # fmt: skip
def test_bad_blocks_are_named_with_what_is_allowed(block):
    with pytest.raises(ValueError, match=r"^block 1 is .*allowed are \{'type': 'text', 'text': str\} and \{'type': 'image'"):
        Document.from_blocks([{"type": "text", "text": "fine"}, block])


def test_any_mode_becomes_rgb_as_a_person_sees_it():
    """What is transparent stands on white (a plain conversion makes it black), 16 bits are scaled (it clips them)."""
    clear = PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    half = PIL.Image.new("LA", (2, 2), (0, 128))
    palette = PIL.Image.new("P", (2, 2), 0)
    palette.info["transparency"] = 0
    deep = PIL.Image.fromarray(np.full((2, 2), 0x8000, dtype=np.uint16))
    for image, colour in ((clear, (255,) * 3), (half, (127,) * 3), (palette, (255,) * 3), (deep, (128,) * 3)):
        assert open_image(image).mode == "RGB"
        assert open_image(image).getpixel((0, 0)) == pytest.approx(colour, abs=1)
    assert open_image(PIL.Image.new("L", (2, 2), 9)).getpixel((1, 1)) == (9, 9, 9)


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    picture().save(tmp_path / "bomb.png")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"^cannot read image '.*bomb.png': Image size .* exceeds limit"):
        open_image(tmp_path / "bomb.png")


def test_unreadable_pictures_are_named(tmp_path):
    (tmp_path / "words.png").write_text("not a picture")
    picture().save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:200])
    address = image_data_address(picture())
    for source in (
        str(tmp_path / "missing.png"), tmp_path / "words.png", tmp_path / "half.png", tmp_path, 3,
        "data:image/png;base64,", "data:image/png;base64,!!!", "data:image/png", address[: len(address) // 2 // 4 * 4],
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^cannot read image '.*Give a PNG or JPEG file that opens\.$") as caught:
            open_image(source)
        assert str(source)[:30] in str(caught.value)


def test_images_without_pixels():
    with pytest.raises(ValueError, match="an Image needs pixels or codes"):
        Image()
    with pytest.raises(ValueError, match="codes but no pixels"):
        Document((Image(codes=torch.zeros(9, 2, dtype=torch.long)),)).to_blocks()


# --- rows and batches --------------------------------------------------------------------------------------------------


def example() -> TokenRow:
    """The five tokens of the docstring of `tokens.py`: hi <vis> [image] </vis> <eos>, depth 2."""
    return TokenRow(
        text_ids=torch.tensor([5, 6, 0, 7, 3]),
        codes=torch.tensor([[0, 0], [0, 0], [17, 4], [0, 0], [0, 0]]),
        modality=torch.tensor([TEXT, TEXT, IMAGE, TEXT, TEXT]),
        step_ids=torch.tensor([0, 0, 1, 1, 1]),
        completion_mask=torch.tensor([YES, YES, YES, NO, YES]),
    )


def assert_rows_equal(left: TokenRow, right: TokenRow) -> None:
    for field in dataclasses.fields(TokenRow):
        if field.name == "pixels":
            assert left.pixels == right.pixels
        else:
            torch.testing.assert_close(getattr(left, field.name), getattr(right, field.name), msg=lambda m, n=field.name: f"{n}: {m}")


def test_the_example_is_put_together_from_its_parts():
    parts = [
        TokenRow.text([5, 6], 2, chosen=True, step=0),
        TokenRow.image(torch.tensor([[17, 4]]), chosen=True, step=1),
        TokenRow.text([7], 2, step=1),
        TokenRow.text([3], 2, chosen=True, step=1),
    ]
    row = TokenRow.concat(parts)
    assert len(row) == 5
    assert_rows_equal(row, example())


def test_choice_mask_by_hand():
    batch = collate([example()])
    assert batch.depth == 2
    # a text token is one choice at depth 0, an image position is one at each depth, </vis> is none
    assert batch.choice_mask.tolist() == [[[YES, NO], [YES, NO], [YES, YES], [NO, NO], [YES, NO]]]
    assert batch.text_mask.tolist() == [[YES, YES, NO, YES, YES]]
    assert batch.image_mask.tolist() == [[NO, NO, YES, NO, NO]]


def test_collate_by_hand():
    batch = collate([TokenRow.text([8, 9], 2), example(), TokenRow.image(torch.tensor([[1, 2]]), chosen=True, step=0)])
    assert len(batch) == 3
    assert batch.text_ids.tolist() == [[8, 9, 0, 0, 0], [5, 6, 0, 7, 3], [0, 0, 0, 0, 0]]
    assert batch.codes[0].tolist() == [[0, 0]] * 5
    assert batch.codes[2].tolist() == [[1, 2], *[[0, 0]] * 4]
    assert batch.modality.tolist() == [[TEXT, TEXT, PAD, PAD, PAD], [TEXT, TEXT, IMAGE, TEXT, TEXT], [IMAGE, PAD, PAD, PAD, PAD]]
    assert batch.attention_mask.tolist() == [[YES, YES, NO, NO, NO], [YES] * 5, [YES, NO, NO, NO, NO]]
    assert batch.step_ids.tolist() == [[-1] * 5, [0, 0, 1, 1, 1], [0, -1, -1, -1, -1]]
    assert batch.completion_mask.tolist() == [[NO] * 5, [YES, YES, YES, NO, YES], [YES, NO, NO, NO, NO]]
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3, 4]
    assert batch.position_ids[0, :2].tolist() == [0, 1]
    assert int(batch.position_ids.min()) == 0
    with pytest.raises(ValueError, match="the batch is empty"):
        collate([])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text_ids", torch.zeros(5, dtype=torch.long), r"text_ids has shape \(5,\); \(B, T\) is needed"),
        ("text_ids", torch.zeros(1, 5), "text_ids is torch.float32; torch.int64 is needed"),
        ("codes", torch.zeros(1, 5, dtype=torch.long), r"codes has shape \(1, 5\); \(1, 5\) \+ \(D,\) is needed"),
        ("codes", torch.zeros(1, 4, 2, dtype=torch.long), r"codes has shape \(1, 4, 2\)"),
        ("codes", torch.zeros(1, 5, 2), "codes is torch.float32; torch.int64 is needed"),
        ("modality", torch.ones(1, 6, dtype=torch.long), r"modality has shape \(1, 6\); text_ids has \(1, 5\)"),
        ("position_ids", torch.ones(2, 5, dtype=torch.long), "position_ids has shape"),
        ("step_ids", torch.ones(5, dtype=torch.long), "step_ids has shape"),
        ("completion_mask", torch.ones(1, 5, 1, dtype=torch.bool), "completion_mask has shape"),
        ("completion_mask", torch.ones(1, 5, dtype=torch.long), "completion_mask is torch.int64; torch.bool is needed"),
        ("modality", torch.zeros(1, 5, dtype=torch.long), "completion_mask is True on padding"),
    ],
)
def test_wrong_shapes_and_types_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        TokenBatch(**{**vars(collate([example()])), field: value})


def test_selected_rows_lose_the_padding_that_none_needs():
    rows = [TokenRow.text([8, 9], 2), example(), TokenRow.text([4, 4, 4], 2, chosen=True, step=0)]
    batch = collate(rows)
    for chosen, indices in ((slice(0, 1), [0]), ([0, 2], [0, 2]), (torch.tensor([2, 1]), [2, 1]), (torch.tensor([NO, NO, YES]), [2])):
        part, expected = batch[chosen], collate([rows[i] for i in indices])
        for field in dataclasses.fields(TokenBatch):
            if field.name not in ("position_ids", "pixels", "forms"):  # positions count on over padding
                assert getattr(part, field.name).tolist() == getattr(expected, field.name).tolist()
        real = expected.attention_mask
        assert part.position_ids[real].tolist() == expected.position_ids[real].tolist()
    assert batch[[0]].text_ids.shape == (1, 2)


def test_pictures_travel_with_their_rows_and_are_not_cut():
    """A prompt picture as three features between words; a batch keeps it with its row, and drops the list where no row has one."""
    pixels = torch.rand(3, 2, 2)
    row = TokenRow.concat([TokenRow.text([8], 2), TokenRow.feature(pixels, 3, 2), TokenRow.text([9], 2)])
    assert row.modality.tolist() == [TEXT, 3, 3, 3, TEXT]
    assert row[1:].pixels == row.pixels == (pixels,)
    assert row[4:].pixels == ()
    with pytest.raises(ValueError, match="must hold all of its picture features or none"):
        row[2:]
    batch = collate([TokenRow.text([5], 2), row])
    assert batch.pixels == ((), (pixels,))
    assert batch.feature_mask.tolist() == [[NO] * 5, [NO, YES, YES, YES, NO]]
    assert batch[[1]].pixels == ((pixels,),)
    assert batch[[0]].pixels == ()
    assert_rows_equal(batch.row(1), row)
    with pytest.raises(ValueError, match="pixels has 1 rows; the batch has 2"):
        dataclasses.replace(batch, pixels=((pixels,),))


def test_an_images_layout_ends_with_a_forced_token():
    with pytest.raises(ValueError, match="must end with a forced token"):
        ImageSpec((5, CODE), 1, 4, 8, 1)


def test_an_image_with_forced_tokens_by_hand():
    """Two rows of two codes, a size in front, a separator after each row, an end: only codes are chosen."""
    spec = ImageSpec((7, CODE, CODE, 8, CODE, CODE, 8, 9), depth=1, codebook_size=4, pixel_size=8, begin_id=6)
    row = spec.row(torch.tensor([[3], [1], [0], [2]]), chosen=True, step=1, begin_step=0)
    assert row.text_ids.tolist() == [6, 7, 0, 0, 8, 0, 0, 8, 9]
    assert row.codes[:, 0].tolist() == [0, 0, 3, 1, 0, 0, 2, 0, 0]
    assert row.modality.tolist() == [TEXT, TEXT, IMAGE, IMAGE, TEXT, IMAGE, IMAGE, TEXT, TEXT]
    assert row.completion_mask.tolist() == [YES, NO, YES, YES, NO, YES, YES, NO, NO]
    assert row.step_ids.tolist() == [0, *[1] * 8]
    assert (spec.num_positions, spec.length, spec.end_id, spec.code_offsets) == (4, 9, 9, [1, 2, 4, 5])


# --- a model's words and pictures as tokens ----------------------------------------------------------------------------


def words(model, text: str) -> list[int]:
    return [model.tokenizer.token_to_id(word) for word in text.split()]


def named(model, *tokens: str) -> list[int]:
    return [model.tokenizer.token_to_id(token) for token in tokens]


def codes_of(model, seed: int = 0) -> torch.Tensor:
    spec = model.image_spec
    return torch.randint(1, spec.codebook_size, (spec.num_positions, spec.depth), generator=torch.Generator().manual_seed(seed))


def test_a_prompt_is_wrapped_and_nothing_of_it_is_trained(tiny_model):
    codes = codes_of(tiny_model)
    row = tiny_model.encode_prompt(Document((Text("the ball grows"), Image(codes=codes), Text("now"))))
    expected = [
        *named(tiny_model, "<bos>", "<user>"), *words(tiny_model, "the ball grows"), *named(tiny_model, "<vis>"), *[0] * 9,
        *named(tiny_model, "</vis>"), *words(tiny_model, "now"), *named(tiny_model, "<assistant>"),
    ]  # fmt: skip
    assert row.text_ids.tolist() == expected
    assert row.modality.tolist() == [TEXT] * 6 + [IMAGE] * 9 + [TEXT] * 3
    torch.testing.assert_close(row.codes[6:15], codes)
    assert not row.codes[:6].any()
    assert row.step_ids.tolist() == [-1] * len(row)
    assert not row.completion_mask.any()


def test_an_answer_by_hand(tiny_model):
    """Each segment is a step; the choice to draw belongs to the words before the picture; `</vis>` is forced."""
    answer = Document((Text("the ball grows"), Image(codes=codes_of(tiny_model, 1)), Text("now"), Image(codes=codes_of(tiny_model, 2))))
    row = tiny_model.encode_segments(answer, answer=True)
    vis, end, eos = named(tiny_model, "<vis>", "</vis>", "<eos>")
    ids = [*words(tiny_model, "the ball grows"), vis, *[0] * 9, end, *words(tiny_model, "now"), vis, *[0] * 9, end, eos]
    assert row.text_ids.tolist() == ids
    #                                the ball grows <vis>  image      </vis>  now <vis>   image      </vis> <eos>
    assert row.step_ids.tolist() == [0, 0, 0, 0, *[1] * 9, 1, 2, 2, *[3] * 9, 3, 3]
    assert row.completion_mask.tolist() == [YES, YES, YES, YES, *[YES] * 9, NO, YES, YES, *[YES] * 9, NO, YES]
    torch.testing.assert_close(row.codes[4:13], codes_of(tiny_model, 1))
    torch.testing.assert_close(row.codes[16:25], codes_of(tiny_model, 2))
    assert int(collate([row]).choice_mask.sum()) == 4 + 9 * 3 + 2 + 9 * 3 + 1  # depth 3


def test_the_choice_to_draw_without_words_before_it_belongs_to_the_picture(tiny_model):
    image = Image(codes=codes_of(tiny_model))
    row = tiny_model.encode_segments(Document((image, image, Text("now"))), answer=True)
    #                                <vis>  image  </vis> | <vis>  image  </vis> | now <eos>
    assert row.step_ids.tolist() == [0, *[0] * 9, 0, 1, *[1] * 9, 1, 2, 2]
    assert row.completion_mask.tolist() == [YES, *[YES] * 9, NO, YES, *[YES] * 9, NO, YES, YES]
    empty = tiny_model.encode_segments(Document(()), answer=True)
    assert (empty.text_ids.tolist(), empty.step_ids.tolist(), empty.completion_mask.tolist()) == ([tiny_model.eos_id], [0], [True])


def test_patches_that_are_alike_are_decoded_once_and_the_pixels_are_the_same(tiny_model):
    codec = tiny_model.codec
    codes = torch.randint(3, (6, 9, 3), generator=torch.Generator().manual_seed(0))  # of 27 combinations some come twice, some never
    codes[2] = codes[5]
    decoded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec.decoder, "forward", lambda latent, own=codec.decoder.forward: decoded.append(len(latent)) or own(latent))
        found = codec.decode(codes)
    assert decoded == [len({tuple(one) for one in codes.flatten(0, 1).tolist()})]
    alone = torch.cat([codec.decode(codes[i : i + 1]) for i in range(6)])
    quantized = codec.quantizer.get_output_from_indices(codes.flatten(0, 1)[:, None]).squeeze(1)
    torch.testing.assert_close(found, codec.from_patches(codec.decoder(quantized).clamp(-1, 1)), atol=1e-6, rtol=0)
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)
    assert torch.equal(found[2], found[5])


def test_pixels_become_the_codes_of_the_codec(tiny_model):
    pixels = PIL.Image.fromarray(np.random.default_rng(5).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    tensor = torch.from_numpy(np.asarray(pixels).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    expected = tiny_model.encode_images(tensor)[0]
    row = tiny_model.encode_segments(Document((Image(pixels),)), answer=True)
    torch.testing.assert_close(row.codes[1:10], expected)
    assert len(expected.unique(dim=0)) > 1


def test_examples_are_prompt_and_answer_and_dropped_captions_are_not_seen(tiny_model):
    prompt, answer = Document((Text("draw this ."),)), Document((Image(codes=codes_of(tiny_model)),))
    asked, told = tiny_model.encode_prompt(prompt), tiny_model.encode_segments(answer, answer=True)
    assert_rows_equal(tiny_model.encode_example(prompt, answer), TokenRow.concat([asked, told]))
    dropped = tiny_model.encode_example(prompt, answer, unconditional=True)
    # <bos> <vis> image </vis> <eos>: exactly the unconditional branch of the sampler, without <user> and <assistant>
    bos, vis, end, eos = named(tiny_model, "<bos>", "<vis>", "</vis>", "<eos>")
    assert dropped.text_ids.tolist() == [bos, vis, *[0] * 9, end, eos]
    assert dropped.completion_mask.tolist() == [NO, YES, *[YES] * 9, NO, YES]
    assert dropped.step_ids.tolist() == [-1, 0, *[0] * 9, 0, 0]


def test_what_exceeds_the_context_is_refused(tiny_model):
    limit = tiny_model.max_positions  # 512
    fits = Document((Text("ball " * (limit - 4)),))  # <bos> <user> .. <assistant> leaves room for one token
    assert len(tiny_model.encode_prompt(fits)) == limit - 1
    with pytest.raises(ValueError, match=f"the prompt has {limit} positions and the model's context {limit}; shorten the prompt"):
        tiny_model.encode_prompt(Document((Text("ball " * (limit - 3)),)))
    assert len(tiny_model.encode_example(fits, Document(()))) == limit
    with pytest.raises(ValueError, match=f"the example has {limit + 1} positions"):
        tiny_model.encode_example(fits, Document((Text("ball"),)))


def test_words_in_a_prompt_cannot_become_special_tokens(tiny_model):
    special = set(range(8)) - {1}  # all but <unk>
    for token in ("<vis>", "</vis>", "<eos>", "<assistant>", "<pad>"):
        assert not special & set(tiny_model.encode_text(f"the {token} ball"))
