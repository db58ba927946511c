"""Emu3.5's adapter against recordings of the official code on its toy checkpoint."""

from __future__ import annotations

import hashlib
import itertools
import random
import re

import numpy as np
import PIL.Image
import pytest
import torch
from emu3_5_data import (
    DATA,
    FACTS,
    FIRST,
    IDS,
    RECORDED,
    TOY,
    answer_row,
    close,
    collated,
    copy_toy,
    ids_of,
    logits_of,
    prompt_row,
    recorded_picture,
    settings_of,
)
from transformers import Qwen3ForCausalLM

from diptych.config import ImageSampling, SamplingParams, TextSampling
from diptych.document import Document, Image, Text
from diptych.models import load_model
from diptych.models.emu3_5 import config as configs
from diptych.models.emu3_5 import tokenizer as words
from diptych.models.emu3_5.model import Emu35Model, smart_size
from diptych.models.emu3_5.prompts import SAMPLING
from diptych.models.emu3_5.vision import VisionTokenizer
from diptych.sampling.distribution import log_distribution
from diptych.sampling.engine import sample
from diptych.sampling.guidance import branch_prefixes, mix
from diptych.sampling.logprobs import score
from diptych.tokens import AnswerForm, Modality, TokenRow

QUESTION = "How do I fold a paper boat?"
RUNS = {name: tuple(facts["height_width_used"]) for name, facts in FACTS["generation"].items()}  # and the grid that was drawn in


@pytest.fixture(scope="module")
def emu() -> Emu35Model:
    found = load_model(TOY, image_size=64)
    assert isinstance(found, Emu35Model)
    return found


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """The toy in a grid and for a task, by `diptych.json`."""
    made: dict[tuple, Emu35Model] = {}

    def load(grid: tuple[int, int], task: str) -> Emu35Model:
        if (grid, task) not in made:
            found = load_model(copy_toy(tmp_path_factory.mktemp("emu"), grid=grid, task=task))
            assert isinstance(found, Emu35Model)
            made[grid, task] = found
        return made[grid, task]

    return load


def prompt_of(run: str) -> Document:
    facts = FACTS["generation"][run]
    written = re.sub(r"<\|image start\|>.*?<\|image end\|>", "", facts["prompt"])
    (question,) = re.findall(r"USER: (.*) ASSISTANT:", written)
    return Document((Text(question), *(Image(recorded_picture(name)) for name in facts["references"])))


# --- words ---------------------------------------------------------------------------------------------------------------


