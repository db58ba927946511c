"""Janus, Emu3, Chameleon and VILA-U: against transformers' own classes, and what we promise of every family."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from family_data import SIZE, answer, drawn, eager, params, picture, prompts
from safetensors.torch import load_file
from transformers import AutoProcessor, ChameleonForConditionalGeneration, Emu3ForConditionalGeneration, JanusForConditionalGeneration

from diptych.config import SamplingParams
from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel, load_model
from diptych.sampling.engine import sample
from diptych.sampling.logprobs import score
from diptych.tokens import AnswerForm, Modality, TokenRow, collate

DATA = Path(__file__).parent / "data" / "vila_u"
STOCK = {"janus": JanusForConditionalGeneration, "emu3": Emu3ForConditionalGeneration, "chameleon": ChameleonForConditionalGeneration}


@pytest.fixture
def model(models, family) -> Iterator[UnifiedModel]:
    with eager(models[family]) as model:
        yield model


def roll(model: UnifiedModel, settings: SamplingParams, group: int = 6):
    rows = [model.encode_prompt(document) for document in prompts()]
    return sample(model, rows, settings, num_generations=group, generator=torch.Generator().manual_seed(0))


def stock_ids(model: UnifiedModel, row: TokenRow) -> torch.Tensor:
    """The sequence as ids of one vocabulary, worked out from the vocabulary map alone."""
    vocabulary_map = model.hf.config.vocabulary_map
    if model.family == "emu3":
        of_code = {int(name[-8:-2]): i for name, i in vocabulary_map.items() if name.startswith("<|visual token")}
    else:
        letters = {chr(ord("A") + digit): str(digit) for digit in range(10)}
        of_code = {int("".join(letters[c] for c in name[6:-1])): i for name, i in vocabulary_map.items() if name.startswith("IMGIMG")}
    ids = [
        of_code[int(code)] if kind == Modality.IMAGE else int(text)
        for text, code, kind in zip(row.text_ids, row.codes[:, 0], row.modality, strict=True)
    ]
    return torch.tensor([ids])


# --- against the stock classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emu3", "chameleon"])
def test_one_vocabulary_logits_equal_a_plain_forward_of_the_stock_backbone_and_head(models, folders, name):
    model = models[name]
    row = model.encode_example(prompts()[1], answer())
    ids = stock_ids(model, row)
    stock = STOCK[name].from_pretrained(folders[name]).eval()
    decoder = stock.model.text_model if name == "emu3" else stock.model
    with torch.no_grad():
        expected = stock.lm_head(decoder(input_ids=ids).last_hidden_state)[0]  # (T, V), nothing masked
        batch = collate([row])
        hidden = model.backbone(model.embed(batch), batch.position_ids, batch.attention_mask)[0]
        torch.testing.assert_close(model.text_logits(hidden), expected, atol=1e-4, rtol=0)
        code_ids = [int(stock_ids(model, TokenRow.image(torch.tensor([[code]])))[0, 0]) for code in range(model.image_spec.codebook_size)]
        for logits in (
            model.image_logits(hidden, torch.zeros(len(hidden), 1, dtype=torch.long))[:, 0],
            model.image_step(hidden, hidden[:, :0]),
        ):
            torch.testing.assert_close(logits, expected[:, code_ids], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["emu3", "chameleon", "janus"])
def test_prompts_equal_the_stock_processor_and_forward(models, folders, name):
    """Tokens of prompts with pictures, picture codes or features included, from the family's own processor and model."""
    model, processor = models[name], AutoProcessor.from_pretrained(folders[name])
    stock = STOCK[name].from_pretrained(folders[name]).eval()
    marker = {"janus": "<image_placeholder>", "emu3": "<image>", "chameleon": "<image>"}[name]
    document = prompts()[1]
    if name == "chameleon":
        text, extra = f"{marker}{document.segments[1].text}", {}
    else:
        content = [{"type": "image"}, {"type": "text", "text": document.segments[1].text}]
        text, extra = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True), {}
    inputs = processor(images=[document.images[0].pixels], text=[text], return_tensors="pt", **extra)
    row = model.encode_prompt(document)
    assert len(row) == inputs["input_ids"].shape[1]
    placeholder = model.tokenizer.get_vocab()[marker]
    real = inputs["input_ids"][0] != placeholder
    if name != "emu3":  # whose row separators are placeholders too
        assert torch.equal(inputs["input_ids"][0][real], row.text_ids[row.modality == Modality.TEXT])
    if name == "janus":  # the stock processor rounds sides that DeepSeek's code, and ours, cuts off (test_janus_deepseek.py)
        inputs["pixel_values"] = torch.stack(row.pixels)
    with torch.no_grad():
        hidden = (stock.model.text_model if name == "emu3" else stock.model)(**inputs) if name != "emu3" else stock.model(**inputs)
        batch = collate([row])
        ours = model.backbone(model.embed(batch), batch.position_ids, batch.attention_mask)
        torch.testing.assert_close(ours, hidden.last_hidden_state, atol=1e-4, rtol=0)
        if name == "janus":
            torch.testing.assert_close(model.text_logits(ours), stock(**inputs).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_janus_draws_what_transformers_generate_draws(models, folders, scale):
    model, stock = models["janus"], JanusForConditionalGeneration.from_pretrained(folders["janus"]).eval()
    for document in (prompts()[0], Document((Text("a much longer prompt about a red cat on a mat"),))):
        row = model.encode_prompt(document, AnswerForm.IMAGE)
        ids = row.text_ids[None]
        expected = stock.generate(
            ids, attention_mask=torch.ones_like(ids), generation_mode="image", guidance_scale=scale, do_sample=False,
            bos_token_id=model.tokenizer.bos_token_id, pad_token_id=model.tokenizer.pad_token_id,
        )[0]  # fmt: skip
        rollout = drawn(model, row, params(scale).greedy())
        assert rollout.document.images[0].codes[:, 0].tolist() == expected.tolist()
        pixels = stock.decode_image_tokens(expected[None]).permute(0, 3, 1, 2)
        torch.testing.assert_close(model.decode_codes(rollout.document.images[0].codes[None]), pixels, atol=1e-5, rtol=0)


def test_emu3_draws_what_transformers_generate_draws(models, folders):
    """Stock generation from the caption alone, with the constraint that the model card gives: codes, a separator after each row, then the
    end tokens."""
    model, stock = models["emu3"], Emu3ForConditionalGeneration.from_pretrained(folders["emu3"]).eval()
    processor = AutoProcessor.from_pretrained(folders["emu3"])
    row = model.encode_prompt(prompts()[0], AnswerForm.IMAGE)
    inputs = processor(text=[prompts()[0].text], return_for_image_generation=True, ratio="1:1", image_area=32 * 32, return_tensors="pt")
    side, begin = 4, inputs["input_ids"].shape[1]
    codes, mapping = stock.vocabulary_mapping.image_tokens, stock.vocabulary_mapping

    def legal(_, ids):
        at = len(ids) - begin
        return [mapping.eol_token_id] if (at + 1) % (side + 1) == 0 else codes

    generated = stock.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], prefix_allowed_tokens_fn=legal,
        max_new_tokens=side * (side + 1), do_sample=False,
    )[0, begin:]  # fmt: skip
    rollout = drawn(model, row, params(1.0).greedy())
    answered = rollout.row[len(row) :]
    assert torch.equal(inputs["input_ids"][0], torch.cat([row.text_ids, answered.text_ids[: begin - len(row)]]))
    grid = mapping.convert_bpe2img(generated.view(side, side + 1))
    assert rollout.document.images[0].codes[:, 0].tolist() == grid.flatten().tolist()
    assert not answered.completion_mask[answered.text_ids == mapping.eol_token_id].any()
    assert int((answered.text_ids == mapping.eol_token_id).sum()) == side


