"""The image scorers at toy size, against recordings of the published code (ImageReward, HPSv2) and transformers' own forward passes."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from toy_scorers import write_clip, write_tokenizer
from transformers import CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from diptych import cli
from diptych.cli import app
from diptych.config import RewardConfig, build
from diptych.document import Document, Image, Text, to_json_blocks
from diptych.rewards import call_rewards, load_reward
from diptych.rewards.base import ABOUT, SCORERS, configured
from diptych.rewards.scorers import base, image_reward, open_clip
from diptych.rewards.scorers.clip import letterbox
from diptych.rewards.scorers.coherence import likeness

DATA = Path(__file__).parent / "data"
sys.path.insert(0, str(DATA))
import make_image_reward_fixture as made  # noqa: E402

RECORDED = json.loads((DATA / "image_reward_recorded.json").read_text())
PIXELS = np.load(DATA / "image_reward_pixels.npz")
PICTURES = [made.picture(number) for number in range(len(made.SIZES))]


def toy_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.arange(shape[1])[None] if name.endswith("position_ids") else torch.from_numpy(made.weights(name, tuple(shape)))
        for name, shape in shapes.items()
    }


def write_image_reward(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(made.MED))
    (folder / "vocab.txt").write_text("\n".join(made.WORDS) + "\n", encoding="utf-8")
    return folder


def write_dino(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, attention_probs_dropout_prob=0.5
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("scorers")
    torch.save({"state_dict": toy_state(RECORDED["open_clip"]["shapes"])}, root / "HPS_v2.1_compressed.pt")
    tokenizer = write_tokenizer(root / "words")
    hps = open_clip.convert(root / "HPS_v2.1_compressed.pt", root / "hps", "v2.1", str(tokenizer), vision_head_width=20, text_head_width=16)
    return {
        "image_reward": write_image_reward(root / "image_reward", toy_state(RECORDED["image_reward"]["shapes"])),
        "clip": write_clip(root / "clip"), "dino": write_dino(root / "dino"), "hps": hps,
        "hps_file": root / "HPS_v2.1_compressed.pt", "words": tokenizer,
    }  # fmt: skip


def make(name: str, folder: Path, **options):
    """As a recipe makes it, but not shared between tests."""
    return load_reward(name)(model=str(folder), **options)


def messages(*segments) -> list[dict]:
    return [{"role": "assistant", "content": Document(tuple(Text(s) if isinstance(s, str) else Image(s) for s in segments)).to_blocks()}]


def flat(color: tuple[int, int, int]) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (32, 32), color)


# --- ImageReward against its package ---------------------------------------------------------------------------------------


def test_image_reward_equals_the_package(toys):
    scorer = make("image_reward", toys["image_reward"], batch_size=7)
    pairs = [(caption, picture) for caption in made.CAPTIONS for picture in PICTURES]
    expected = [score for row in RECORDED["image_reward"]["scores"] for score in row]
    assert scorer.raw(pairs) == pytest.approx(expected, abs=1e-5)
    assert scorer.raw(list(reversed(pairs))) == pytest.approx(expected[::-1], abs=1e-5)
    assert scorer.num_truncated == 5  # the fifth caption, with each picture; what is remembered is not counted again
    alone = make("image_reward", toys["image_reward"], cache_size=0, batch_size=1)
    assert [alone.raw([pair])[0] for pair in pairs[::6]] == pytest.approx(expected[::6], abs=1e-5)
    assert np.std(expected) > 0.1  # not a constant


def test_image_reward_reads_words_and_padding_as_the_package(toys):
    scorer = make("image_reward", toys["image_reward"])
    for caption, expected in zip(made.CAPTIONS, RECORDED["image_reward"]["ids"], strict=True):
        ids, mask = scorer.token_ids(scorer.tokenizer, [caption], 35)
        padded = torch.nn.functional.pad(ids[0], (0, 35 - ids.shape[1]))
        assert padded.tolist() == expected
        assert mask.all()
    ids, mask = scorer.token_ids(scorer.tokenizer, [made.CAPTIONS[5], made.CAPTIONS[0]], 35)
    pixels = torch.stack([image_reward.preprocess(PICTURES[1], 32)] * 2)
    with torch.no_grad():
        padded = scorer.network(pixels, ids, mask)
        changed = scorer.network(pixels, torch.where(mask == 0, torch.tensor(9), ids), mask)
    assert torch.equal(padded, changed)  # what stands at padding is not seen
    assert padded[0].item() == pytest.approx(RECORDED["image_reward"]["scores"][5][1], abs=1e-5)


@pytest.mark.parametrize("number", range(len(made.SIZES)))
def test_preprocessing_equals_the_packages(number):
    torch.testing.assert_close(image_reward.preprocess(PICTURES[number], 32), torch.from_numpy(PIXELS[f"image_reward_{number}"]))
    torch.testing.assert_close(letterbox(PICTURES[number], 32), torch.from_numpy(PIXELS[f"hps_{number}"]), atol=1e-5, rtol=0)


def test_every_weight_of_the_released_size_has_its_place():
    """Names and shapes of the real architectures, recorded from the packages, fill our models exactly."""
    full = {name: torch.empty(shape, device="meta") for name, shape in RECORDED["image_reward"]["full_shapes"].items()}
    state = image_reward.renamed(full)
    vision, text = image_reward.configs(state, made.FULL_MED)
    with torch.device("meta"):
        network = image_reward.Network(vision, text)
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in network.state_dict().items()}
    assert (vision.num_attention_heads, vision.image_size, vision.patch_size, vision.num_hidden_layers) == (16, 224, 16, 24)  # BLIP's ViT-L
    assert sum(value.numel() for value in state.values()) > 440e6
    assert len(full) - len(state) == 5  # vision_proj, text_proj, position_ids

    full = {name: torch.empty(shape, device="meta") for name, shape in RECORDED["open_clip"]["full_shapes"].items()}
    state = open_clip.renamed(full)
    config = open_clip.config_of(full, 80, 64)
    with torch.device("meta"):
        model = CLIPModel(config)
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in model.state_dict().items()}
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == (16, 16)  # ViT-H/14
    assert (config.vision_config.image_size, config.text_config.max_position_embeddings, config.vision_config.hidden_act) == (
        224,
        77,
        "gelu",
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp.layers.4.bias"), "Missing key.*head.4.bias"),
        (lambda s: s.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"), "Missing key.*crossattention"),
        (lambda s: s.update({"mlp.layers.9.bias": torch.zeros(1)}), "Unexpected key.*head.9.bias"),
        (lambda s: s.update({"decoder.bias": torch.zeros(1)}), "unknown weight 'decoder.bias'"),
        (lambda s: s.update({"mlp.layers.7.weight": torch.zeros(1, 8)}), "size mismatch.*head.7.weight"),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "position_embedding"),
        (lambda s: s["mlp.layers.7.bias"].fill_(math.nan), "NaN or infinity"),
    ],
)
def test_image_reward_refuses_other_weights(tmp_path, change, message):
    state = toy_state(RECORDED["image_reward"]["shapes"])
    change(state)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make("image_reward", write_image_reward(tmp_path / "changed", state))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("ImageReward.pt", None, "ImageReward.pt"),
        ("ImageReward.pt", "not weights", "cannot read ImageReward"),
        ("med_config.json", None, "med_config.json"),
        ("med_config.json", "{}", "hidden_size"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "has 7 words, but the checkpoint has 32"),
    ],
)
def test_image_reward_refuses_broken_folders(tmp_path, file, content, message):
    folder = write_image_reward(tmp_path / "broken", toy_state(RECORDED["image_reward"]["shapes"]))
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        make("image_reward", folder)


def test_image_reward_rescales(toys):
    scorer = make("image_reward", toys["image_reward"])
    # (raw + 2) / 4: -2 -> 0, 0 -> 0.5, 1 -> 0.75, 3 -> 1.25, which is not clipped
    assert [scorer.rescaled(raw) for raw in (-2, 0, 1, 3)] == [0, 0.5, 0.75, 1.25]
    clipped = make("image_reward", toys["image_reward"], clip=True, low=-1.0, high=1.0)
    assert [clipped.rescaled(raw) for raw in (-3, 0.5, 3)] == [0, 0.75, 1]  # (0.5 + 1) / 2
    assert math.isnan(clipped.rescaled(math.inf))
    assert math.isnan(clipped.rescaled(math.nan))
    assert clipped.take_faults() == ({"not_finite": 2}, "the model gave NaN or infinity")
    assert clipped.take_faults()[0] == {}
    raw = RECORDED["image_reward"]["scores"][5][0]
    (values,) = scorer(prompts=[messages("x")], completions=[messages("ball", PICTURES[0])])
    assert values == [None, pytest.approx((raw + 2) / 4, abs=1e-5)]


# --- HPSv2 against its open_clip -------------------------------------------------------------------------------------------


def test_hps_equals_the_package(toys):
    scorer = make("hps", toys["hps"], version="v2.1", batch_size=3)
    pairs = [(caption, picture) for caption in made.CLIP_CAPTIONS for picture in PICTURES]
    expected = [cosine for row in RECORDED["open_clip"]["cosines"] for cosine in row]
    assert scorer.raw(pairs) == pytest.approx(expected, abs=1e-5)
    assert [scorer.rescaled(raw) for raw in (0.0, 0.3)] == [0.0, 0.3]
    ids, _ = scorer.token_ids(scorer.tokenizer, made.CLIP_CAPTIONS, 12)
    assert ids[0, :5].tolist() == made.CLIP_IDS[0][:5]
    assert ids[1].tolist() == made.CLIP_IDS[1]


def test_versions_of_hps_are_not_mixed(toys, tmp_path):
    with pytest.raises(ValueError, match=r"holds HPS v2.1, but version=v2.0"):
        make("hps", toys["hps"], version="v2.0")
    with pytest.raises(ValueError, match="holds no converted HPS model"):
        make("hps", toys["clip"], version="v2.1")
    with pytest.raises(ValueError, match="version"):
        make("hps", toys["hps"])
    with pytest.raises(ValueError, match=r"is HPS v2.1, but version 'v2.0'"):
        open_clip.convert(toys["hps_file"], tmp_path / "out", "v2.0", str(toys["words"]))
    with pytest.raises(ValueError, match=r"allowed are v2.0, v2.1"):
        open_clip.convert(tmp_path / "mine.pt", tmp_path / "out", "v3", str(toys["words"]))
    with pytest.raises(ValueError, match="exists and is not empty"):
        open_clip.convert(toys["hps_file"], toys["hps"], "v2.1", str(toys["words"]))
    assert not (tmp_path / "out").exists()


def test_conversion_refuses_what_is_not_open_clip(toys, tmp_path, capsys):
    state = toy_state(RECORDED["open_clip"]["shapes"])
    with pytest.raises(ValueError, match=r"(?s)Missing key.*q_proj\.bias"):
        open_clip.to_clip({name: value for name, value in state.items() if name != "transformer.resblocks.1.attn.in_proj_bias"}, 20, 16)
    for unknown in ("visual.attn_pool.query", "transformer.resblocks.0.ls_1.gamma"):
        with pytest.raises(ValueError, match=f"unknown weight '{unknown}'"):
            open_clip.to_clip(state | {unknown: torch.zeros(1)}, 20, 16)
    torch.save({"weights": state}, tmp_path / "other.pt")
    with pytest.raises(SystemExit):  # the command prints the same message and its usage
        open_clip.main([str(tmp_path / "other.pt"), str(tmp_path / "out"), "--version", "v2.0", "--tokenizer", str(toys["words"])])
    assert "cannot read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "other.pt"]


# --- CLIP and PickScore against transformers -------------------------------------------------------------------------------


def logits(folder: Path, caption: str, picture: PIL.Image.Image) -> tuple[float, float]:
    """logits_per_image of one pair by transformers' own forward, and the scale in it."""
    model = CLIPModel.from_pretrained(folder).eval()
    ids = CLIPTokenizer.from_pretrained(folder)([caption], truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return float(model(input_ids=ids, pixel_values=pixels).logits_per_image), float(model.logit_scale.exp())


CLIP_PAIRS = [("fjd ab", 1), ("a", 0), ("x w v u", 2), ("abcdefghijklmno", 1), ("fjd ab", 4), ("q", 3), ("a", 4)]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_clip_and_pick_scores_equal_transformers_own(toys, batch_size):
    pairs = [(caption, PICTURES[number]) for caption, number in CLIP_PAIRS]
    found = [logits(toys["clip"], *pair) for pair in pairs]
    cosines = [logit / scale for logit, scale in found]
    assert np.std(cosines) > 0.05
    scorer = make("clip_score", toys["clip"], batch_size=batch_size)
    assert scorer.raw(pairs) == pytest.approx(cosines, abs=1e-5)
    assert scorer.rescaled(0.3) == pytest.approx(0.75)  # 2.5 * 0.3
    pick = make("pick_score", toys["clip"], batch_size=batch_size)
    assert pick.raw(pairs[::-1]) == pytest.approx([logit for logit, _ in found][::-1], abs=1e-4)
    assert pick.rescaled(13.0) == 0.5  # 13 / 26
    assert not scorer.model.training
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())