def test_the_tokenizer_has_the_official_ids_and_strings(emu):
    tokenizer = emu.tokenizer
    for case in FACTS["tokenizer"]:
        if "visual token 000" in case["text"]:  # codes are no tokens here, so that no text becomes one
            assert [emu.token_id("<|image end|>") + 1 + int(part[:6]) for part in case["text"].split("token ")[1:]] == case["ids"]
            continue
        ids = tokenizer.encode(case["text"], add_special_tokens=False)
        assert ids == case["ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == case["decoded_skip_special"]
        if not set(ids) & emu.controls.keys():
            assert emu.encode_text(case["text"]) == case["ids"]
    named = {"BOS": words.BOS, "EOS": words.EOS, "PAD": words.PAD, "EOL": words.ROW_END, "IMG": words.SIZE_END, "BOI": words.BEGIN}
    named |= {"EOI": words.END, "BSS": words.BEGIN_ANSWER, "ESS": words.END_ANSWER}
    (named["BOG"], named["EOG"]), (named["BOC"], named["EOC"]) = words.THOUGHTS
    assert {name: emu.token_id(token) for name, token in named.items()} == {name: IDS[name] for name in named}
    assert emu.vocab_size == FIRST == IDS["BOV"]


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a whole piece that is a token stays; otherwise the leftmost pair of the lowest rank is joined, again and again."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while pairs := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def test_pieces_are_merged_as_by_tiktoken(emu):
    ranks = {token: rank for rank, token in enumerate(words.read_ranks(TOY / words.RANKS))}
    source = random.Random(0)
    letters = [token.decode() for token in ranks if token.isascii() and token.isalpha()]
    for _ in range(500):
        piece = "".join(source.choices(letters, k=source.randint(1, 6))) if source.random() < 0.8 else "aé日🦊"[source.randint(0, 3)] * 3
        if piece.isalpha():
            assert emu.tokenizer.encode(piece, add_special_tokens=False) == merged(piece.encode(), ranks), piece


def test_a_piece_that_is_a_token_stays_whole_and_digits_stand_alone():
    """Neither shows on the toy's ranks."""
    single = [bytes([i]) for i in range(256)]
    built = words.build_tokenizer([*single, b"12", b"xyz"])
    assert built.encode("xyz12", add_special_tokens=False) == [257, *b"12"]


def test_user_text_never_becomes_a_control_token(emu):
    for token in ("<|visual token 000003|>", "<|image start|>", "<|extra_100|>", "<|extra_60|>", "<|endoftext|>"):
        ids = emu.encode_text(f"a {token} b")
        assert max(ids) < IDS["PAD"]
        assert emu.decode_text(ids) == f"a {token} b"
        plain, spelled = (emu.encode_prompt(Document((Text(text),))).text_ids for text in ("x", f"x{token}"))
        assert [i for i in spelled.tolist() if i in emu.controls] == [i for i in plain.tolist() if i in emu.controls]


def test_thoughts_are_no_words_of_the_document(emu):
    for case in FACTS["multimodal_decode"]:
        if case["text"].count("<|image start|>") != case["text"].count("<|image end|>"):
            continue  # an unfinished picture, which the official code drops with the text before it, is never sampled here
        texts = []
        for piece in case["text"].split("<|image start|>"):
            ids = emu.tokenizer.encode(piece.split("<|image end|>")[-1], add_special_tokens=False)
            texts.append(emu.decode_text(ids).strip())
        assert [text for text in texts if text] == [text.strip() for kind, text in case["segments"] if kind == "text"]
    begun = [*emu.encode_text("seen"), IDS["BOC"], *emu.encode_text("thought")]
    assert emu.decode_text(begun) == "seen"


# --- prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FACTS["prompts"]))
def test_prompts_have_the_official_ids(emu, name, monkeypatch):
    facts, task = FACTS["prompts"][name], name.split(".")[0]
    monkeypatch.setattr(emu, "options", emu.options.model_copy(update={"task": task}))
    pictures = [Image(recorded_picture(picture)) for picture in facts["images"]]
    for document in (Document((Text(facts["question"]), *pictures)), Document((*pictures, Text(facts["question"])))):
        row = emu.encode_prompt(document)
        assert ids_of(row) == facts["ids"]
    assert ids_of(emu.unconditional_row(len(row), lambda: row)) == facts["unconditional_ids"]
    if not pictures:
        assert emu.unconditional_prompt(len(row)) == facts["unconditional_ids"]


def test_a_picture_alone_is_asked_for_as_t2i_or_x2i(emu):
    for name, task in (("text", "t2i"), ("with_image", "x2i")):
        facts = FACTS["prompts"][f"{task}.{name}"]
        document = Document((Text(facts["question"]), *(Image(recorded_picture(picture)) for picture in facts["images"])))
        assert ids_of(emu.encode_prompt(document, AnswerForm.IMAGE)) == [*facts["ids"], IDS["BOI"]]
        story = FACTS["prompts"][f"story.{name}"]["ids"]
        for form in (AnswerForm.FREE, AnswerForm.TEXT, AnswerForm.TEXT_IMAGE):
            assert ids_of(emu.encode_prompt(document, form)) == story


def test_pictures_between_texts_keep_their_places_and_texts_that_touch_are_joined(emu):
    picture, codes = Image(recorded_picture("land")), FACTS["images"]["land"]["block_ids"]
    row = emu.encode_prompt(Document((Text("look"), picture, Text("and"), picture)))
    look, also = (emu.encode_text(text) for text in ("look", "and"))
    ids = ids_of(row)
    at = ids.index(IDS["BOI"])
    assert ids[at : at + 2 * len(codes) + len(also)] == [*codes, *also, *codes]
    assert emu.tokenizer.decode(ids[:at]).endswith("USER: look") or ids[at - len(look) : at] == look
    assert ids_of(emu.encode_prompt(Document((Text("look"), Text("here"))))) == ids_of(emu.encode_prompt(Document((Text("look here"),))))


def test_how_the_release_samples():
    assert Emu35Model.default_sampling == SAMPLING["story"]
    story, howto, t2i = (SAMPLING[task] for task in ("story", "howto", "t2i"))
    assert (story.text.top_k, story.text.top_p, story.text.temperature) == (1024, 0.9, 1.0)
    assert (story.image.top_k, story.image.top_p, story.image.guidance_scale) == (10240, 1.0, 3.0)
    assert (howto.text.top_k, howto.text.top_p, howto.text.temperature) == (200, 0.8, 0.7)
    assert (t2i.image.top_k, t2i.image.guidance_scale) == (5120, 5.0)


# --- pictures ------------------------------------------------------------------------------------------------------------


def test_sizes_of_prompt_pictures():
    for width, height, area, wide, high in FACTS["smart_resize_cases_w_h_area_newW_newH"]:
        assert smart_size(width, height, area, 16) == (wide, high)
    assert smart_size(2000, 10, 6144, 16) == (1008, 16)  # where the official code would take a side of 0 pixels


@pytest.mark.parametrize("name", ["land", "port", "square"])
def test_pictures_to_codes_and_back(emu, name):
    facts, codes = FACTS["images"][name], RECORDED[f"vq.{name}.codes"].long()
    pixels = emu.prompt_pixels(recorded_picture(name))
    assert torch.equal(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0), RECORDED[f"image.{name}.resized"])
    assert torch.equal(pixels, RECORDED[f"vq.{name}.pixel_values"])
    with torch.no_grad():
        close(emu.vision_tokenizer.latents(pixels), RECORDED[f"vq.{name}.latent"])
    assert torch.equal(emu.vision_tokenizer.encode(pixels), codes)
    close(emu.vision_tokenizer.quantize.embedding(codes).permute(2, 0, 1).detach(), RECORDED[f"vq.{name}.quant"])
    close(emu.vision_tokenizer.decode(codes), RECORDED[f"vq.{name}.decoded"])
    drawn = ((emu.vision_tokenizer.decode(codes).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)  # cut off, as the official code does
    assert (drawn.int() - RECORDED[f"vq.{name}.uint8"].int()).abs().max() <= 1
    assert ids_of(emu.picture_row(Image(recorded_picture(name)))) == facts["block_ids"]
    drawn_row = emu.image_spec.row(torch.zeros(16, 1), chosen=True, step=0, begin_step=0)
    assert ids_of(drawn_row)[:5] == [IDS["BOI"], 19, 9, 19, IDS["IMG"]]
    assert ids_of(drawn_row)[-1] == IDS["EOI"]
    assert ids_of(drawn_row).count(IDS["EOL"]) == 3


def test_codes_are_found_in_float32_and_not_in_tf32(emu, tmp_path):
    half = load_model(TOY, dtype="bfloat16", image_size=64)
    assert half.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in half.vision_tokenizer.parameters())
    pixels, conv, seen = RECORDED["vq.port.pixel_values"], torch.backends.cudnn.conv, []
    before = conv.fp32_precision
    hook = half.vision_tokenizer.encoder.register_forward_hook(lambda *_: seen.append(conv.fp32_precision))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half.vision_tokenizer.encode(pixels), RECORDED["vq.port.codes"].long())
        close(half.vision_tokenizer.decode(RECORDED["vq.port.codes"].long()), RECORDED["vq.port.decoded"])
    hook.remove()
    assert seen == ["ieee"]
    assert conv.fp32_precision == before


