"""VILA-U's adapter against recordings of the official code and the text of its specification."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_data import drawn, params, picture, prompts
from safetensors.torch import load_file

from diptych.config import TextSampling
from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel, load_model
from diptych.models.vila_u.model import SYSTEM
from diptych.tokens import AnswerForm, Modality, TokenRow, collate
from diptych.training.supervised import supervised_gradient

DATA = Path(__file__).parent / "data" / "vila_u"


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(DATA / "reference_fp32.safetensors"), json.loads((DATA / "reference_fp32.json").read_text())


@pytest.fixture
def released() -> UnifiedModel:
    return load_model(DATA / "toy_checkpoint")


def with_placeholders(row: TokenRow) -> list[int]:
    """-200 for each picture, as the official code marks them."""
    ids: list[int] = []
    for text, kind in zip(row.text_ids.tolist(), row.modality.tolist(), strict=True):
        if kind == Modality.TEXT:
            ids.append(text)
        elif not ids or ids[-1] != -200:
            ids.append(-200)
    return ids


def test_vila_u_prompts_and_pieces(released, recorded):
    released.wrap_prompt_images = False  # as the official inference code
    codes = torch.zeros(16, 4, dtype=torch.long)
    for case in recorded[1]["conversation_prompts"]:
        num_images = case["user"].count("<image>")
        text = Text(case["user"].replace("<image>\n", ""))
        row = released.encode_prompt(Document((*[Image(codes=codes)] * num_images, text)))
        tail = {"text": [], "image_generation": [released.token_id("▁"), released.image_spec.begin_id]}
        if case["kind"] in tail:
            assert with_placeholders(row) + tail[case["kind"]] == case["ids"]
    for case in recorded[1]["tokenizer_image_token"]:
        pieces = [released.piece_ids(piece) for piece in case["text"].split("<image>")]
        ids = [1, *pieces[0], *(i for piece in pieces[1:] for i in (-200, *piece))]
        assert ids == case["ids"]


def test_vila_u_answers_are_laid_out_as_in_its_training_data(released):
    codes = Image(codes=torch.zeros(16, 4, dtype=torch.long))
    row = released.encode_segments(Document((Text("step:"), codes, Text("then a bird."))), answer=True)
    official = "step: <im_start><image><im_end>\nthen a bird.</s>"  # in the recordings
    pieces = [released.piece_ids(piece) for piece in official.split("<image>")]
    assert with_placeholders(row) == [*pieces[0], -200, *pieces[1]]
    first = released.encode_segments(Document((codes,)), answer=True)  # "ASSISTANT: <im_start><image><im_end></s>"
    assert with_placeholders(first) == [released.token_id("▁"), 400, -200, 401, 2]
    assert first.completion_mask[[0, 1]].all()  # the space and the choice to draw are trained
    assert not first.completion_mask[first.text_ids == 401].any()  # <im_end> is forced


def test_vila_u_draws_what_the_official_code_drew(released, recorded):
    tensors, facts = recorded
    row = released.encode_prompt(Document((Text(facts["image_generation_cfg3_prompt"]),)), AnswerForm.IMAGE)
    conditional = tensors["image_generation_cfg3.input_ids"][0][tensors["image_generation_cfg3.attention_mask"][0].bool()]
    assert row.text_ids.tolist() == conditional.tolist()  # the space and the begin token too
    rollout = drawn(released, row, params(3.0).greedy())
    assert torch.equal(rollout.document.images[0].codes, tensors["image_generation_cfg3.codes"][0])
    unconditional = tensors["image_generation_cfg3.input_ids"][1][tensors["image_generation_cfg3.attention_mask"][1].bool()]
    assert [*released.unconditional_prompt(len(row)), 400] == unconditional.tolist()
    raw = released.decode_codes(rollout.document.images[0].codes[None])
    expected = tensors["image_generation_cfg3.pixels_float_0_255"]
    torch.testing.assert_close(((raw + 1) * 127.5).clamp(0, 255), expected, atol=2e-2, rtol=0)


def test_vila_u_backbone_with_left_padding_equals_the_recorded_states(released, recorded):
    """The official run is left-padded: masks with holes at the left, and positions that count real tokens."""
    tensors, _ = recorded
    ids, mask = tensors["image_generation_cfg3.input_ids"], tensors["image_generation_cfg3.attention_mask"].bool()
    codes = tensors["image_generation_cfg3.codes"].expand(2, -1, -1)  # both halves receive the same codes
    embeds = torch.cat([released.embed_text(ids), released.embed_codes(codes.flatten(0, 1)).unflatten(0, (2, 16))], dim=1)
    mask = torch.cat([mask, torch.ones(2, 16, dtype=torch.bool)], dim=1)
    positions = (mask.long().cumsum(1) - 1).masked_fill(~mask, 1)
    with torch.no_grad():
        hidden = released.backbone(embeds, positions, mask)
    torch.testing.assert_close(hidden[:, ids.shape[1] - 1 : -1], tensors["image_generation_cfg3.llm_hidden_states"], atol=1e-4, rtol=0)


def test_vila_u_pictures_are_prepared_as_in_the_release(released, recorded):
    import PIL.Image

    tensors, _ = recorded
    for shape in ("land", "port", "sq", "sq2"):
        image = PIL.Image.fromarray(tensors[f"preprocess.{shape}.uint8_hwc"].numpy())
        torch.testing.assert_close(released.prompt_pixels(image), tensors[f"preprocess.{shape}.resize"], atol=1e-4, rtol=0)
        torch.testing.assert_close(released.target_pixels(image), tensors[f"preprocess.{shape}.generation_crop"], atol=1e-4, rtol=0)
        released.pads = True
        torch.testing.assert_close(released.prompt_pixels(image), tensors[f"preprocess.{shape}.pad"], atol=1e-4, rtol=0)
        released.pads = False


def test_vila_u_sampling_distribution_is_the_releases(recorded):
    from diptych.sampling.distribution import log_distribution

    tensors, _ = recorded
    cases = {"t0.7_k50_p0.8": (0.7, 50, 0.8), "t1.3_k900": (1.3, 900, 1.0), "t1_k900_p0.96": (1.0, 900, 0.96), "t1_p0.5": (1.0, 0, 0.5)}
    for name, (temperature, top_k, top_p) in cases.items():
        found = log_distribution(tensors["sampler.logits"], TextSampling(temperature=temperature, top_k=top_k, top_p=top_p)).exp()
        torch.testing.assert_close(found, tensors[f"sampler.probs.{name}"], atol=1e-6, rtol=0)


def test_vila_u_training_loss_is_text_mean_plus_image_mean(released):
    """Section 7 of the spec, written out: shifted cross-entropy on plane 0, and the depth transformer over <im_start> to the
    second-to-last image token, both unweighted means."""
    row = released.encode_example(prompts()[0], Document((Text("a cat."), Image(picture(1)))))
    batch = collate([row])
    released.zero_grad()
    losses = supervised_gradient(released, batch, text_weight=1.0, image_weight=1.0)
    with torch.no_grad():
        pieces = []
        for text, codes, kind in zip(row.text_ids, row.codes, row.modality, strict=True):
            vector = sum(released.vision.quantizer.code_vectors(d)[code] for d, code in enumerate(codes))
            pieces.append(released.projector(vector) if kind == Modality.IMAGE else released.llm.model.embed_tokens.weight[text])
        hidden = released.llm.model(inputs_embeds=torch.stack(pieces)[None]).last_hidden_state[0]
        logits = released.llm.lm_head(hidden)
        targets = [t for t in range(1, len(row)) if row.completion_mask[t] and row.modality[t] == Modality.TEXT]
        text_loss = torch.nn.functional.cross_entropy(logits[[t - 1 for t in targets]], row.text_ids[targets])
        places = (row.modality == Modality.IMAGE).nonzero().flatten()
        depth_logits = released.image_logits(hidden[places - 1], row.codes[places])  # (16, 4, K)
        image_loss = torch.nn.functional.cross_entropy(depth_logits.flatten(0, 1), row.codes[places].flatten())
    assert losses["loss/text"] == pytest.approx(float(text_loss), abs=1e-5)
    assert losses["loss/image"] == pytest.approx(float(image_loss), abs=1e-5)


def test_vila_u_pictures_in_any_order_are_laid_out_as_in_its_training_data(released):
    """The official preprocessing strips every text and puts a space before and a new line after each wrapped picture."""
    codes = Image(codes=torch.zeros(16, 4, dtype=torch.long))

    def ids(official: str) -> list[int]:
        pieces = [released.piece_ids(piece) for piece in official.split("<image>")]
        return [*pieces[0], *(i for piece in pieces[1:] for i in (-200, *piece))]

    wrapped, system = "<im_start><image><im_end>\n", f"{SYSTEM} USER: "
    look = released.encode_prompt(Document((Text("look "), codes, Text("and"), codes)))
    assert with_placeholders(look) == [1, *ids(f"{system}look {wrapped}and {wrapped.strip()} ASSISTANT:")]
    two = released.encode_prompt(Document((codes, codes, Text("which?"))))
    assert with_placeholders(two) == [1, *ids(f"{system}{wrapped} {wrapped}which? ASSISTANT:")]
    told = released.encode_segments(Document((Text("a cat.\n"), codes, codes, Text(" then "))), answer=True)
    assert with_placeholders(told) == ids(f"a cat. {wrapped} {wrapped}then</s>")


def test_vila_us_bare_prompt_pictures_are_in_the_picture_branch(released):
    from diptych.sampling.guidance import branch_prefixes

    released.wrap_prompt_images = False
    prompt = released.encode_prompt(prompts()[2])
    _, seen = branch_prefixes(released, params(2.0, image_guidance_scale=1.5).image, len(prompt), lambda: prompt)
    assert torch.equal(seen.codes[seen.modality == Modality.IMAGE], prompt.codes[prompt.modality == Modality.IMAGE])