# --- promises, for every family ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [params(), params(3.0), params(2.0, image_guidance_scale=1.4)], ids=["own", "guided", "three-way"])
def test_what_was_sampled_is_what_is_scored(model, settings):
    rollouts = roll(model, settings)
    assert sum(len(r.document.images) for r in rollouts) >= 4
    assert len({len(r.document.images) for r in rollouts}) >= 2
    batch = collate([r.row for r in rollouts])
    sampled = torch.nn.utils.rnn.pad_sequence([r.rollout_logprobs for r in rollouts], batch_first=True)
    with torch.no_grad():
        gap = (score(model, batch, settings).logprobs - sampled).abs()[batch.choice_mask]
        ignored = score(model, batch, settings, guided=False).logprobs
    assert gap.max() <= 1e-4
    if settings.image.guidance_scale != 1 and (settings.image.guidance_scale or model.default_sampling.image.guidance_scale != 1):
        assert (ignored - sampled).abs()[batch.choice_mask].max() > 0.05


def test_a_batch_may_have_rows_without_pictures(model):
    """Micro-batches cut a batch anywhere; families that read pictures as features then have none to read."""
    rows = [model.encode_example(document, answer()) for document in prompts()]
    batch = collate(rows)
    with torch.no_grad():
        together = score(model, batch).logprobs
        for i in range(len(rows)):
            alone = score(model, batch[[i]]).logprobs[0]
            torch.testing.assert_close(together[i, : len(alone)], alone, atol=5e-5, rtol=0)