def test_captions_are_the_text_before_a_picture(toys):
    scorer = make("clip_score", toys["clip"])
    a, b, c = PICTURES[:3]
    documents = [
        messages(a, "ab", b, c, "cd", "  ", a, "ef", c),  # no text; two pictures of one text; an empty text; a text
        messages("ab"),
        messages(),
        messages(" ab ", c),
    ]
    values = scorer(prompts=[messages("x")] * 4, completions=documents)
    assert [[value is None for value in row] for row in values] == [
        [True, True, False, False, True, True, True, True, False], [True], [], [True, False],
    ]  # fmt: skip

    def expected(caption, picture):
        logit, scale = logits(toys["clip"], caption, picture)
        return pytest.approx(2.5 * logit / scale, abs=1e-5)

    assert (values[0][2], values[0][3], values[0][8]) == (expected("ab", b), expected("ab", c), expected("ef", c))
    assert values[3][1] == values[0][3]


def test_equal_pairs_are_computed_once_and_few_are_kept(toys, monkeypatch):
    scorer = make("clip_score", toys["clip"], cache_size=2, batch_size=2)
    asked: list[list[tuple[str, int]]] = []
    compute = scorer.scores
    monkeypatch.setattr(scorer, "scores", lambda pairs: asked.append([(c, p.getpixel((0, 0))[0]) for c, p in pairs]) or compute(pairs))
    one, two = flat((1, 0, 0)), flat((2, 0, 0))
    first = scorer.raw([("a", one), ("a", two), ("a", one.copy()), ("b", one)])
    assert asked == [[("a", 1), ("a", 2)], [("b", 1)]]  # batches of two; the equal picture is not asked about again
    assert first[0] == first[2]
    assert len({first[0], first[1], first[3]}) == 3
    assert scorer.raw([("b", one), ("a", two)]) == [first[3], first[1]]  # the two latest are remembered
    assert len(asked) == 2
    assert scorer.raw([("a", one)])[0] == pytest.approx(first[0], abs=1e-6)  # the oldest was forgotten
    assert asked[2:] == [[("a", 1)]]
    assert scorer.raw([("a", two)]) == [first[1]]  # used later than the other, so it was kept
    assert len(asked) == 3
    assert len(scorer._memory) == 2
    changed = one.copy()
    changed.putpixel((31, 31), (255, 0, 0))
    scorer.raw([("a", changed), ("a", PIL.Image.new("RGB", (64, 16), (1, 0, 0)))])  # one pixel, and the same bytes in another shape
    assert len(asked[3]) == 2