def test_targets_have_the_shape_of_drawn_pictures(drawing, emu):
    assert emu.target_pixels(recorded_picture("land")).shape == (3, 64, 64)
    wide = drawing((3, 5), "t2i")
    assert wide.target_pixels(recorded_picture("port")).shape == (3, 48, 80)
    white = np.zeros((100, 300, 3), np.uint8)
    white[:, 100:200] = 255  # the middle square
    pixels = emu.target_pixels(PIL.Image.fromarray(white))
    assert (pixels == 1).all()
    row = wide.encode_example(Document((Text("x"),)), Document((Image(recorded_picture("port")),)))
    assert int((row.modality == Modality.IMAGE).sum()) == 15


# --- logits and scores ---------------------------------------------------------------------------------------------------


def test_logits_and_hidden_states_of_a_text(emu):
    row = prompt_row(RECORDED["lm.text.input_ids"].tolist())
    assert not (row.modality == Modality.IMAGE).any()
    close(logits_of(emu, row), RECORDED["lm.text.logits"])
    with torch.no_grad():
        states = emu.hf.model(input_ids=row.text_ids[None], output_hidden_states=True).hidden_states
    close(torch.cat(states), RECORDED["lm.text.hidden_states"])


def test_an_interleaved_document_is_laid_out_and_scored_as_recorded(emu):
    """With pictures of two sizes; what is forced here is scored too, as the official code does."""
    ids = RECORDED["lm.interleaved.input_ids"].tolist()
    rendered = emu.tokenizer.encode(FACTS["interleaved_string"].split("<|image start|>")[0], add_special_tokens=False)
    assert rendered == ids[: ids.index(IDS["BOI"])]
    logits = logits_of(emu, prompt_row(ids))
    close(logits[::16], RECORDED["lm.interleaved.logits_every_16th"])
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    close(nll, RECORDED["lm.interleaved.token_nll"])


