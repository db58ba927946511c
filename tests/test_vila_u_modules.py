"""VILA-U's vision side against what the official code computed on the same toy checkpoint (tests/data/vila_u)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diptych.models.vila_u.config import VisionConfig
from diptych.models.vila_u.quantizer import ResidualQuantizer
from diptych.models.vila_u.vision import Projector, VisionTower, fill_module, read_tensors

DATA = Path(__file__).parent / "data" / "vila_u"
TOY = DATA / "toy_checkpoint"
TEXT_VOCABULARY = 404  # of the toy's LLM; image labels are codes + 404
CODEBOOK = "rqvaesiglip.quantizer.codebooks.{}.{}"


def close(actual: Tensor, wanted: Tensor, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=0)


def edit_tower(folder: Path, tensors: dict[str, Tensor] | None = None, config: dict[str, Any] | None = None) -> Path:
    """A copy of the toy checkpoint's vision side with other tensors or another config."""
    shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("llm"))
    if tensors is not None:
        save_file(tensors, folder / "vision_tower" / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "vision_tower" / "config.json").write_text(json.dumps(config))
    return folder


def toy_config() -> dict[str, Any]:
    return json.loads((TOY / "vision_tower" / "config.json").read_text())


def toy_tensors() -> dict[str, Tensor]:
    return load_file(TOY / "vision_tower" / "model.safetensors")


def nearest_in_a_loop(point: Tensor, vectors: Tensor) -> int:
    best, best_distance = -1, float("inf")
    for k, vector in enumerate(vectors):
        distance = sum((float(a) - float(b)) ** 2 for a, b in zip(point, vector, strict=True))
        if distance < best_distance:
            best, best_distance = k, distance
    return best


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(DATA / "reference_fp32.safetensors")


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return VisionTower.load(TOY)


@pytest.fixture(scope="module")
def projector() -> Projector:
    return Projector.load(TOY, width_in=32, width_out=64)


# --- the official code's numbers ---------------------------------------------------------------------------------------
def test_encode_matches_the_official_code(tower: VisionTower, projector: Projector, reference: dict[str, Tensor]) -> None:
    pixels = reference["encode.pixel_values"]
    close(tower.rqvaesiglip.siglip_model.vision_model.embeddings(pixels), reference["encode.patch_embeddings"])
    close(tower.features(pixels), reference["encode.siglip_penultimate"])
    codes = tower.encode(pixels)  # (4, 16, 4)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, reference["encode.codes"].flatten(1, 2))
    assert torch.equal(codes + TEXT_VOCABULARY, reference["encode.label_tokens"])
    close(tower.code_sums(codes), reference["encode.z_q"].flatten(1, 2))
    close(projector(tower.code_sums(codes)), reference["encode.projected_features"])


def test_code_vectors_and_their_sums_match_the_official_code(
    tower: VisionTower, projector: Projector, reference: dict[str, Tensor]
) -> None:
    codes = reference["encode.codes"].flatten(1, 2)
    close(tower.quantizer.vectors(codes), reference["codes.depth_embeddings"])
    close(tower.quantizer.running_sums(codes), reference["codes.cumsum_embeddings"])
    close(tower.quantizer.sums(codes), reference["codes.cumsum_embeddings"][:, :, -1])
    close(projector(tower.code_sums(codes)), reference["codes.llm_input_embeddings"])


def test_decode_matches_the_official_code(tower: VisionTower, reference: dict[str, Tensor]) -> None:
    codes = reference["decode.codes"]
    close(tower.rqvaesiglip.latent(tower.code_sums(codes)), reference["decode.post_quant_conv"])
    raw = tower.decode(codes)
    close(raw, reference["decode.raw"])
    pixels = ((raw + 1) * 127.5).clamp(0, 255)
    close(pixels, reference["decode.float_0_255"], atol=2e-2)
    # Truncation, not rounding; a pixel may fall on the other side of an integer only if it is within the tolerance of one.
    differ = pixels.permute(0, 2, 3, 1).to(torch.uint8).int() - reference["decode.uint8"].int()
    assert differ.abs().max() <= 1
    assert (differ != 0).float().mean() < 1e-3


def test_depth_logits_match_the_official_code(tower: VisionTower, reference: dict[str, Tensor]) -> None:
    hidden, codes = reference["depth.hidden"].flatten(0, 1), reference["depth.codes"].flatten(0, 1)
    close(tower.image_logits(hidden, codes), reference["depth.logits"].flatten(0, 1))