def test_what_is_not_finite_is_missing_and_asked_again(toys, monkeypatch):
    config = RewardConfig(name="clip_score", options={"model": str(toys["clip"]), "cache_size": 7})
    scorer = configured(config, load_reward("clip_score"))
    assert scorer is configured(config, load_reward("clip_score"))
    compute, calls = scorer.scores, []

    def broken(pairs):
        calls.append(len(pairs))
        return compute(pairs) * torch.tensor([math.inf if caption == "bad" else 1.0 for caption, _ in pairs])

    monkeypatch.setattr(scorer, "scores", broken)
    document = Document((Text("bad"), Image(PICTURES[0]), Text("a"), Image(PICTURES[0])))
    for _ in range(2):
        batch = call_rewards([(config, load_reward("clip_score"))], [Document((Text("x"),))], [document], {})
        assert batch.applies[0, 0].tolist() == [False, True, False, True]
        assert batch.steps[0, 0].isnan().tolist() == [False, True, False, False]
        assert batch.missing == {"clip_score": 0.5}
        assert batch.faults == {"clip_score/not_finite": 1}
    assert calls == [2, 1]  # the good one is remembered


def test_long_captions_are_cut_counted_and_logged_once(toys, caplog):
    scorer = make("clip_score", toys["clip"])
    long = "abcdefghijklmno"  # 15 letters and two marks: 17 tokens, 12 fit
    with caplog.at_level(logging.WARNING):
        scorer.raw([(long, PICTURES[0]), ("abcdefghij", PICTURES[0]), (long, PICTURES[1])])  # the second has exactly 12
        scorer.raw([(long + "p", PICTURES[0])])
    warnings = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert len(warnings) == 1
    assert "clip_score: 2 of 3 captions are longer than its 12 tokens (the longest has 17)" in warnings[0]
    assert scorer.num_truncated == 3
    assert scorer.raw([(long, PICTURES[0])]) == pytest.approx(
        scorer.raw([(long[:10] + "pqrs", PICTURES[0])]), abs=1e-6
    )  # 10 letters are seen