def test_nothing_is_dropped_in_training(emu):
    assert emu.hf.config.attention_dropout == 0
    row = prompt_row(RECORDED["lm.text.input_ids"].tolist())
    emu.train()
    try:
        close(logits_of(emu, row), RECORDED["lm.text.logits"])
    finally:
        emu.eval()


def test_guidance_is_the_official_formula():
    cond, pictures, nothing = (RECORDED[f"cfg.{name}"].log_softmax(-1) for name in ("cond", "no_text", "no_any"))
    for scale in (1.0, 2.0, 5.0):
        close(mix(cond, [pictures], ImageSampling(guidance_scale=scale)), RECORDED[f"cfg.out.no_text.s{scale}"], 3e-4)
    for image_scale in (1.0, 1.5):
        settings = ImageSampling(guidance_scale=3.0, image_guidance_scale=image_scale)
        close(mix(cond, [nothing, pictures], settings), RECORDED[f"cfg.out.no_text_img_cfg.s3.0.i{image_scale}"], 3e-4)
    codes = slice(FIRST, None)  # after the mask, raw logits of codes are as good as log-probabilities over all ids
    raw = mix(RECORDED["cfg.cond"][:, codes], [RECORDED["cfg.no_text"][:, codes]], ImageSampling(guidance_scale=5.0))
    close(raw.log_softmax(-1), RECORDED["cfg.out.no_text.s5.0"][:, codes].log_softmax(-1), 3e-4)


@pytest.mark.parametrize("name", list(FACTS["sampling"]))
def test_truncation_is_the_official_one(name):
    facts, recorded = FACTS["sampling"][name], RECORDED[f"sampling.out.{name}"]
    part = slice(0, FIRST) if facts["kind"] == "text" else slice(FIRST, None)
    told = {key: facts[f"{facts['kind']}_{key}"] for key in ("top_k", "top_p", "temperature")}
    found = log_distribution(RECORDED["sampling.scores"][:, part], TextSampling(**told))
    assert found.isfinite().sum(-1).tolist() == facts["kept"]
    close(found, recorded[:, part].log_softmax(-1), 3e-4)