def test_the_picture_branch_of_three_way_guidance_holds_the_pictures_and_no_words(model):
    """Every picture of the prompt and of the answer so far, in order; Janus' at their own places in a padded prompt."""
    from diptych.sampling.guidance import branch_prefixes

    prompt = model.encode_prompt(prompts()[2])
    context = TokenRow.concat([prompt, model.encode_segments(answer(), answer=True)[:-1]])
    bare, seen = branch_prefixes(model, params(2.0, image_guidance_scale=1.5).image, len(prompt), lambda: context)
    pictures = (context.modality == Modality.IMAGE) | (context.modality == Modality.FEATURE)
    kept = (seen.modality == Modality.IMAGE) | (seen.modality == Modality.FEATURE)
    assert torch.equal(seen.codes[kept], context.codes[pictures])
    assert seen.pixels == context.pixels
    assert not seen.completion_mask.any()
    begins = int((context.text_ids[context.modality == Modality.TEXT] == model.image_spec.begin_id).sum())
    assert int((seen.text_ids[seen.modality == Modality.TEXT] == model.image_spec.begin_id).sum()) == begins + 1
    words = set(model.encode_text("look at this and then a bird.")) - {i for i in model.image_spec.layout if i >= 0}
    assert not words & set(seen.text_ids[len(model.unconditional_prompt(len(prompt))) :].tolist()) - set(
        model.encode_text("0123456789* \n")
    )
    if model.family == "janus":
        assert torch.equal(kept[: len(prompt)], pictures[: len(prompt)])
        assert len(seen) < len(context)
    assert int(bare.text_ids[-1]) == model.image_spec.begin_id


def test_rows_do_not_depend_on_their_batch(model):
    rollouts = roll(model, params(2.0), group=2)
    with torch.no_grad():
        together = score(model, collate([r.row for r in rollouts]), params(2.0)).logprobs
        for i, rollout in enumerate(rollouts):
            alone = score(model, collate([rollout.row]), params(2.0)).logprobs[0]
            torch.testing.assert_close(together[i, : len(alone)], alone, atol=5e-5, rtol=0)


def test_greedy_rows_do_not_depend_on_prefill_and_compaction(model):
    rows, greedy = [model.encode_prompt(document) for document in prompts()], params(2.0).greedy()
    together = sample(model, rows, greedy, generator=torch.Generator())
    for row, rollout in zip(rows, together, strict=True):
        alone = sample(model, [row], greedy, generator=torch.Generator())[0]
        assert torch.equal(alone.row.text_ids, rollout.row.text_ids)
        assert torch.equal(alone.row.codes, rollout.row.codes)


def test_only_legal_tokens_are_sampled_and_pictures_are_whole(model):
    spec, forbidden = model.image_spec, set(model.forbidden_text_ids())
    assert spec.begin_id not in forbidden
    assert model.eos_id not in forbidden
    assert set(spec.layout) & set(range(model.vocab_size)) - {spec.end_id} <= forbidden | set(model.encode_text("0123456789*"))
    for rollout in roll(model, params(), group=8):
        row = rollout.row[rollout.prompt_length :]
        chosen = row.text_ids[row.completion_mask & (row.modality == Modality.TEXT)].tolist()
        assert not set(chosen) & forbidden
        assert int((row.modality == Modality.IMAGE).sum()) == len(rollout.document.images) * spec.num_positions
        forced = row.text_ids[~row.completion_mask].tolist()
        assert forced == [i for i in spec.layout if i >= 0] * len(rollout.document.images)


def test_text_comes_back_and_makes_no_special_tokens(model):
    for text in ("a red cat.", "Two words, 3 numbers: 10*4", "naïve café"):
        assert model.decode_text(model.encode_text(text)).strip() == text
    begin = model.image_spec.begin_id
    special = model.tokenizer.convert_ids_to_tokens([begin])[0]
    assert begin not in model.encode_text(f"a {special} b")
    assert begin not in model.encode_prompt(Document((Text(f"a {special} b"),))).text_ids


def test_examples_train_the_answer_and_dropped_captions_are_the_unconditional_branch(model):
    drawing = Document((Image(picture(7)),))
    row = model.encode_example(prompts()[1], drawing)
    prompt = model.encode_prompt(prompts()[1])
    assert not row.completion_mask[: len(prompt)].any()
    assert int((row.completion_mask & (row.modality == Modality.IMAGE)).sum()) == model.image_spec.num_positions
    dropped = model.encode_example(prompts()[1], drawing, unconditional=True)
    kept = model.unconditional_row(len(prompt), lambda: prompt)
    ids = model.unconditional_prompt(len(prompt)) if kept is None else kept.text_ids.tolist()  # as guidance has it
    assert dropped.text_ids[: len(ids)].tolist() == ids
    assert dropped[len(ids) :].text_ids.tolist() == row[len(prompt) :].text_ids.tolist()


