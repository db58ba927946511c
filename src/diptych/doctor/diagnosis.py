"""From a name or a folder to a diagnosis."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from diptych.doctor.adapter import Adapter, check_fit, read_adapter
from diptych.doctor.files import read_json_object
from diptych.doctor.hardware import Gpu, gpus
from diptych.doctor.memory import MODES, DocumentSize, Memory, Sizes, estimate, stored_tensors
from diptych.doctor.scale import Fleet, Plan, plan
from diptych.doctor.skeleton import Skeleton, build_skeleton
from diptych.models.base import UnifiedModel
from diptych.models.loading import PACKAGED, family_of, packaged_folder
from diptych.models.lora import DESCRIPTION
from diptych.models.storyboard.model import StoryboardModel

LANGUAGE_MODEL, HEADS, DEPTH, CODEC, TOTAL = (
    "language model", "embeddings and heads", "depth transformer", "image tokenizer and vision encoder", "total",
)  # fmt: skip
_DEPTH_NAMES = ("vision.rqtransformer.", "depth_")  # VILA-U, Storyboard


@dataclasses.dataclass
class Diagnosis:
    """What a checkpoint folder holds, and what is wrong with it. None: could not be read. `dataclasses.asdict` gives JSON.

    problems: empty for a healthy folder; what can be lived with begins with "warning: ".
    parameters: by part; saved buffers such as codebooks count. dtypes: numbers stored by safetensors dtype.
    architecture: hidden_size, layers, heads, kv_heads, context, vocab_size. special_tokens: name -> [id, string].
    image: positions, depth, codebook_size, pixel_size, length (sequence positions with begin and forced tokens).
    defaults: how the release samples. prompt_pictures: "codes" or "features". decodes: whether codes become pictures.
    document: what memory was computed for, `positions` it takes and whether it `fits` the context. memory: by mode, GiB.
    fits: by mode, for each of `gpus`. scale: what several GPUs need, where it was asked for.
    """

    source: str
    folder: str | None = None
    family: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    adapter: Adapter | None = None
    parameters: dict[str, int] | None = None
    dtypes: dict[str, int] | None = None
    architecture: dict[str, int] | None = None
    image: dict[str, int] | None = None
    special_tokens: dict[str, tuple[int, str]] | None = None
    defaults: dict[str, float | None] | None = None
    prompt_pictures: str | None = None
    decodes: bool | None = None
    lora_targets: int | None = None
    document: dict[str, int | bool] | None = None
    memory: dict[str, Memory] | None = None
    gpus: list[Gpu] = dataclasses.field(default_factory=list)
    fits: dict[str, list[bool]] | None = None
    scale: Plan | None = None


@dataclasses.dataclass(frozen=True)
class Asked:
    """What memory is computed for. `fleet`: None: one process on one GPU. `kl`: with a KL term. `adamw_8bit`: of a fleet."""

    document: DocumentSize
    fleet: Fleet | None = None
    kl: bool = False
    adamw_8bit: bool = False


def examine(
    source: str, *, num_images: int = 3, num_generations: int = 8, text_tokens: int = 256, num_prompts: int = 1, fleet: Fleet | None = None,
    kl: bool = False, adamw_8bit: bool = False,
) -> Diagnosis:  # fmt: skip
    """Looks into a packaged model, a checkpoint or adapter folder, or a hub id that was downloaded before. Loads no weights.

    Args:
        num_images, text_tokens: of the document that memory is computed for; num_generations, num_prompts: sampled together on a GPU.
        fleet: GPUs that train it together; what each of them needs is in `scale`. kl: with a KL term (`beta` not 0). adamw_8bit: with
        moments of 8 bits, of a fleet.
    Raises:
        ValueError for a number below 1 (num_images: below 0). What is wrong with the folder is in `problems`.
    """
    document = DocumentSize(num_images, num_generations, text_tokens, num_prompts)
    return _examine(str(source), Asked(document, fleet, kl, adamw_8bit))[0]


def _examine(source: str, asked: Asked) -> tuple[Diagnosis, UnifiedModel | None]:
    found = Diagnosis(source)
    folder = _find(source, found.problems)
    if folder is None:
        return found, None
    found.folder = str(folder)
    if (folder / DESCRIPTION).is_file():
        return _examine_adapter(source, folder, asked)
    family = _family(folder, found.problems)
    if family is None:
        return found, None
    found.family = family.family
    skeleton = build_skeleton(family, folder, found.problems)
    numbers: Counter[str] = sum((stored.numbers_by_dtype() for stored in skeleton.stored), Counter())
    found.dtypes = dict(numbers.most_common()) or None
    if skeleton.model is not None:
        _describe(found, skeleton, asked)
    return found, skeleton.model


def _examine_adapter(source: str, folder: Path, asked: Asked) -> tuple[Diagnosis, UnifiedModel | None]:
    """The base's diagnosis under the adapter's name, with the problems of both."""
    problems: list[str] = []
    adapter, shapes, targets = read_adapter(folder, problems)
    if adapter is None:
        return Diagnosis(source, str(folder), problems=problems), None
    if Path(adapter.base).is_dir() and Path(adapter.base).resolve() == folder.resolve():
        problems.append(f"{folder / DESCRIPTION} names the adapter's own folder as its base model; write the base's folder there")
        return Diagnosis(source, str(folder), problems=problems, adapter=adapter), None
    base, model = _examine(adapter.base, asked)
    if model is not None and base.adapter is None:
        check_fit(folder, adapter, shapes, targets, model, problems)
    problems += [said if said.startswith("warning: ") else f"the base model: {said}" for said in base.problems]
    return dataclasses.replace(base, source=source, folder=str(folder), adapter=adapter, problems=problems), model


def _find(source: str, problems: list[str]) -> Path | None:
    """As `models.loading.model_folder`, but nothing is downloaded."""
    if source in PACKAGED:
        return packaged_folder(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    known = f"give a checkpoint folder, an adapter folder, a hub id such as org/name, or one of: {', '.join(PACKAGED)}"
    if folder.exists():
        problems.append(f"{source} is a file, not a folder; {known}")
    elif source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            problems.append(
                f"there is no folder {source}, and no hub model of that name was downloaded yet: hf download {source}; or {known}"
            )
    else:
        problems.append(f"there is no folder {source}; {known}")
    return None


def _family(folder: Path, problems: list[str]) -> type[UnifiedModel] | None:
    if not (folder / "config.json").is_file() and (folder / "checkpoints").is_dir():
        problems.append(f"{folder} is the folder of a run, not a checkpoint; give {folder}/checkpoints/step_N/model")
    elif read_json_object(folder / "config.json", problems) is not None:
        try:
            return family_of(folder)
        except ValueError as error:
            problems.append(str(error))
    return None


def _describe(found: Diagnosis, skeleton: Skeleton, asked: Asked) -> None:
    model, document = skeleton.model, asked.document
    assert model is not None
    sizes, spec, sampling = Sizes.of(model), model.image_spec, model.default_sampling
    found.parameters = count_parts(model)
    found.architecture = {
        "hidden_size": sizes.hidden, "layers": sizes.layers, "heads": sizes.heads, "kv_heads": sizes.kv_heads,
        "context": sizes.context, "vocab_size": sizes.vocab,
    }  # fmt: skip
    found.image = {
        "positions": spec.num_positions, "depth": spec.depth, "codebook_size": spec.codebook_size, "pixel_size": spec.pixel_size,
        "length": spec.length,
    }  # fmt: skip
    if skeleton.tokenizer is not None and getattr(model, "tokenizer", None) is skeleton.tokenizer:
        found.special_tokens = _special_tokens(model, skeleton.tokenizer)
    found.defaults = {
        "guidance_scale": sampling.image.guidance_scale, "image_top_k": sampling.image.top_k, "image_top_p": sampling.image.top_p,
        "text_temperature": sampling.text.temperature, "text_top_k": sampling.text.top_k, "text_top_p": sampling.text.top_p,
    }  # fmt: skip
    found.prompt_pictures = "codes" if type(model).prompt_image_embeds is UnifiedModel.prompt_image_embeds else "features"
    found.decodes = getattr(model, "picture_decoder", model) is not None
    found.lora_targets = sizes.layers * len(sizes.matrices)
    positions = sizes.answer(document)
    found.document = {**dataclasses.asdict(document), "positions": positions, "fits": positions <= sizes.context}
    four_bits = not isinstance(model, StoryboardModel)  # which has no 4-bit form
    modes = [mode for mode in MODES if mode != "qlora" or four_bits]
    found.memory = {mode: estimate(sizes, document, mode, kl=asked.kl) for mode in modes}
    found.gpus = gpus()
    found.fits = {mode: [memory.fits(gpu.gib) for gpu in found.gpus] for mode, memory in found.memory.items()}
    if asked.fleet is not None:
        found.scale = plan(sizes, asked.fleet, document, kl=asked.kl, adamw_8bit=asked.adamw_8bit, four_bits=four_bits)


def count_parts(model: UnifiedModel) -> dict[str, int]:
    """Numbers in parameters and saved buffers (floating point), by part."""
    frozen = {id(tensor) for module in model.frozen_modules() for tensor in stored_tensors(module).values()}
    inside = {id(p) for p in model.language_model.parameters()}
    language_model: Any = model.language_model
    inside -= {id(p) for p in language_model.get_input_embeddings().parameters()}
    counts = dict.fromkeys((LANGUAGE_MODEL, HEADS, DEPTH, CODEC), 0)
    for name, tensor in stored_tensors(model).items():
        if not tensor.is_floating_point():
            continue
        if id(tensor) in frozen:
            part = CODEC
        elif name.startswith(_DEPTH_NAMES):
            part = DEPTH
        else:
            part = LANGUAGE_MODEL if id(tensor) in inside else HEADS
        counts[part] += tensor.numel()
    return {**counts, TOTAL: sum(counts.values())}


def _special_tokens(model: UnifiedModel, tokenizer: Any) -> dict[str, tuple[int, str]]:
    spec = model.image_spec
    ids = {"begin of image": spec.begin_id, "end of image": spec.end_id, "end of text": model.eos_id}
    for name in ("bos", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            ids[name] = int(number)
    string = tokenizer.id_to_token if hasattr(tokenizer, "id_to_token") else tokenizer.convert_ids_to_tokens
    return {name: (number, str(string(number))) for name, number in ids.items()}
