"""Codes of pictures on disk: the same bits, never another tokenizer's, and never half of a file."""

from __future__ import annotations

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
from family_data import picture
from test_training import warmup_config

from diptych.document import Document, Image, Text
from diptych.models.base import UnifiedModel
from diptych.models.codes import CodeCache, RecentCodes, tokenizer_hash
from diptych.models.storyboard.model import StoryboardModel
from diptych.rewards.image_likelihood import ImageLikelihood
from diptych.rewards.protocol import conversation
from diptych.rewards.text_likelihood import TextLikelihood
from diptych.runs import read_jsonl
from diptych.training.warmup import warmup


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many pictures each call of the image tokenizer was given."""
    calls: list[int] = []
    original = StoryboardModel.encode_images
    monkeypatch.setattr(StoryboardModel, "encode_images", lambda self, pixels: calls.append(len(pixels)) or original(self, pixels))
    return calls


def test_codes_come_back_bit_by_bit(tiny_model, tmp_path, encoded):
    pictures = [Image(picture(i)) for i in range(3)]
    expected = [tiny_model.image_codes(image) for image in pictures]
    cached = copy.deepcopy(tiny_model)
    cached.code_cache = CodeCache(tmp_path, cached)
    del encoded[:]
    for _ in range(2):
        for image, codes in zip(pictures, expected, strict=True):
            found = cached.image_codes(image)
            assert torch.equal(found, codes)
            assert (found.dtype, found.device) == (codes.dtype, codes.device)
    assert encoded == [1, 1, 1]  # the second time none
    assert len(files(tmp_path)) == 3
    again = copy.deepcopy(tiny_model)
    again.code_cache = CodeCache(tmp_path, again)  # another run of the same model
    assert torch.equal(again.image_codes(pictures[0]), expected[0])
    assert encoded == [1, 1, 1]


def test_the_codes_of_the_last_pictures_are_remembered(tiny_model, encoded):
    pictures = [Image(picture(i)) for i in range(3)]
    expected = [tiny_model.image_codes(image) for image in pictures]
    own = copy.deepcopy(tiny_model)
    own.code_cache = RecentCodes(size=2)
    for order, times in (([0, 1, 0, 1], 2), ([2, 0], 4), ([0, 2], 4), ([1], 5), ([2, 1], 5), ([0], 6)):  # who was used last stays longest
        for i in order:
            assert torch.equal(own.image_codes(Image(picture(i))), expected[i])
        assert len(encoded) == 3 + times


@pytest.mark.parametrize("judge", [ImageLikelihood, TextLikelihood])
def test_rewards_encode_the_prompt_of_a_group_once(judge, encoded):
    reward = judge(model="storyboard_terse", device="cpu")
    asked, other = (Document((Image(picture(i)), Text("then the ball grows ."))) for i in range(2))
    prompts = [conversation("user", document, "blocks") for document in (asked, asked, asked, other)]
    codes = torch.zeros(9, 2, dtype=torch.long)
    answers = [Document((Text("the ball grows ."), Image(picture(5), codes)))] * 4
    completions = [conversation("assistant", document, "blocks") for document in answers]
    reward(prompts=prompts, completions=completions, completion_documents=answers)
    assert encoded == [1, 1]


def test_another_tokenizers_codes_are_never_used(tiny_model, tmp_path, encoded):
    cached = copy.deepcopy(tiny_model)
    cached.code_cache = CodeCache(tmp_path, cached)
    cached.image_codes(Image(picture(0)))
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        next(other.frozen_modules()[0].parameters()).view(-1)[0] += 1e-3
    trained = copy.deepcopy(tiny_model)
    with torch.no_grad():
        next(trained.language_model.parameters()).add_(1)
    assert tokenizer_hash(trained) == tokenizer_hash(tiny_model)  # what training changes does not matter
    assert tokenizer_hash(other) != tokenizer_hash(tiny_model)
    other.code_cache = CodeCache(tmp_path, other)
    other.image_codes(Image(picture(0)))
    assert encoded == [1, 1]


def test_a_model_whose_tokenizer_is_trained_has_no_cache(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(StoryboardModel, "frozen_modules", lambda self: [])
    with pytest.raises(ValueError, match="the image tokenizer of storyboard is not frozen; leave code_cache out"):
        CodeCache(tmp_path, tiny_model)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY broken", "cut"])
def test_broken_files_are_written_again(tiny_model, tmp_path, encoded, damage):
    cached = copy.deepcopy(tiny_model)
    cached.code_cache = CodeCache(tmp_path, cached)
    codes = cached.image_codes(Image(picture(0)))
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] if damage == "cut" else damage)
    assert torch.equal(cached.image_codes(Image(picture(0))), codes)
    assert encoded == [1, 1]
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written(tiny_model, tmp_path):
    (tmp_path / "file").touch()
    cached = copy.deepcopy(tiny_model)
    cached.code_cache = CodeCache(tmp_path / "file", cached)
    with pytest.raises(ValueError, match=r"cannot write to code_cache .*Give another folder, or leave code_cache out"):
        cached.image_codes(Image(picture(0)))


def fill(model: UnifiedModel, folder: Path) -> None:
    torch.set_num_threads(1)
    model.code_cache = CodeCache(folder, model)
    for _ in range(5):
        for i in range(10):
            model.image_codes(Image(picture(i)))


def test_several_processes_share_a_folder(tiny_model, tmp_path):
    model = copy.deepcopy(tiny_model)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(model, tmp_path)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(files(tmp_path)) == 10  # and nothing half-written
    cached = CodeCache(tmp_path, tiny_model)
    for i in range(10):
        pixels = tiny_model.target_pixels(picture(i))
        assert torch.equal(cached(pixels, lambda: pytest.fail("not in the cache")), tiny_model.image_codes(Image(picture(i))))


def test_training_with_a_cache_is_the_same(tiny_model, tmp_path, encoded):
    tiny_model.save_pretrained(tmp_path / "model")
    logged, calls = [], []
    for name, cache in (("plain", None), ("first", str(tmp_path / "codes")), ("second", str(tmp_path / "codes"))):
        del encoded[:]
        warmup(warmup_config(tmp_path / "model", tmp_path / name, max_steps=2, code_cache=cache))
        calls.append(len(encoded))
        logged.append(
            [
                {k: v for k, v in line.items() if "time" not in k and "seconds" not in k}
                for line in read_jsonl(tmp_path / name / "metrics.jsonl")
            ]
        )
    assert logged[0] == logged[1] == logged[2]
    assert calls[0] >= calls[1] > 0
    assert calls[2] == 0