def test_threads_get_what_one_thread_gets(toys, monkeypatch):
    pairs = [(caption, picture) for caption in ("a", "bc", "d e") for picture in PICTURES]
    expected = make("clip_score", toys["clip"]).raw(pairs)
    scorer = make("clip_score", toys["clip"], batch_size=2)
    compute, inside, asked = scorer.scores, [], []

    def watched(some):
        inside.append(1)
        assert len(inside) == 1, "two threads in the model"
        asked.extend(some)
        result = compute(some)
        assert not torch.is_grad_enabled()
        inside.pop()
        return result

    monkeypatch.setattr(scorer, "scores", watched)
    with ThreadPoolExecutor(8) as pool:
        for shift, found in zip(range(8), pool.map(lambda s: scorer.raw(pairs[s:] + pairs[:s]), range(8)), strict=True):
            assert found == pytest.approx(expected[shift:] + expected[:shift], abs=1e-5)
    assert len(asked) == len(pairs)  # each pair once, whichever thread came first


# --- coherence -------------------------------------------------------------------------------------------------------------


def test_likeness_by_hand():
    # cap 0.8: 0.8 * (1 - c) / 0.2 above it. 0.9 -> 0.8 * 0.1 / 0.2 = 0.4; 0.95 -> 0.2; 1 -> 0; a rounding above 1 is a copy too
    cosines = torch.tensor([-0.5, 0.0, 0.6, 0.8, 0.9, 0.95, 1.0, 1.000001])
    torch.testing.assert_close(likeness(cosines, 0.8), torch.tensor([-0.5, 0.0, 0.6, 0.8, 0.4, 0.2, 0.0, 0.0]))
    assert torch.equal(likeness(cosines, None), cosines)
    assert likeness(torch.tensor(math.nan), 0.8).isnan()