# --- generation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", list(RUNS))
def test_greedy_documents_are_the_official_ones(drawing, run):
    facts, grid = FACTS["generation"][run], RUNS[run]
    model, prompt = drawing(grid, facts["task"]), prompt_of(run)
    row = model.encode_prompt(prompt)
    assert ids_of(row) == RECORDED[f"gen.{run}.input_ids"].tolist()
    (rollout,) = sample(model, [row], settings_of(run).greedy(), generator=torch.Generator())
    answer = rollout.row[len(row) :]
    assert ids_of(answer) == RECORDED[f"gen.{run}.new_ids"].tolist()
    for number, image in enumerate(rollout.document.images):
        pixels = torch.from_numpy(np.array(image.pixels)).int()
        assert (pixels - RECORDED[f"gen.{run}.image{number}.uint8"].int()).abs().max() <= 1  # rounded here, cut off there
    told = [Text if kind == "text" else Image for kind, _ in facts["segments"]]
    assert [type(segment) for segment in rollout.document] == told
    for segment, (kind, text) in zip(rollout.document, facts["segments"], strict=True):
        if kind == "text":
            assert segment.text == text.strip()
    at_end = model.unconditional_row(len(row), lambda: rollout.row)
    assert ids_of(at_end) == RECORDED[f"gen.{run}.unconditional_ids_at_end"].tolist()
    assert not at_end.completion_mask.any()


@pytest.mark.parametrize("run", list(RUNS))
def test_scores_are_the_official_ones(drawing, run, monkeypatch):
    """All ids below the first code are legal text there; here most markers are not, so for equal numbers they are made legal."""
    facts, grid = FACTS["generation"][run], RUNS[run]
    model = drawing(grid, facts["task"])
    monkeypatch.setattr(model, "_legal", torch.ones(model.vocab_size, dtype=torch.bool))
    answer = answer_row(RECORDED[f"gen.{run}.new_ids"].tolist())
    row = TokenRow.concat([prompt_row(RECORDED[f"gen.{run}.input_ids"].tolist()), answer])
    settings = settings_of(run)
    plain = SamplingParams(image=ImageSampling(guidance_scale=settings.image.guidance_scale), max_images=settings.max_images)
    for params, name in ((settings, "processed"), (plain, "masked")):
        with torch.no_grad():
            found = score(model, collated(row), params).logprobs[0, row.prompt_length :, 0]
        recorded = RECORDED[f"gen.{run}.logprob_{name}"]
        close(found[answer.completion_mask], recorded[answer.completion_mask], 3e-4)
        forced = recorded[~answer.completion_mask]
        sizes = 5 if run == "story_auto" else 0  # there the model chose the first picture's size
        assert int((forced != 0).sum()) <= sizes


@pytest.mark.parametrize("run", [run for run in RUNS if run != "x2i_img_cfg"])
def test_both_branches_have_the_recorded_logits(drawing, run):
    """And what is drawn from: guided, then truncated."""
    facts, grid = FACTS["generation"][run], RUNS[run]
    model, settings = drawing(grid, facts["task"]), settings_of(run)
    new = RECORDED[f"gen.{run}.new_ids"].tolist()
    prompt = RECORDED[f"gen.{run}.input_ids"].tolist()
    conditional = logits_of(model, prompt_row([*prompt, *new]))[len(prompt) - 1 :]
    steps = RECORDED[f"gen.{run}.steps"].long()
    close(conditional[steps], RECORDED[f"gen.{run}.cond_logits"])
    before = len(RECORDED[f"gen.{run}.unconditional_ids"])
    branch = logits_of(model, prompt_row(RECORDED[f"gen.{run}.unconditional_ids_at_end"].tolist()))[before - 1 :]
    inside = torch.tensor(is_inside(new)).cumsum(0) - 1  # place of each step's token among those of pictures
    uncond_steps = RECORDED[f"gen.{run}.uncond_steps"].long()
    close(branch[inside[uncond_steps]], RECORDED[f"gen.{run}.uncond_logits"])
    for step, processed in zip(steps.tolist(), RECORDED[f"gen.{run}.processed"], strict=True):
        if new[step] >= FIRST:
            codes = slice(FIRST, None)
            guided = mix(conditional[step, codes], [branch[inside[step], codes]], settings.image)
            found = log_distribution(guided[None], settings.image)[0]
            close(found, processed[codes].log_softmax(-1), 3e-4)
        elif not is_inside(new)[step] or new[step] == IDS["BOI"]:
            found = log_distribution(conditional[None, step, :FIRST], settings.text)[0]
            close(found, processed[:FIRST].log_softmax(-1), 3e-4)


