"""A family's adapter without weights: its stock classes on the meta device, and what stands in the way of building it.

Checks of keys are the loaders' own: transformers is given meta tensors of the shapes that the files hold and reports what it misses.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

from diptych.doctor.files import Stored, read_json_object, read_weights, say_misshapen, say_missing, stored_as
from diptych.doctor.vocabulary import TOKENS, SizedStandIn, StandIn, StandInMap, check_maps, check_words, read_tokenizer
from diptych.models import janus_config, janus_weights
from diptych.models.base import UnifiedModel
from diptych.models.chameleon import ChameleonModel, load_decoder
from diptych.models.emu3_5 import checkpoint as emu3_5_files
from diptych.models.emu3_5 import config as emu3_5_config
from diptych.models.emu3_5 import tokenizer as emu3_5_words
from diptych.models.emu3_5.model import Emu35Model, Files
from diptych.models.emu3_5.vision import VisionTokenizer
from diptych.models.hf import HARMLESS_KEYS, HFModel, OneVocabularyModel
from diptych.models.janus import JanusModel
from diptych.models.options_file import OPTIONS_FILE
from diptych.models.storyboard.model import StoryboardConfig, StoryboardModel
from diptych.models.vila_u.config import VISION_FOLDER, VisionConfig
from diptych.models.vila_u.model import VilaUModel
from diptych.models.vila_u.vision import PROJECTOR_FOLDER, Projector, VisionTower, check_leftovers

LLM_FOLDER = "llm"
PREPROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"


@dataclasses.dataclass
class Skeleton:
    """`model`: the adapter on the meta device; None where it could not be built. `tokenizer`: None where it could not be read."""

    model: UnifiedModel | None = None
    tokenizer: Any = None
    stored: list[Stored] = dataclasses.field(default_factory=list)


def build_skeleton(family: type[UnifiedModel], folder: Path, problems: list[str]) -> Skeleton:
    """Reads what can be read of a checkpoint folder and adds everything that is wrong with it to `problems`."""
    with _silent():
        if issubclass(family, HFModel):
            return _stock(family, folder, problems)
        if issubclass(family, VilaUModel):
            return _vila_u(folder, problems)
        if issubclass(family, Emu35Model):
            return _emu3_5(folder, problems)
        assert issubclass(family, StoryboardModel), f"the doctor does not know {family.__name__}"
        return _storyboard(folder, problems)


def _stock(family: type[HFModel], folder: Path, problems: list[str]) -> Skeleton:
    deepseek = issubclass(family, JanusModel) and janus_config.is_deepseek(folder)
    skeleton = Skeleton(stored=[read_weights(folder, problems, torch_files=deepseek)])
    config = _attempt(lambda: family.stock_config(folder), folder / "config.json", problems)
    if config is None:
        return skeleton
    one_vocabulary = issubclass(family, OneVocabularyModel)
    if one_vocabulary and not isinstance(config.vocabulary_map, dict):
        config.vocabulary_map = {}  # the stock classes cannot be built without; `check_maps` tells
    make_stock = _deepseek_model if deepseek else _stock_model
    hf = make_stock(family.hf_class, config, folder, skeleton.stored[0], problems)
    before = len(problems)
    skeleton.tokenizer = read_tokenizer(folder, problems, family.check_tokenizer)
    if hf is not None:
        if (folder / GENERATION).is_file():
            hf.generation_config = _attempt(lambda: GenerationConfig.from_pretrained(folder), folder / GENERATION, problems)
        rows = int(hf.get_input_embeddings().weight.shape[0])
        tokens = list(janus_config.tags(folder).values())[:3] if deepseek else TOKENS[family.family]
        check_words(family.family, folder, skeleton.tokenizer, rows, problems, hf.generation_config, tokens)
        if one_vocabulary and not check_maps(family.family, folder, hf, rows, problems):
            hf.model.vocabulary_mapping = StandInMap(hf.config.vq_config)
    processor = _read_processor(family, folder, problems)
    if hf is not None:
        if issubclass(family, ChameleonModel):
            _check_decoder(folder, hf, problems)
        make = cast(Callable[..., UnifiedModel], family)
        skeleton.model = _assemble(lambda words: make(hf, words, processor, folder), skeleton.tokenizer, problems, before)
    return skeleton


def _vila_u(folder: Path, problems: list[str]) -> Skeleton:
    root = read_json_object(folder / "config.json", problems) or {}
    skeleton, parts = Skeleton(), {name: folder / name for name in (LLM_FOLDER, VISION_FOLDER, PROJECTOR_FOLDER)}
    for name, part in parts.items():
        if not part.is_dir():
            problems.append(f"{folder} has no folder {name}/; a VILA-U checkpoint has {', '.join(f'{n}/' for n in parts)}: copy all three")
    llm, vision, projector, tokenizer = None, None, None, None
    before = len(problems)
    if parts[LLM_FOLDER].is_dir():
        stored = read_weights(parts[LLM_FOLDER], problems)
        skeleton.stored.append(stored)
        if read_json_object(parts[LLM_FOLDER] / "config.json", problems) is not None:
            config = _attempt(lambda: LlamaConfig.from_pretrained(parts[LLM_FOLDER]), parts[LLM_FOLDER] / "config.json", problems)
            llm = None if config is None else _stock_model(LlamaForCausalLM, config, parts[LLM_FOLDER], stored, problems)
        before = len(problems)
        tokenizer = read_tokenizer(parts[LLM_FOLDER], problems)
        if llm is not None:
            check_words("vila_u", parts[LLM_FOLDER], tokenizer, llm.config.vocab_size, problems)
    if parts[VISION_FOLDER].is_dir():
        vision = _attempt(lambda: _on_meta(lambda: VisionTower(VisionConfig.load(folder))), parts[VISION_FOLDER], problems, "")
        found = _compare(parts[VISION_FOLDER], vision, "VILA-U's vision tower", problems)
        skeleton.stored.append(found)
        if vision is not None:
            unused = found.tensors.keys() - vision.state_dict().keys()
            _attempt(lambda: check_leftovers(vision.config, unused, parts[VISION_FOLDER]), parts[VISION_FOLDER], problems, "")
    if vision is not None and llm is not None:
        widths = vision.config.codec.embed_dim, llm.config.hidden_size
        projector = _on_meta(lambda: Projector(*widths))
        if (stated := (root.get("mm_hidden_size", widths[0]), root.get("hidden_size", widths[1]))) != widths:
            problems.append(f"{folder / 'config.json'} states the widths {stated}, its parts have {widths}; take all from one release")
    if parts[PROJECTOR_FOLDER].is_dir():
        raw = read_json_object(parts[PROJECTOR_FOLDER] / "config.json", problems)
        if raw is not None and (kind := raw.get("mm_projector_type")) != "mlp2x_gelu":
            problems.append(f"{parts[PROJECTOR_FOLDER] / 'config.json'} has mm_projector_type {kind!r}; only 'mlp2x_gelu' can be loaded")
        skeleton.stored.append(_compare(parts[PROJECTOR_FOLDER], projector, "the projector", problems, exact=True))
    skeleton.tokenizer = tokenizer
    if llm is not None and vision is not None and projector is not None:
        skeleton.model = _assemble(lambda words: VilaUModel(llm, vision, projector, words, folder), tokenizer, problems, before)
    return skeleton


def _emu3_5(folder: Path, problems: list[str]) -> Skeleton:
    """Of two repositories; a vision tokenizer that is not there is taken to be the release's, so that sizes can be given all the same."""
    skeleton = Skeleton(stored=[read_weights(folder, problems)])
    language = _attempt(lambda: emu3_5_config.read_language_config(folder), folder / "config.json", problems, "")
    options = _attempt(lambda: emu3_5_config.read_options(folder), folder / OPTIONS_FILE, problems, "")
    hf, stored = None, skeleton.stored[0]
    _attempt(lambda: emu3_5_config.check_names({*stored.tensors, *stored.lost}, folder), folder, problems, "")
    if language is not None:
        stock = _attempt(lambda: emu3_5_config.stock_config(language), folder / "config.json", problems)
        hf = None if stock is None else _stock_model(Qwen3ForCausalLM, stock, folder, stored, problems)
    vision_folder = None
    if options is not None:
        find = emu3_5_files.find_vision_folder
        vision_folder = _attempt(lambda: find(folder, options.vision_tokenizer, fetch=False), folder, problems, "")
    vision = None if vision_folder is None else _read_vision(vision_folder, skeleton, problems)
    before = len(problems)
    ranks = _attempt(lambda: emu3_5_words.read_ranks(folder / emu3_5_words.RANKS), folder, problems, "")
    num_codes = _attempt(lambda: emu3_5_words.count_codes(folder / emu3_5_words.VISUAL), folder, problems, "")
    if ranks is not None and num_codes is not None:
        skeleton.tokenizer = emu3_5_words.build_tokenizer(ranks)
    if hf is None or language is None:
        return skeleton
    num_codes = num_codes or (vision.config.codebook_size if vision is not None else emu3_5_config.RELEASED_VISION["codebook_size"])
    if vision is None:
        sizes = emu3_5_config.VisionConfig.model_validate({**emu3_5_config.RELEASED_VISION, "codebook_size": num_codes})
        vision = _on_meta(lambda: VisionTokenizer(sizes))
    rows, chosen = int(hf.get_input_embeddings().weight.shape[0]), options or emu3_5_config.Options()

    def make(words: Any) -> UnifiedModel:
        words = SizedStandIn(rows - num_codes) if isinstance(words, StandIn) else words
        return Emu35Model(hf, language, words, num_codes, vision, chosen, Files.of(folder, None), folder)

    skeleton.model = _assemble(make, skeleton.tokenizer, problems, before)
    return skeleton