@pytest.fixture
def pointing(toys, monkeypatch):
    """`image_coherence` whose embedding of a picture is the unit vector at an angle of as many degrees as the picture is red."""

    def made_with(**options):
        scorer = make("image_coherence", toys["dino"], **options)

        def embed(pictures):
            angles = torch.tensor([math.radians(picture.getpixel((0, 0))[0]) for picture in pictures])
            return torch.stack([angles.cos(), angles.sin()], dim=-1)

        monkeypatch.setattr(scorer, "embed", embed)
        return scorer

    return made_with


def test_coherence_by_hand(pointing):
    def at(degrees):
        return flat((degrees, 0, 0))

    scorer = pointing(max_cosine=None)
    (values,) = scorer(prompts=[messages("x", at(120))], completions=[messages("t", at(0), "u", at(60), at(90))])
    # the first has none before it; cos 60 = 0.5; (cos 90 + cos 30) / 2 = (0 + 0.8660) / 2
    assert values == [None, None, None, pytest.approx(0.5), pytest.approx(0.4330127)]
    assert scorer(prompts=[messages("x")] * 2, completions=[messages("t"), messages(at(3))]) == [[None], [None]]
    with_prompt = pointing(max_cosine=None, prompt_pictures=True)
    (values,) = with_prompt(prompts=[messages("x", at(120))], completions=[messages("t", at(0), "u", at(60), at(90))])
    # cos 120 = -0.5; (cos 60 + cos 60) / 2 = 0.5; (cos 30 + cos 90 + cos 30) / 3 = 0.57735
    assert values == [None, pytest.approx(-0.5), None, pytest.approx(0.5), pytest.approx(0.5773503)]
    rescaled = pointing(max_cosine=None, low=-1.0)
    assert rescaled(prompts=[messages("x")], completions=[messages(at(0), at(60))]) == [[None, pytest.approx(0.75)]]  # (0.5 + 1) / 2