def is_inside(ids: list[int]) -> list[bool]:
    """Which ids are of a picture, its begin and end included."""
    found, inside = [], False
    for number in ids:
        inside |= number == IDS["BOI"]
        found.append(inside)
        inside &= number != IDS["EOI"]
    return found


def test_the_unconditional_branch_keeps_pictures_and_nothing_else(drawing):
    model, run = drawing((4, 4), "story"), "story_square"
    prompt, new = (RECORDED[f"gen.{run}.{name}"].tolist() for name in ("input_ids", "new_ids"))
    second = len(new) - 1 - new[::-1].index(IDS["BOI"])
    row = TokenRow.concat([prompt_row(prompt), answer_row(new)])[: len(prompt) + second]
    (prefix,) = branch_prefixes(model, ImageSampling(guidance_scale=3.0), len(prompt), lambda: row)
    end = RECORDED[f"gen.{run}.unconditional_ids_at_end"].tolist()
    assert ids_of(prefix) == end[: len(end) - 24]


def test_markers_of_thoughts_and_of_the_end_are_legal_and_others_are_not(emu):
    legal = {name for name, number in IDS.items() if number < FIRST and emu.legal_text()[number]}
    assert legal == {"BOG", "EOG", "BOC", "EOC", "ESS", "EOS", "BOI"}
    assert emu.legal_text()[: IDS["PAD"]].all()
    assert int(emu.legal_text()[IDS["PAD"] :].sum()) == len(legal)


def test_supervised_answers_end_as_the_releases_do(emu):
    row = emu.encode_example(Document((Text("hello"),)), Document((Text("a boat"), Image(recorded_picture("land")))))
    ids = ids_of(row)
    assert ids[-2:] == [IDS["ESS"], IDS["EOS"]]
    assert row.completion_mask[-2:].all()
    answer = ids[row.prompt_length :]
    told = emu.encode_text("a boat")
    assert answer[: len(told) + 1] == [*told, IDS["BOI"]]


# --- names of weights ----------------------------------------------------------------------------------------------------


def test_keys_and_shapes_at_the_released_size():
    """Digests of the keys of the official classes, built at this size, with their shapes."""
    language = configs.LanguageConfig(
        vocab_size=282_926, hidden_size=5120, intermediate_size=25_600, num_hidden_layers=64, num_attention_heads=64
    )
    vision = configs.VisionConfig(
        ch=256, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=4, attn_resolutions=(16,), resolution=256, z_channels=256, embed_dim=256,
        codebook_size=131_072,
    )  # fmt: skip
    with torch.device("meta"):
        modules = [Qwen3ForCausalLM(configs.stock_config(language)), VisionTokenizer(vision)]
    sizes = [(707, 34_103_460_864, "43607ae6d1c5e02f"), (543, 455_336_963, "7eb0808796cd6cd8")]
    for module, (count, numbers, digest) in zip(modules, sizes, strict=True):
        state = module.state_dict()
        lines = sorted(f"{name} {list(value.shape)}" for name, value in state.items())
        assert len(lines) == count
        assert sum(value.numel() for value in state.values()) == numbers
        assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest
    assert vision.factor == 16
    assert (DATA / "toy_checkpoint").is_dir()