def draw_greedily(tower: VisionTower, conditional: Tensor, unconditional: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Two (N, H) -> codes (N, D) and the guided logits (N, D, K) that they are the argmax of."""
    codes, guided = torch.empty(len(conditional), 0, dtype=torch.int64), []
    for _ in range(tower.config.codes_per_position):
        c, u = tower.image_step(conditional, codes), tower.image_step(unconditional, codes)
        guided.append(u + scale * (c - u))
        codes = torch.cat([codes, guided[-1].argmax(dim=-1, keepdim=True)], dim=1)
    return codes, torch.stack(guided, dim=1)


@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_depth_generation_matches_the_official_code(tower: VisionTower, reference: dict[str, Tensor], scale: float) -> None:
    hidden = reference["depth_generate.hidden"][:, 0]  # rows 0-2 conditional, 3-5 unconditional
    name = f"depth_generate.cfg{scale}"
    codes, guided = draw_greedily(tower, hidden[:3], hidden[3:], scale)
    close(guided, reference[f"{name}.guided_logits"])
    assert torch.equal(codes.repeat(2, 1), reference[f"{name}.codes"][:, 0])
    close(tower.code_sums(codes).repeat(2, 1), reference[f"{name}.out_features"][:, 0])


def test_the_image_of_a_whole_official_generation(tower: VisionTower, reference: dict[str, Tensor]) -> None:
    conditional, unconditional = reference["image_generation_cfg3.llm_hidden_states"]  # (16, 64) each
    codes, guided = draw_greedily(tower, conditional, unconditional, 3.0)
    assert torch.equal(codes[None], reference["image_generation_cfg3.codes"])
    close(guided[None, :2], reference["image_generation_cfg3.guided_logits_first2steps"])
    pixels = ((tower.decode(codes[None]) + 1) * 127.5).clamp(0, 255)
    close(pixels, reference["image_generation_cfg3.pixels_float_0_255"], atol=2e-2)
    differ = pixels.permute(0, 2, 3, 1).to(torch.uint8).int() - reference["image_generation_cfg3.pixels_uint8"].int()
    assert differ.abs().max() <= 1


# --- quantizer -------------------------------------------------------------------------------------------------------
def test_a_tie_goes_to_the_lowest_code_and_the_padding_row_is_never_chosen() -> None:
    quantizer = ResidualQuantizer(num_codes=5, width=2, depth=2, shared=True)
    # Row 5 is padding, and would be nearest to everything here.
    quantizer.get_buffer("codebooks.0.weight").copy_(torch.tensor([[9.0, 9], [1, 0], [0, 1], [1, 0], [-1, 0], [0.5, 0.5]]))
    features = torch.tensor([[[0.5, 0.5], [0, 0], [1, 0]]])  # (1, 3, 2)
    # [.5 .5]: rows 1, 2, 3 at .5 -> 1; left [-.5 .5]: rows 2 and 4 at .5, row 1 at 2.5 -> 2.
    # [0 0]: rows 1..4 at 1 -> 1; left [-1 0]: row 4 at 0. [1 0]: rows 1 and 3 at 0 -> 1; left [0 0] -> 1.
    assert quantizer.encode(features).tolist() == [[[1, 2], [1, 4], [1, 1]]]


def test_distances_are_exact_where_float32_products_would_cancel() -> None:
    quantizer = ResidualQuantizer(num_codes=2, width=1, depth=1, shared=True)
    quantizer.get_buffer("codebooks.0.weight").copy_(torch.tensor([[4097.0], [4095.5], [0.0]]))
    # 4096 is 1 away from row 0 and .5 away from row 1; float32 |e|^2 = 16785409 is rounded to an even number.
    assert quantizer.encode(torch.tensor([[[4096.0]]])).item() == 1
    assert quantizer.encode(torch.tensor([[[4096.26]]])).item() == 0  # .74 against .76


def test_chunks_and_training_mode_change_nothing(tower: VisionTower, reference: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    before = tower.get_buffer(CODEBOOK.format(0, "weight")).clone()
    monkeypatch.setattr("diptych.models.vila_u.quantizer._MAX_DISTANCES", 7 * 1024)  # 7 of 64 positions at a time
    tower.train()
    codes = tower.encode(reference["encode.pixel_values"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(codes, tower.encode(reference["encode.pixel_values"]))
    tower.eval()
    assert torch.equal(codes, reference["encode.codes"].flatten(1, 2))
    assert torch.equal(before, tower.get_buffer(CODEBOOK.format(0, "weight")))


def bilinear_in_a_loop(grid: Tensor, size: int) -> Tensor:
    """(h, w, C) -> (size, size, C), pixel centres at half-integers, clamped at the border."""
    h, w, width = grid.shape
    out = torch.zeros(size, size, width)
    for y in range(size):
        for x in range(size):
            fy, fx = max((y + 0.5) * h / size - 0.5, 0), max((x + 0.5) * w / size - 0.5, 0)
            y0, x0 = int(fy), int(fx)
            y1, x1, dy, dx = min(y0 + 1, h - 1), min(x0 + 1, w - 1), fy - y0, fx - x0
            top = (1 - dx) * grid[y0, x0] + dx * grid[y0, x1]
            bottom = (1 - dx) * grid[y1, x0] + dx * grid[y1, x1]
            out[y, x] = (1 - dy) * top + dy * bottom
    return out


def test_unshared_codebooks_and_a_resized_latent(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, config = toy_tensors(), toy_config()
    books = [tensors[CODEBOOK.format(d, "weight")] for d in range(4)]
    for d in range(1, 4):
        books[d] = books[d][[*torch.randperm(1024, generator=generator).tolist(), 1024]] * (1 - 0.2 * d)
        tensors[CODEBOOK.format(d, "weight")] = books[d]
    config["rqvaesiglip"] |= {"shared_codebook": False, "decoder_latent_shape": [6, 6]}
    tower = VisionTower.load(edit_tower(tmp_path / "unshared", tensors, config))
    assert tower.config.decoded_size == 48

    pixels = reference["encode.pixel_values"][:1]
    codes, features = tower.encode(pixels)[0], tower.features(pixels)[0]
    for position in (0, 5, 15):
        left, wanted = features[position].clone(), []
        for book in books:
            wanted.append(nearest_in_a_loop(left, book[:-1]))
            left -= book[wanted[-1]]
        assert codes[position].tolist() == wanted

    running = torch.zeros(16, 4, 32)
    for position in range(16):
        total = torch.zeros(32)
        for d in range(4):
            total = total + books[d][codes[position, d]]
            running[position, d] = total
    close(tower.quantizer.running_sums(codes), running, atol=1e-6)
    close(tower.code_sums(codes), running[:, -1], atol=1e-6)

    resized = bilinear_in_a_loop(running[:, -1].unflatten(0, (4, 4)), 6)  # (6, 6, 32)
    weight, bias = tensors["rqvaesiglip.post_quant_conv.weight"][:, :, 0, 0], tensors["rqvaesiglip.post_quant_conv.bias"]
    close(tower.rqvaesiglip.latent(tower.code_sums(codes[None]))[0], (resized @ weight.T + bias).permute(2, 0, 1), atol=1e-5)
    assert tower.decode(codes[None]).shape == (1, 3, 48, 48)

    # The depth transformer reads the same sums: another third codebook must change slot 3 and nothing before it.
    hidden = reference["depth.hidden"].flatten(0, 1)[:16]
    logits = tower.image_logits(hidden, codes)
    tower.get_buffer(CODEBOOK.format(2, "weight")).mul_(2)
    changed = (tower.image_logits(hidden, codes) - logits).abs().amax(dim=(0, 2))
    assert changed[:3].max() == 0
    assert changed[3] > 1e-3

    tower.get_buffer(CODEBOOK.format(2, "weight")).div_(2)
    tower.save(tmp_path / "again")
    assert_same_file(tmp_path / "again", tensors)


# --- depth transformer -----------------------------------------------------------------------------------------------
def test_teacher_forcing_equals_stepping(tower: VisionTower, reference: dict[str, Tensor]) -> None:
    hidden, codes = reference["depth.hidden"].flatten(0, 1), reference["depth.codes"].flatten(0, 1)
    steps = torch.stack([tower.image_step(hidden, codes[:, :d]) for d in range(4)], dim=1)
    close(steps, tower.image_logits(hidden, codes), atol=1e-5)


def test_a_code_changes_only_the_logits_after_it_and_only_of_its_position(tower: VisionTower, reference: dict[str, Tensor]) -> None:
    hidden, codes = reference["depth.hidden"].flatten(0, 1)[:3], reference["depth.codes"].flatten(0, 1)[:3]
    other = codes.clone()
    other[1, 1] = (other[1, 1] + 1) % 1024
    changed = (tower.image_logits(hidden, other) - tower.image_logits(hidden, codes)).abs().amax(dim=-1)  # (3, 4)
    assert (changed > 1e-4).tolist() == [[False] * 4, [False, False, True, True], [False] * 4]


def test_gradients_reach_the_state_and_the_transformer_but_nothing_frozen(reference: dict[str, Tensor]) -> None:
    tower = VisionTower.load(TOY)
    hidden = reference["depth.hidden"].flatten(0, 1).requires_grad_()
    codes = reference["depth.codes"].flatten(0, 1)
    tower.image_logits(hidden, codes).log_softmax(-1).gather(-1, codes[..., None]).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(dim=-1).min() > 0
    for name, parameter in tower.rqtransformer.named_parameters():
        assert parameter.grad is not None, name
        # A key bias adds the same to all scores of a query, so its gradient is zero but for rounding.
        assert name.endswith("attn.key.bias") or parameter.grad.abs().max() > 0, name
    assert all(not p.requires_grad and p.grad is None for p in tower.rqvaesiglip.parameters())
    tower.requires_grad_(True)  # even so: codebooks are no parameters
    assert not any("codebooks" in name for name, _ in tower.named_parameters())
    assert not tower.quantizer.running_sums(codes).requires_grad
    assert not tower.code_sums(codes).requires_grad


# --- files -----------------------------------------------------------------------------------------------------------
def assert_same_file(folder: Path, wanted: dict[str, Tensor]) -> None:
    saved = load_file(folder / "vision_tower" / "model.safetensors")
    assert saved.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert saved[key].dtype == tensor.dtype, key
        assert torch.equal(saved[key], tensor), key


def test_saving_gives_back_the_checkpoint(tower: VisionTower, projector: Projector, tmp_path: Path) -> None:
    assert not any(t.is_meta for t in [*tower.parameters(), *tower.buffers()])
    tower.save(tmp_path)
    projector.save(tmp_path)
    assert_same_file(tmp_path, toy_tensors())
    saved, wanted = (load_file(folder / "mm_projector" / "model.safetensors") for folder in (tmp_path, TOY))
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[key], wanted[key]) for key in wanted)
    for name in (
        "vision_tower/config.json",
        "vision_tower/preprocessor_config.json",
        "siglip_config/config.json",
        "mm_projector/config.json",
    ):
        assert json.loads((tmp_path / name).read_text()) == json.loads((TOY / name).read_text())
    assert sorted(path.name for path in (tmp_path / "vision_tower").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip


def test_what_was_trained_is_saved_even_over_the_file_it_came_from(tmp_path: Path) -> None:
    folder = edit_tower(tmp_path / "own")
    tower = VisionTower.load(folder)
    with torch.no_grad():
        tower.rqtransformer.in_mlp_1.bias.add_(1)
    tower.save(folder)
    tower.save(folder)
    tensors = toy_tensors()
    tensors["rqtransformer.in_mlp_1.bias"] += 1
    assert_same_file(folder, tensors)


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_halfway(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    folder = edit_tower(tmp_path / "full")
    tower = VisionTower.load(folder)
    monkeypatch.setattr("diptych.models.vila_u.vision.save_file", fail_halfway)
    with pytest.raises(OSError, match="No space left"):
        tower.save(folder)
    assert_same_file(folder, toy_tensors())


def test_half_precision_converts_what_runs_and_keeps_codebooks_and_the_unused(tmp_path: Path, reference: dict[str, Tensor]) -> None:
    tower = VisionTower.load(TOY, dtype=torch.bfloat16)
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}
    tower.save(tmp_path / "half")
    saved, wanted = load_file(tmp_path / "half" / "vision_tower" / "model.safetensors"), toy_tensors()
    for key in ("codebooks.3.weight", "codebooks.0.embed_ema", "encoder.layers.2.mlp.fc1.weight", "text_model.head.weight"):
        full = next(name for name in wanted if name.endswith(key) and ("text" in key or "text_model" not in name))
        assert torch.equal(saved[full], wanted[full]), key
    assert saved["rqtransformer.pos_emb_d"].dtype == torch.bfloat16
    codes = tower.encode(reference["encode.pixel_values"])
    assert (codes == reference["encode.codes"].flatten(1, 2))[..., 0].float().mean() > 0.9  # the spec saw 98 %
    assert tower.decode(codes).dtype == torch.float32

    release = {key: tensor.bfloat16() for key, tensor in wanted.items()}
    folder = edit_tower(tmp_path / "release", release)
    VisionTower.load(folder, dtype=torch.bfloat16).save(tmp_path / "again")
    assert_same_file(tmp_path / "again", release)


def without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t for k, t in tensors.items() if "codebooks." not in k or "codebooks.0." in k}


def test_one_copy_of_a_shared_codebook_is_as_good_as_four(tower: VisionTower, tmp_path: Path) -> None:
    one = VisionTower.load(edit_tower(tmp_path / "one", without_copies(toy_tensors())))
    assert one.state_dict().keys() == tower.state_dict().keys()
    assert all(torch.equal(one.state_dict()[key], tensor) for key, tensor in tower.state_dict().items())
    one.save(tmp_path / "four")
    assert_same_file(tmp_path / "four", toy_tensors())


def test_shards_load_like_one_file(tower: VisionTower, tmp_path: Path) -> None:
    tensors, folder = toy_tensors(), edit_tower(tmp_path / "shards")
    (folder / "vision_tower" / "model.safetensors").unlink()
    shards = {"b.safetensors": list(tensors)[::2], "a.safetensors": list(tensors)[1::2]}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / "vision_tower" / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (folder / "vision_tower" / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = VisionTower.load(folder)
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in tower.state_dict().items())
    (folder / "vision_tower" / "a.safetensors").unlink()
    with pytest.raises(ValueError, match=r"vision_tower/a\.safetensors is missing; copy"):
        VisionTower.load(folder)


def release_config() -> dict[str, Any]:
    """`vision_tower/config.json` at 256 pixels as the spec describes it, with a key we do not know."""
    return {
        "model_type": "rqvaesigliptransformer_model", "hidden_size": 1024, "torch_dtype": "bfloat16",
        "rqvaesiglip": {
            "embed_dim": 1024, "n_embed": 16384, "latent_shape": [16, 16, 1024], "code_shape": [16, 16, 4], "shared_codebook": True,
            "decoder_latent_shape": None, "pretrained_model": "google/siglip-large-patch16-256",
            "ddconfig": {
                "ch": 128, "out_ch": 3, "ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "in_channels": 3,
                "resolution": 256, "z_channels": 256, "dropout": 0.0, "double_z": False,
            },
        },
        "rqtransformer": {
            "block_size": [16, 16, 4], "input_embed_dim_1": 1024, "input_embed_dim_2": 4096, "embed_dim": 2560, "vocab_size": 16384,
            "head": {"n_layer": 6, "block": {"n_head": 40}},
        },
    }  # fmt: skip


def test_the_released_model_has_exactly_the_expected_keys_and_shapes() -> None:
    expected: dict[str, list[int]] = json.loads((DATA / "expected_keys.json").read_text())["keys"]
    assert len(expected) == 1107
    with torch.device("meta"):
        tower = VisionTower(VisionConfig.from_dicts(release_config()))
        tensors = without_copies({key: torch.empty(shape) for key, shape in expected.items()})
    tower.fill([(Path("x"), key, tensor) for key, tensor in tensors.items()], torch.bfloat16, "meta")
    assert {key: list(tensor.shape) for key, tensor in tower.release_tensors().items()} == expected
    # What runs, and nothing else, is in the modules; counts from the spec.
    siglip = sum(p.numel() for p in tower.rqvaesiglip.siglip_model.parameters())
    decoder = sum(p.numel() for p in tower.rqvaesiglip.decoder.parameters())
    depth = sum(p.numel() for p in tower.rqtransformer.parameters())
    assert (siglip, decoder, depth) == (290_762_752, 42_449_795, 527_145_984)
    assert sum(p.numel() for p in tower.parameters()) == siglip + decoder + depth + 262_400
    assert (tower.config.num_positions, tower.config.pixel_size, tower.config.decoded_size) == (256, 256, 256)


# --- what a user can get wrong -----------------------------------------------------------------------------------------
def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = edit_tower(tmp_path / "broken")
    weights = folder / "vision_tower" / "model.safetensors"
    whole = weights.read_bytes()
    for contents in (whole[: len(whole) // 2], whole[:100], b"version https://git-lfs.github.com/spec/v1\n", b""):
        weights.write_bytes(contents)
        with pytest.raises(ValueError, match=r"vision_tower/model\.safetensors is damaged or truncated .*; copy it again"):
            VisionTower.load(folder)
    weights.unlink()
    with pytest.raises(ValueError, match=r"vision_tower/model\.safetensors is missing; copy the whole checkpoint folder"):
        VisionTower.load(folder)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    key = "rqtransformer.head_transformer.blocks.1.attn.query.weight"
    tensors = toy_tensors()
    tensors[key] = tensors[key][:-1].clone()
    with pytest.raises(ValueError, match=rf"model\.safetensors: {key} has shape \[47, 48\], the configs ask for \[48, 48\]; take"):
        VisionTower.load(edit_tower(tmp_path / "shape", tensors))
    del tensors[key]
    with pytest.raises(ValueError, match=rf"vision_tower lacks 1 tensors, {key} for one; copy"):
        VisionTower.load(edit_tower(tmp_path / "missing", tensors))
    tensors = toy_tensors()
    tensors[CODEBOOK.format(2, "weight")] += 1
    with pytest.raises(ValueError, match=r"model\.safetensors: .*codebooks\.2\.weight differs from .*codebooks\.0\.weight, but .*set it"):
        VisionTower.load(edit_tower(tmp_path / "copies", tensors))
    with pytest.raises(ValueError, match=r"mm_projector/model\.safetensors: layers\.0\.weight has shape \[64, 32\]"):
        Projector.load(TOY, width_in=48, width_out=64)


def test_configs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    config = toy_config()
    del config["rqvaesiglip"]["n_embed"]
    config["rqtransformer"]["embed_dim"] = "wide"
    with pytest.raises(
        ValueError, match=r"vision_tower/config\.json .*rqvaesiglip\.n_embed: Field required.*rqtransformer\.embed_dim: .*wide"
    ):
        VisionConfig.load(edit_tower(tmp_path / "field", config=config))
    config = toy_config()
    config["rqtransformer"]["vocab_size"] = 1000
    with pytest.raises(ValueError, match=r"rqtransformer\.vocab_size is 1000 but must be 1024 like rqvaesiglip\.n_embed"):
        VisionConfig.load(edit_tower(tmp_path / "contradiction", config=config))
    folder = edit_tower(tmp_path / "json")
    (folder / "vision_tower" / "config.json").write_text('{"rqvae')
    with pytest.raises(ValueError, match=r"vision_tower/config\.json is not valid JSON"):
        VisionConfig.load(folder)
    (folder / "vision_tower" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"vision_tower/config\.json is missing"):
        VisionConfig.load(folder)
    (folder / "mm_projector" / "config.json").write_text('{"mm_projector_type": "linear"}')
    with pytest.raises(ValueError, match=r"mm_projector_type 'linear'; only 'mlp2x_gelu'"):
        Projector.load(folder, width_in=32, width_out=64)


def test_the_siglip_architecture_is_known_given_or_asked_for(tmp_path: Path, tower: VisionTower) -> None:
    whole = json.loads((TOY / "siglip_config" / "config.json").read_text())
    folder = edit_tower(tmp_path / "bare")
    shutil.rmtree(folder / "siglip_config")
    with pytest.raises(
        ValueError, match=r"pretrained_model is 'siglip_config'.*known are google/siglip-large-patch16-256.*Put that SigLIP's"
    ):
        VisionTower.load(folder)
    for given in (whole, whole["vision_config"]):
        loaded = VisionTower.load(folder, siglip=given)
        assert loaded.config.siglip == tower.config.siglip
    loaded.save(tmp_path / "saved")  # now with the config that was given
    assert VisionTower.load(tmp_path / "saved").config.siglip == tower.config.siglip
    local = release_config()
    local["rqvaesiglip"]["pretrained_model"] = "/home/someone/siglip-large-patch16-256/"
    assert VisionConfig.from_dicts(local).siglip == VisionConfig.from_dicts(release_config()).siglip
    with pytest.raises(ValueError, match=r"latent_shape is \(4, 4, 32\) but must be \(16, 16, 1024\) like SigLIP's"):
        VisionConfig.from_dicts(toy_config(), siglip={"hidden_size": 1024, "image_size": 256})


def test_pixels_of_another_size_are_refused(tower: VisionTower) -> None:
    with pytest.raises(ValueError, match=r"pixels have shape \[1, 3, 64, 64\], but this model reads \[N, 3, 32, 32\]; resize"):
        tower.encode(torch.zeros(1, 3, 64, 64))


def test_tensors_without_a_place_are_handed_back(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2), "spare": torch.ones(1)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        linear = torch.nn.Linear(3, 2)
    linear.bias.requires_grad_(False)
    others = fill_module(linear, read_tensors(tmp_path), torch.float16, "cpu")
    assert others.keys() == {"spare"}
    assert linear.weight.dtype == torch.float16
    assert (linear.weight.requires_grad, linear.bias.requires_grad) == (True, False)