def test_copies_are_not_the_best_answer(pointing):
    def score(scorer, *degrees):
        (values,) = scorer(prompts=[messages("x")], completions=[messages(*(flat((d, 0, 0)) for d in degrees))])
        return values[1:]

    capped, free = pointing(), pointing(max_cosine=None)
    # degrees 0, 20, 40: cos 20 = 0.9397, (cos 40 + cos 20) / 2 = 0.8529. Copies: 0. 0, 0, 20: one copy costs its picture everything.
    assert score(capped, 0, 20, 40) == pytest.approx([0.9396926, 0.8528686])
    assert score(capped, 5, 5, 5) == pytest.approx([0, 0], abs=1e-5)
    assert score(capped, 0, 0, 20) == pytest.approx([0, 0.9396926], abs=1e-5)
    assert score(capped, 0, 5) == pytest.approx([0.95 * (1 - math.cos(math.radians(5))) / 0.05], abs=1e-5)  # nearly a copy: 0.072
    assert score(free, 5, 5, 5) == pytest.approx([1, 1])


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_embeddings_equal_transformers_own(toys, kind):
    scorer = make("image_coherence", toys[kind], batch_size=2, max_cosine=None)
    model = (Dinov2Model if kind == "dino" else CLIPModel).from_pretrained(toys[kind]).eval()
    processor = (BitImageProcessorPil if kind == "dino" else CLIPImageProcessorPil).from_pretrained(toys[kind])
    expected = []
    for picture in PICTURES:
        pixels = processor(picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if kind == "dino":
                vector = model(pixel_values=pixels).last_hidden_state[0, 0]
            else:
                vector = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)[0]
        expected.append(vector / vector.norm())
    (values,) = scorer(prompts=[messages("x")], completions=[messages("t", *PICTURES)])
    assert values[:2] == [None, None]
    for k in range(1, len(PICTURES)):
        assert values[k + 1] == pytest.approx(sum(float(expected[j] @ expected[k]) for j in range(k)) / k, abs=1e-5)


# --- what cannot work is refused before anything is sampled ----------------------------------------------------------------


def copied(folder: Path, to: Path, without: str = "") -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if not without or not file.name.startswith(without):
            (to / file.name).write_bytes(file.read_bytes())
    return to