def _read_vision(folder: Path, skeleton: Skeleton, problems: list[str]) -> VisionTokenizer | None:
    """Emu3.5's vision tokenizer on the meta device, its keys compared with those of the file."""
    config = _attempt(lambda: emu3_5_config.read_vision_config(folder), folder, problems, "")
    if (folder / emu3_5_files.WEIGHTS).is_file() or not (folder / emu3_5_files.TORCH_WEIGHTS).is_file():
        stored = read_weights(folder, problems)
    else:
        found = _attempt(lambda: emu3_5_files.vision_weights(folder)[1], folder, problems, "")
        stored = Stored(complete=False) if found is None else stored_as(found)
    skeleton.stored.append(stored)
    vision = None if config is None else _on_meta(lambda: VisionTokenizer(config))
    if vision is not None:
        wanted = {key: tuple(tensor.shape) for key, tensor in vision.state_dict().items()}
        _compare_shapes(folder, wanted, stored, "the IBQ tokenizer", problems, exact=True)
    return vision


def _storyboard(folder: Path, problems: list[str]) -> Skeleton:
    from tokenizers import Tokenizer

    fields = read_json_object(folder / "config.json", problems)
    tokenizer = _attempt(lambda: Tokenizer.from_file(str(folder / "tokenizer.json")), folder / "tokenizer.json", problems)
    model = None
    if fields is not None:
        own: dict[str, Any] = {key: tuple(value) if key == "levels" else value for key, value in fields.items() if key != "model_type"}
        model = _attempt(
            lambda: StoryboardModel(StoryboardConfig(**own), cast(Any, tokenizer)).to("meta"), folder / "config.json", problems
        )
    stored = _compare(folder, model, "the Storyboard model", problems, exact=True)
    if tokenizer is not None and model is not None and tokenizer.get_vocab_size() > model.vocab_size:
        problems.append(
            f"{folder / 'tokenizer.json'} has {tokenizer.get_vocab_size()} tokens, but config.json vocab_size={model.vocab_size}"
        )
    return Skeleton(model, tokenizer, [stored])