def test_pictures_of_any_mode_and_shape_are_read(model):
    import PIL.Image

    for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"):
        image = PIL.Image.new(mode, (23, 57)) if mode == "I;16" else picture(9, 23, 57).convert(mode)
        row = model.encode_prompt(Document((Image(image), Text("what is it?"))))
        model.encode_segments(Document((Image(image),)), answer=True)
        assert len(row) < model.max_positions
    tiny = model.encode_segments(Document((Image(PIL.Image.new("RGB", (1, 3))),)), answer=True)
    assert int((tiny.modality == Modality.IMAGE).sum()) == model.image_spec.num_positions


def test_more_pictures_than_the_context_holds(model):
    many = Document((*[Image(picture(1))] * (model.max_positions // model.image_spec.num_positions), Text("look")))
    with pytest.raises(ValueError, match=r"positions \(\d+ pictures of \d+ positions each\) and the model's context"):
        model.encode_prompt(many)
    with pytest.raises(ValueError, match="lower max_images"):
        sample(model, [model.encode_prompt(prompts()[0])], SamplingParams(max_images=60), generator=torch.Generator())


def test_a_saved_model_loads_in_its_home_code_with_equal_logits(models, family, folders, tmp_path):
    model = models[family]
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    trained.save(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    batch = collate([model.encode_example(prompts()[1], answer())])
    with torch.no_grad():
        expected = score(trained, batch).logprobs
        assert torch.equal(score(again, batch).logprobs, expected)
        assert not torch.equal(score(model, batch).logprobs, expected)
    assert again.image_spec == model.image_spec  # a chosen picture size is kept
    if family in STOCK:
        stock, report = STOCK[family].from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ours = {f"hf.{name}": value for name, value in stock.state_dict().items()}
        assert all(torch.equal(trained.state_dict()[name], value) for name, value in ours.items())
        AutoProcessor.from_pretrained(tmp_path / "saved")
    else:
        keys = {}
        for part in ("llm", "vision_tower", "mm_projector"):
            before = {k: v.shape for file in (folders[family] / part).glob("*.safetensors") for k, v in load_file(file).items()}
            after = {k: v.shape for file in (tmp_path / "saved" / part).glob("*.safetensors") for k, v in load_file(file).items()}
            keys[part] = before == after
        assert keys == {"llm": True, "vision_tower": True, "mm_projector": True}
        for name in ("config.json", "llm/config.json", "llm/tokenizer.model", "vision_tower/config.json"):
            assert (
                json.loads((folders[family] / name).read_text()) == json.loads((tmp_path / "saved" / name).read_text())
                if name.endswith("json")
                else (folders[family] / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
            )


def test_weights_load_in_the_dtype_that_was_asked_for(folders, family):
    model = load_model(folders[family], dtype="bfloat16", image_size=SIZE.get(family))
    assert model.dtype == torch.bfloat16
    rollout = sample(model, [model.encode_prompt(prompts()[1])], params(2.0), generator=torch.Generator().manual_seed(1))[0]
    assert torch.isfinite(rollout.rollout_logprobs).all()


def test_chameleon_with_swin_norm(tmp_path):
    from toy_checkpoints import make_chameleon

    model = load_model(make_chameleon(tmp_path / "swin", swin_norm=True))
    rollouts = roll(model, params(2.0), group=2)
    batch = collate([r.row for r in rollouts])
    sampled = torch.nn.utils.rnn.pad_sequence([r.rollout_logprobs for r in rollouts], batch_first=True)
    assert (score(model, batch, params(2.0)).logprobs - sampled).abs()[batch.choice_mask].max() <= 1e-4


def test_emu3_draws_in_the_size_that_was_asked_for(folders):
    assert load_model(folders["emu3"], image_size=24).image_spec.num_positions == 9
    for size in (30, 0, -8):
        with pytest.raises(ValueError, match=f"image_size={size} is no multiple of the 8 pixels"):
            load_model(folders["emu3"], image_size=size)
    with pytest.raises(ValueError, match="janus draws pictures of 32 pixels a side only"):
        load_model(folders["janus"], image_size=64)


def test_loading_does_not_double_the_memory(tmp_path):
    """Anonymous memory (mapped files do not count), watched while 150 MB of weights load in a process of their own."""
    script = Path(__file__).parent / "watch_loading.py"
    found = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    weights, peak, kept = map(float, found.stdout.split())
    assert weights > 140
    assert peak < 1.25 * weights + 20
    assert kept < peak + 1