def with_weights(folder: Path, change) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "image_coherence"])
def test_broken_clip_folders(toys, tmp_path, name):
    good = toys["clip"]
    cases = {
        "there is no such folder": tmp_path / "nowhere",
        "config.json is missing": copied(good, tmp_path / "b", "config.json"),
        "image processor": copied(good, tmp_path / "c", "preprocessor_config.json"),
        "1 missing keys, the first is visual_projection.weight": with_weights(
            copied(good, tmp_path / "d"), lambda s: s.pop("visual_projection.weight")
        ),
        "1 unexpected keys, the first is extra": with_weights(copied(good, tmp_path / "e"), lambda s: s.update(extra=torch.ones(1))),
        "mismatch": with_weights(copied(good, tmp_path / "f"), lambda s: s.update({"visual_projection.weight": torch.ones(3, 3)})),
        "NaN or infinity": with_weights(copied(good, tmp_path / "g"), lambda s: s["visual_projection.weight"].fill_(math.nan)),
        "model_type 'blip'": copied(good, tmp_path / "h"),
        "does not work as": copied(good, tmp_path / "i"),
    }
    (tmp_path / "h" / "config.json").write_text('{"model_type": "blip"}')
    CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40}).save_pretrained(tmp_path / "i")
    for message, folder in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            configured(RewardConfig(name=name, options={"model": str(folder)}), load_reward(name))
        assert name in str(error.value)


def test_tokenizers_that_do_not_fit(toys, tmp_path):
    folder = copied(toys["clip"], tmp_path / "no words", "tokenizer")
    with pytest.raises(ValueError, match=r"has 2 words, but the model has 50.*Copy the files"):  # transformers makes one without files
        make("clip_score", folder)
    words = CLIPTokenizer.from_pretrained(toys["clip"])
    words.add_tokens(["hello"])
    words.save_pretrained(copied(toys["clip"], tmp_path / "more words"))
    with pytest.raises(ValueError, match="has 51 words, but the model has 50"):
        make("clip_score", tmp_path / "more words")
    with pytest.raises(ValueError, match="has 51 words, but the model has 50"):
        open_clip.convert(
            toys["hps_file"], tmp_path / "out", "v2.1", str(tmp_path / "more words"), vision_head_width=20, text_head_width=16
        )
    assert not (tmp_path / "out").exists()


def test_buffers_of_older_checkpoints_are_no_weights(toys, tmp_path):
    old = {"text_model.embeddings.position_ids": torch.arange(12)[None], "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    folder = with_weights(copied(toys["clip"], tmp_path / "old"), lambda s: s.update(old))
    pair = ("ab", PICTURES[0])
    assert make("clip_score", folder).raw([pair]) == pytest.approx(make("clip_score", toys["clip"]).raw([pair]), abs=1e-6)


def test_hub_ids(toys, tmp_path, monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        if name == "org/nothing":
            raise OSError("404")
        return str(toys["image_reward" if "reward" in name else "clip"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    scorer = make("clip_score", "org/some-clip", revision="abc123", low=0.1, clip=True, device="cpu")
    assert scorer.about() == (
        "clip_score: org/some-clip at revision abc123, float32 on cpu; raw cosine, -1..1, good pairs about 0.15..0.35; "
        "value (raw - 0.1) / 0.3, clipped to 0..1"
    )
    assert "at revision" not in make("image_reward", "org/some-reward").about()
    assert asked == [
        ("org/some-clip", "abc123", ["*.json", "*.txt", "*.safetensors"]),
        ("org/some-reward", None, ["ImageReward.pt", "med_config.json"]),
    ]
    commit = tmp_path / "models--org--some-clip" / "snapshots" / "1234abcd"  # as the hub's cache has it
    commit.parent.mkdir(parents=True)
    commit.symlink_to(toys["clip"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(commit))
    assert "org/some-clip at revision 1234abcd, float32" in make("clip_score", "org/some-clip", revision="main").about()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ValueError, match="hub did not give a model of that name: 404"):
        make("pick_score", "org/nothing")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bach_size": 3}, "bach_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": "int8"}, "dtype"),
        ({"dtype": "bfloat16", "device": "cpu"}, "needs a GPU"),
        ({"revision": "main"}, "no effect on the local model"),
        ({"low": 1.0, "high": 1.0}, "low=1 must be below high=1"),
        ({"max_cosine": 1.0}, "max_cosine"),
    ],
)
def test_wrong_options(toys, options, message):
    with pytest.raises(ValueError, match=message):
        make("image_coherence", toys["dino"], **options)


def test_the_page_of_the_docs_names_what_there_is():
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "image_scorers.md").read_text()
    for entry in yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])["rewards"]:
        config = build(RewardConfig, entry)
        if config.name in SCORERS:
            build(load_reward(config.name).options_class, config.options)
    for name in SCORERS:
        assert f"| `{name}` |" in page
        for option in load_reward(name).options_class.model_fields:
            assert f"`{option}`" in page