def _stock_model(
    cls: type[PreTrainedModel], config: Any, folder: Path, stored: Stored, problems: list[str]
) -> Any:  # fmt: skip
    """None, or the stock class on the meta device, its keys compared with those of the files by transformers' own loader."""

    def load() -> Any:
        return cls.from_pretrained(
            None, config=config, state_dict=stored.on_meta(), device_map={"": "meta"}, dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip

    found = _attempt(load, folder / "config.json", problems)
    if found is None:
        return None
    model, report = found
    if stored.complete:
        unexpected = [key for key in report["unexpected_keys"] if not re.search(HARMLESS_KEYS, key)]
        say_missing(folder, cls.__name__, report["missing_keys"], unexpected, problems)
    shapes = {key: (given, wanted) for key, given, wanted in report["mismatched_keys"] if tuple(given) != (0,)}
    say_misshapen(folder, cls.__name__, shapes, problems)
    return model


def _deepseek_model(cls: type[PreTrainedModel], config: Any, folder: Path, stored: Stored, problems: list[str]) -> Any:
    """The same for Janus in DeepSeek's layout, in its own names."""
    make: Callable[[Any], Any] = cls
    model = _attempt(lambda: _on_meta(lambda: make(config)), folder / "config.json", problems)
    if model is not None:
        known = re.compile(f"{janus_weights.UNUSED}|{janus_weights.COMPUTED}")
        given = dataclasses.replace(stored, tensors={key: value for key, value in stored.tensors.items() if not known.search(key)})
        wanted = janus_weights.deepseek_shapes(model)
        if janus_weights.HEAD not in wanted:  # tied
            given.tensors.pop(janus_weights.HEAD, None)
        _compare_shapes(folder, wanted, given, "Janus", problems, exact=True)
    return model


def _compare(folder: Path, module: nn.Module | None, kind: str, problems: list[str], exact: bool = False) -> Stored:
    """Keys and shapes of a module of ours against the files. `exact`: the loader refuses what it has no place for."""
    stored = read_weights(folder, problems)
    if module is None:
        return stored
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    _compare_shapes(folder, wanted, stored, kind, problems, exact)
    return stored


def _compare_shapes(
    folder: Path, wanted: dict[str, tuple[int, ...]], stored: Stored, kind: str, problems: list[str], exact: bool
) -> None:  # fmt: skip
    given = {key: shape for key, (_, shape) in stored.tensors.items()}
    missing, unknown = wanted.keys() - given.keys() - stored.lost, given.keys() - wanted.keys()
    if stored.complete:
        say_missing(folder, kind, missing, unknown if exact else (), problems)
    say_misshapen(folder, kind, {k: (given[k], wanted[k]) for k in wanted.keys() & given.keys() if given[k] != wanted[k]}, problems)


def _read_processor(family: type[HFModel], folder: Path, problems: list[str]) -> Any:
    settings = folder / PREPROCESSOR
    if settings.is_file() and read_json_object(settings, problems) is None:
        return None
    try:
        return family.read_image_processor(folder)
    except ValueError as error:
        missing = f"{settings} is missing, which says how pictures are prepared; copy it from the release"
        problems.append(str(error) if settings.is_file() else missing)
        return None


def _check_decoder(folder: Path, hf: Any, problems: list[str]) -> None:
    """The original checkpoint's float32 is mapped into memory and not read."""
    try:
        found = load_decoder(folder, hf.config.vq_config, torch.float32)
    except ValueError as error:
        problems.append(f"{error}. Copy it again")
        return
    if found is None:
        problems.append(
            f"warning: {folder} can write codes but not turn them into pictures, because transformers' Chameleon has no decoder: none "
            "can be shown or judged by a reward. Put the original release's vqgan.ckpt or tokenizer/vqgan.ckpt into the folder"
        )


def _assemble(make: Callable[[Any], UnifiedModel], tokenizer: Any, problems: list[str], before: int) -> UnifiedModel | None:
    """The adapter, with a stand-in for a tokenizer that will not do, so that sizes can be given all the same.

    `before`: how many problems there were before the tokenizer's; if a check has spoken since, the adapter's own refusal is no news.
    """
    refusal = None
    for words in ([tokenizer] if tokenizer is not None else []) + [StandIn()]:
        try:
            return make(words)
        except Exception as error:  # a broken folder may break anything in the adapter; what it says is all there is to tell
            refusal = refusal or str(error)
        finally:
            if refusal is not None and len(problems) == before:
                problems.append(refusal)
    return None


def _attempt(make: Callable[[], Any], source: Path, problems: list[str], advice: str = ". Take it from the release again") -> Any:
    """What `make` gives, or None and a problem: configs may hold any nonsense, on which libraries fail in any way."""
    try:
        return make()
    except Exception as error:
        said = " ".join(str(error).split())[:400] or type(error).__name__
        where = "" if str(source) in said else f"{source} cannot be used: "
        problems.append(f"{where}{said}{advice}")
        return None


def _on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' warnings and progress bars: what matters is among the problems."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