def test_registered_and_usable_from_the_command_line(toys, tmp_path):
    assert set(SCORERS) <= set(ABOUT)
    for name in SCORERS:
        assert issubclass(load_reward(name), base.ImageScorer)
        assert load_reward(name).name == name
    document = Document((Text("ab"), Image(PICTURES[0])))
    (tmp_path / "answer.json").write_text(json.dumps(to_json_blocks(document)))
    result = CliRunner().invoke(
        app, ["rewards", "try", "clip_score", "--document", str(tmp_path / "answer.json"), "--option", f"model={toys['clip']}"]
    )
    assert result.exit_code == 0, result.output
    logit, scale = logits(toys["clip"], "ab", PICTURES[0])
    assert f"step 2 (picture): {2.5 * logit / scale:.4f}" in result.output


@pytest.mark.parametrize(
    ("name", "toy", "judged"),
    [("clip_score", "clip", (2, 3)), ("pick_score", "clip", (2, 3)), ("hps", "hps", (2, 3)), ("image_reward", "image_reward", (2, 3)),
     ("image_coherence", "dino", (3,))],
)  # fmt: skip
def test_every_scorer_through_the_command(toys, tmp_path, monkeypatch, name, toy, judged):
    """The command's values are the reward's own, for the pictures that it judges."""
    monkeypatch.setattr(cli.rewards, "console", Console(width=200))
    document = Document((Text("ab"), Image(PICTURES[0]), Image(PICTURES[1])))
    (tmp_path / "answer.json").write_text(json.dumps(to_json_blocks(document)))
    options = ["--option", f"model={toys[toy]}", *(["--option", "version=v2.1"] if name == "hps" else [])]
    result = CliRunner().invoke(app, ["rewards", "try", name, "--document", str(tmp_path / "answer.json"), *options])
    assert result.exit_code == 0, result.exception
    ((*values,),) = make(name, toys[toy], **({"version": "v2.1"} if name == "hps" else {}))(
        [messages("draw")], [messages("ab", *PICTURES[:2])]
    )
    for step, value in enumerate(values, start=1):
        kind = "text" if step == 1 else "picture"
        shown = f"{value:.4f}" if step in judged else "-"
        assert f"step {step} ({kind}): {shown}\n" in result.output


def test_try_shows_the_model_the_captions_and_the_raw_scores(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.rewards, "console", Console(width=200))
    a, b = flat((200, 0, 0)), flat((0, 0, 200))
    document = Document((Text("ab"), Image(a), Image(b), Text("abcdefghijklmno"), Image(a)))
    (tmp_path / "answer.json").write_text(json.dumps(to_json_blocks(document)))

    def tried(name: str, folder: Path) -> str:
        command = ["rewards", "try", name, "--document", str(tmp_path / "answer.json"), "--option", f"model={folder}"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        return result.output

    shown, scorer = tried("clip_score", toys["clip"]), make("clip_score", toys["clip"])
    raws = scorer.raw([("ab", a), ("ab", b), ("abcdefghijklmno", a)])
    assert scorer.about() in shown
    assert f"step 2 (picture): raw {raws[0]:.4f} against the caption 'ab' (all 4 tokens are read)" in shown  # two letters, start and end
    assert f"step 3 (picture): raw {raws[1]:.4f} against the caption 'ab' (all 4 tokens are read)" in shown
    assert f"step 5 (picture): raw {raws[2]:.4f} against the caption 'abcdefghijklmno' (cut: 12 of its 17 tokens are read)" in shown
    assert "against the caption 'ab' (all " in tried("image_reward", toys["image_reward"])
    shown = tried("image_coherence", toys["dino"])
    assert re.search(r"step 3 \(picture\): raw \S+ against the earlier pictures, cosines 0\.\d{4}\n", shown)
    assert re.search(r"step 5 \(picture\): raw \S+ against the earlier pictures, cosines 1\.0000, 0\.\d{4}\n", shown)
