"""What a user writes never becomes a control token: every family, texts that spell tokens in every way, templates of every kind."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from family_data import picture
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as bodies
from toy_checkpoints import edit_json
from transformers import PreTrainedTokenizerFast

from diptych.document import Document, Image, Text
from diptych.models import UnifiedModel, load_model
from diptych.models.control_tokens import NO_CHARACTERS, new_name, stand_ins
from diptych.models.hf import TokenizerModel
from diptych.models.vila_u.model import SYSTEM
from diptych.tokens import Modality, TokenRow, valid_text

IMAGE = "<image>"  # what marks a picture in most templates; no token of VILA-U's
QUESTION = "what does the tag <s> do in HTML?"


@pytest.fixture
def model(models, family) -> UnifiedModel:
    return models[family]


def control_tokens(model: UnifiedModel) -> dict[str, int]:
    """As the tokenizer says, not the model."""
    tokenizer = model.tokenizer
    return {**tokenizer.get_added_vocab(), **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))}


def some_tokens(model: UnifiedModel) -> list[str]:
    """All but most of the image codes', of which there are 64."""
    tokens = list(control_tokens(model))
    codes = [token for token in tokens if token.startswith(("IMGIMG", "<|visual"))]
    return [token for token in tokens if token not in codes[2:]] + ([] if IMAGE in tokens else [IMAGE])


def seen(model: UnifiedModel) -> Image:
    """A picture that costs little to encode."""
    spec = model.image_spec
    return Image(picture(1)) if model.family == "janus" else Image(codes=torch.zeros(spec.num_positions, spec.depth, dtype=torch.long))


def text_ids(row: TokenRow) -> list[int]:
    return row.text_ids[row.modality == Modality.TEXT].tolist()


def controls_in(model: UnifiedModel, row: TokenRow) -> list[int]:
    numbers = set(control_tokens(model).values())
    return [i for i in text_ids(row) if i in numbers]


def harmless(document: Document) -> Document:
    """The same shape: every character but white space is an x."""
    return Document(tuple(Text("".join(c if c.isspace() else "x" for c in s.text)) if isinstance(s, Text) else s for s in document))


def bare(model: UnifiedModel, ids: list[int]) -> str:
    """The characters behind the tokens, control tokens too, without spaces (of which VILA-U's decoder loses some)."""
    return "".join(model.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).split())


@functools.cache
def frame(model: UnifiedModel) -> list[str]:
    """What the template writes before and after a text."""
    return bare(model, text_ids(model.encode_prompt(Document((Text("☃"),))))).split("☃")


def check(model: UnifiedModel, document: Document) -> None:
    """The control tokens of a prompt are those of any document of its shape, and every character of the user's is there as text."""
    row = model.encode_prompt(document)
    assert controls_in(model, row) == controls_in(model, model.encode_prompt(harmless(document)))
    if not document.images:
        before, after = frame(model)
        assert bare(model, text_ids(row)) == before + "".join("".join(s.text.split()) for s in document) + after


def check_answer(model: UnifiedModel, document: Document) -> None:
    row = model.encode_segments(document, answer=True)
    assert controls_in(model, row) == controls_in(model, model.encode_segments(harmless(document), answer=True))
    for segment in document:
        if isinstance(segment, Text):
            ids = model.encode_text(segment.text)
            assert not set(ids) & set(control_tokens(model).values())
            assert bare(model, ids) == "".join(segment.text.split())


def wide(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def spellings(model: UnifiedModel, token: str) -> list[Document]:
    """The token whole, at both ends, in other forms, and cut in two at every place, over texts and over a picture."""
    whole = [token, f"a {token} b", f"a{token}b", f" {token}", f"{token}\n", f"\t{token} {token}", token * 2, token.upper(), token.lower()]
    whole += [wide(token), token.replace(" ", "▁"), token.replace("▁", " "), token[:-1], token[1:], token[0], token[-1]]
    documents = [Document((Text(text),)) for text in whole]
    for at in range(1, len(token)):
        first, second = token[:at], token[at:]
        documents += [Document((Text(a), Text(b))) for a, b in ((first, second), (f"a{first}", f"{second}b"), (f"{first}\n", f" {second}"))]
    middle = len(token) // 2
    documents += [Document((Text(token[:middle]), seen(model), Text(token[middle:]))), Document((seen(model), Text(token)))]
    return documents


# --- every family ------------------------------------------------------------------------------------------------------


def test_no_spelling_of_a_control_token_becomes_one(model):
    for token in some_tokens(model):
        for document in spellings(model, token):
            check(model, document)
        check_answer(model, Document((Text(token), seen(model), Text(f"{token} a {wide(token)}"), Text(token[:2]), Text(token[2:]))))


def random_document(model: UnifiedModel, source: random.Random, pieces: list[str]) -> Document:
    """One to four segments of whole tokens, parts of them, parts of what templates write, spaces and letters."""
    segments: list[Text | Image] = []
    for _ in range(source.randint(1, 4)):
        if source.random() < 0.1:
            segments.append(seen(model))
            continue
        parts = []
        for _ in range(source.randint(0, 5)):
            piece = source.choice(pieces)
            cut = sorted(source.choices(range(len(piece) + 1), k=2)) if source.random() < 0.5 else [0, len(piece)]
            parts += [
                piece[cut[0] : cut[1]],
                *source.choices(["", " ", "\n", "\u2009", "a", "<", ">", "|", "ü", "😀"], [6, 2, 1, *[1] * 7]),
            ]
        segments.append(Text("".join(parts)))
    return Document(tuple(segments))


def test_a_thousand_documents_have_the_control_tokens_of_their_templates_alone(model):
    source, pieces = random.Random(7), [*some_tokens(model), "USER:", "ASSISTANT:", "<|User|>: ", "You are", "it is a ball."]
    spelled = 0
    for number in range(1000):
        document = random_document(model, source, pieces)
        check(model, document)
        if number % 4 == 0:
            check_answer(model, document)
        joined = "".join(segment.text for segment in document if isinstance(segment, Text))
        spelled += any(token in joined for token in control_tokens(model))
    assert spelled > 300


@pytest.mark.parametrize("name", ["janus", "emu3"])
def test_templates_that_trim_are_the_same_to_all_texts(models, name, monkeypatch):
    """The family's own, for checkpoints that bring none: what was apart in the document stands together in the prompt."""
    model, source = models[name], random.Random(11)
    monkeypatch.setattr(model, "template", model.default_template)
    for _ in range(200):
        token = source.choice(some_tokens(model))
        at, spaces = source.randint(0, len(token)), source.choices(["", " ", "\n", "\u2003"], k=4)
        texts = f"{spaces[0]}{token[:at]}{spaces[1]}", f"{spaces[2]}{token[at:]}{spaces[3]}"
        document = Document((*([seen(model)] if source.random() < 0.2 else []), *map(Text, texts)))
        written = controls_in(model, model.encode_prompt(document))
        assert written == controls_in(model, model.encode_prompt(harmless(document)))


def test_a_question_about_a_tag_is_a_prompt(model):
    row = model.encode_prompt(Document((Text(QUESTION),)))
    assert bare(model, text_ids(row)).count("whatdoesthetag<s>doinHTML?") == 1


def old_prompt(model: UnifiedModel, document: Document) -> list[list[int]]:
    """Tokens between pictures as the families' own code has them: the template, cut at pictures, special tokens read as such."""
    tokenizer = model.tokenizer
    if model.family == "vila_u":
        message = "".join(f" <im_start>{IMAGE}<im_end>\n" if isinstance(s, Image) else s.text.strip() for s in document).strip()
        rendered = f"{SYSTEM} USER: {message} ASSISTANT:" if message else f"{SYSTEM} USER:ASSISTANT:"
        found = [tokenizer.encode(piece, add_special_tokens=False) for piece in rendered.split(IMAGE)]
        return [[tokenizer.bos_token_id, *found[0]], *found[1:]]
    content = [{"type": "text", "text": s.text} if isinstance(s, Text) else {"type": "image"} for s in document]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=model.template, tokenize=False, add_generation_prompt=True
    )
    pieces = model.begin_prompt(rendered, len(document.images)).split(model.image_marker)
    return [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]


def new_prompt(model: UnifiedModel, document: Document) -> list[int]:
    """Text tokens without what stands around pictures by the family's image layout."""
    return text_ids(model.encode_prompt(document))


def test_harmless_prompts_are_what_they_were(model):
    """With a space, a newline, an accent and a picture at every place; the fast path must not change them."""
    source = random.Random(3)
    words = [
        "the red ball",
        " is",
        "\n",
        "  ",
        "naïve café",
        "1 < 2 and 3 > 2",
        "a|b",
        "[INST]",
        "😀",
        "x_y",
        "▁",
        ".",
        "\u2009",
        "<tag>",
        "''",
    ]
    with_pictures = 0
    for _ in range(300):
        segments = [Text("".join(source.choices(words, k=source.randint(0, 4)))) for _ in range(source.randint(1, 3))]
        document = Document((*segments[:1], *([seen(model)] if source.random() < 0.3 else []), *segments[1:]))
        expected, found = old_prompt(model, document), new_prompt(model, document)
        if not document.images:
            assert found == expected[0]
            continue
        with_pictures += 1
        assert len(expected) == 2
        assert found[: len(expected[0])] == expected[0]
        assert found[len(found) - len(expected[1]) :] == expected[1]
    assert with_pictures > 40


def test_what_spells_a_token_is_read_as_its_characters(model):
    """Between the template's own tokens the ids are those that the tokenizer has for text (`split_special_tokens`)."""
    tokenizer, controls = model.tokenizer, control_tokens(model)
    for token in some_tokens(model):
        text = f"see {token} twice: {token}, and {token[:3]} once"
        ids = text_ids(model.encode_prompt(Document((Text(text),))))
        if model.family == "vila_u":
            written = f"{SYSTEM} USER: {text} ASSISTANT:"
            assert ids == [tokenizer.bos_token_id, *tokenizer.encode(written, add_special_tokens=False, split_special_tokens=True)]
            continue
        sections: list[list[int]] = [[]]
        for i in ids:
            sections = [*sections, []] if i in controls.values() else [*sections[:-1], [*sections[-1], i]]
        rendered = [tokenizer.decode(section, clean_up_tokenization_spaces=False) for section in sections]
        assert sections == [tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True) for part in rendered]
        assert sum(part.count(text) for part in rendered) == 1


@pytest.mark.parametrize("text", ["a ball \ud83d", "\udc00", "a \ude00\ud83d b"])
def test_half_characters_are_refused_with_their_place(model, tiny_model, text):
    at = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    message = rf"the text holds a lone surrogate \('\\u\w+'\) at character {at} of {len(text)}: half of a character .*mend the text"
    fine, broken = Document((Text("a"),)), Document((Text("a"), Text(text)))
    for one in (model, tiny_model):
        with pytest.raises(ValueError, match=message):
            one.encode_prompt(broken)
        with pytest.raises(ValueError, match=message):
            one.encode_example(fine, broken)
        with pytest.raises(ValueError, match=message):
            one.encode_example(broken, fine)
    with pytest.raises(ValueError, match=message):
        valid_text(text)
    assert valid_text("a 😀 b\x00") == "a 😀 b\x00"


def test_storyboards_words_spell_no_control_token(tiny_model):
    unknown = tiny_model.tokenizer.token_to_id("<unk>")
    special = {i for token, i in tiny_model.tokenizer.get_vocab().items() if token.startswith("<")} - {unknown}
    source, tokens = random.Random(5), [token for token in tiny_model.tokenizer.get_vocab() if token.startswith("<")]
    for _ in range(1000):
        document = random_document(tiny_model, source, [*tokens, *map(str.upper, tokens), *map(wide, tokens), "the ball"])
        for answer in (False, True):
            ids = text_ids(tiny_model.encode_segments(document, answer=answer))
            own = text_ids(
                tiny_model.encode_segments(Document(tuple(Text("") if isinstance(s, Text) else s for s in document)), answer=answer)
            )
            assert [i for i in ids if i in special] == own


# --- tokenizers of other kinds -----------------------------------------------------------------------------------------


class Words(TokenizerModel):
    """A family of which nothing but its tokenizer is there."""

    __abstractmethods__: frozenset[str] = frozenset()
    family = "words"


Words.__abstractmethods__ = frozenset()  # ABCMeta has filled it


def special(content: str, **flags: bool) -> AddedToken:
    return AddedToken(content, special=flags.pop("special", True), normalized=flags.pop("normalized", False), **flags)


def bpe(*merged: str, normalizer: Any = None, metaspace: bool = False, **options: Any) -> Tokenizer:
    """Single characters, and `merged` put together from the left."""
    alphabet = [chr(c) for c in range(33, 127)] + list("▁Ġü＜＞｜😀\n ")
    parts = [word[:n] for word in merged for n in range(2, len(word) + 1)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["<unk>", *alphabet, *parts]))}
    merges = list(dict.fromkeys((word[: n - 1], word[n - 1]) for word in merged for n in range(2, len(word) + 1)))
    backend = Tokenizer(bodies.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", **options))
    backend.normalizer = normalizer
    if metaspace:
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme="first", split=False), decoders.Metaspace()
    return backend


def unigram() -> Tokenizer:
    """As of sentencepiece: control tokens are pieces of the vocabulary, and good ones."""
    words = [("<unk>", 0.0), ("<s>", -0.1), ("</s>", -0.1), ("▁the", -1.0), ("▁", -3.0)]
    return Tokenizer(bodies.Unigram([*words, *((chr(c), -5.0) for c in range(33, 127)), ("ü", -5.0)], unk_id=0, byte_fallback=False))


def word_pieces() -> Tokenizer:
    letters = [chr(c) for c in range(33, 127)]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *letters, *(f"##{c}" for c in letters), "the"]))}
    backend = Tokenizer(bodies.WordPiece(vocabulary, unk_token="<unk>"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return backend


KINDS: dict[str, tuple[Tokenizer, list[AddedToken]]] = {
    "plain": (bpe("the"), [special("<s>"), special("</s>"), special("<tool>", special=False)]),
    "put together by merges": (bpe("<s>", "</s>", "<tool>"), [special("<s>"), special("</s>")]),
    "whole words looked up": (bpe("<s>", "</s>", ignore_merges=True, metaspace=True), [special("<s>"), special("</s>")]),
    "normalised before": (
        bpe("<s>", normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])), [special("<s>"), special("</s>")],
    ),
    "normalised tokens": (
        bpe(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])),
        [special("<s>", normalized=True), special("</s>", normalized=True), special("[CALL]", special=False, normalized=True)],
    ),
    "tokens that take in spaces": (bpe("the"), [special("<s>", lstrip=True, rstrip=True), special("</s>", lstrip=True, rstrip=True)]),
    "overlapping itself": (bpe("the"), [special("<s>"), special("</s>"), special("><s>"), special("abab")]),
    "metaspace": (bpe("▁the", "<s>", metaspace=True), [special("<s>"), special("</s>")]),
    "unigram": (unigram(), [special("<s>"), special("</s>")]),
    "word pieces": (word_pieces(), [special("<s>"), special("</s>"), special("[SEP]")]),
}  # fmt: skip


def words_of(kind: str) -> Words:
    backend, added = KINDS[kind]
    backend = Tokenizer.from_str(backend.to_str())
    backend.add_tokens([*added, special("ü", special=False, normalized=True)])
    found = Words()
    found.set_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), Path(kind))
    return found


@pytest.fixture(params=KINDS)
def words(request) -> Words:
    return words_of(request.param)


def test_tokenizers_of_every_kind_read_what_spells_a_token_as_text(words):
    """Between a begin and an end token, which are the template's."""
    tokenizer, begin, end = words.tokenizer, words.bos_id, words.eos_id
    controls = {i for token, i in tokenizer.get_added_vocab().items() if token not in ("ü", "<unk>")}
    frames = [("<s>", "</s>"), ("a <s> ", "\n</s>!"), ("<s>the<", ">the</s>")]
    frames += [("＜S＞", "</S>")] if tokenizer.encode("＜S＞</S>", add_special_tokens=False) == [begin, end] else []
    source, spelled = random.Random(1), 0
    tokens = [
        *(t for t in tokenizer.get_added_vocab() if t != "ü"),
        "<S>",
        "＜s＞",
        "＜/S＞",
        "[call]",
        "<",
        "s>",
        "/s>",
        "the",
        " ",
        "ü",
        "ab",
    ]
    for _ in range(300):
        text = "".join(source.choices(tokens, k=source.randint(0, 5)))
        hide, show = stand_ins([text])
        for before, after in frames:
            found = words.rendered_ids(before + text.translate(hide) + after, show)
            assert [i for i in found if i in controls] == [begin, end]
            old = tokenizer.encode(before + text + after, add_special_tokens=False)
            if [i for i in old if i in controls] == [begin, end] and tokenizer.unk_token_id not in old:
                assert found == old
            else:
                spelled += 1
    assert spelled > 100
    assert words.controls.keys() >= controls
    assert tokenizer.convert_tokens_to_ids("ü") not in words.controls  # no control token: a letter with a token of its own


def test_a_token_that_begins_in_the_text_and_ends_in_the_template():
    """ "ab" of the user's and "abab" of the template's: read as one string, the first four letters are the token."""
    words = words_of("overlapping itself")
    hide, show = stand_ins(["ab"])
    expected = words.tokenizer.convert_tokens_to_ids(["<s>", "a", "b", "abab"])
    assert words.rendered_ids("<s>" + "ab".translate(hide) + "abab", show) == expected
    assert words.tokenizer.encode("<s>ababab", add_special_tokens=False) != expected


def test_the_name_that_a_token_is_given_cannot_be_guessed(words):
    first, second = (chr(next(iter(NO_CHARACTERS)) + n) for n in range(2))
    guesses = "".join(new_name(words.eos_id, mark) for mark in (first, second, first + second))
    for text in (guesses, "</s>" + guesses):
        hide, show = stand_ins([text])
        assert words.eos_id not in words.rendered_ids("<s>" + text.translate(hide), show)


def test_what_cannot_be_read_as_text_is_refused_by_name(words, monkeypatch):
    monkeypatch.setattr(type(words.tokenizer), "is_fast", False)  # tokenizers of Python have no such file to be changed
    hide, show = stand_ins(["a ball </s>"])
    assert words.rendered_ids("<s>" + "a ball".translate(hide), show) == words.tokenizer.encode("<s>a ball", add_special_tokens=False)
    with pytest.raises(
        ValueError, match=r"the text spells the control token '</s>' \('<s>a ball </s>'\), which the tokenizer in .* cannot"
    ):
        words.rendered_ids("<s>" + "a ball </s>".translate(hide), show)


# --- templates -----------------------------------------------------------------------------------------------------------


def changed(folders: dict[str, Path], folder: Path, template: Any = None, name: str = "janus") -> Path:
    """A copy of a toy whose template is in tokenizer_config.json, if anywhere."""
    shutil.copytree(folders[name], folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template is not None:
        edit_json(folder / "tokenizer_config.json", lambda settings: settings.update(chat_template=template))
    return folder


def test_of_several_templates_the_default_is_used(folders, models, tmp_path):
    template, document = models["janus"].template, Document((Text("the red ball"),))
    expected = models["janus"].encode_prompt(document).text_ids
    several = [{"name": "rag", "template": "{{ 1 / 0 }}"}, {"name": "default", "template": template}]
    loaded = load_model(changed(folders, tmp_path / "named", several))
    assert torch.equal(loaded.encode_prompt(document).text_ids, expected)
    folder = changed(folders, tmp_path / "files")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 / 0 }}")
    (folder / "chat_template.jinja").write_text(template)
    loaded = load_model(folder)
    assert torch.equal(loaded.encode_prompt(document).text_ids, expected)
    loaded.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ 1 / 0 }}"
    assert torch.equal(load_model(tmp_path / "saved").encode_prompt(document).text_ids, expected)
    folder = changed(folders, tmp_path / "legacy")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": several}))
    assert torch.equal(load_model(folder).encode_prompt(document).text_ids, expected)


def test_vila_u_has_a_template_of_its_own_and_keeps_the_others(folders, models, tmp_path):
    shutil.copytree(folders["vila_u"], tmp_path / "vila_u")
    (tmp_path / "vila_u" / "llm" / "additional_chat_templates").mkdir()
    (tmp_path / "vila_u" / "llm" / "additional_chat_templates" / "rag.jinja").write_text("{{ 1 / 0 }}")
    loaded = load_model(tmp_path / "vila_u")
    document = Document((Text("the red ball"),))
    assert torch.equal(loaded.encode_prompt(document).text_ids, models["vila_u"].encode_prompt(document).text_ids)
    loaded.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "llm" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ 1 / 0 }}"


def test_several_templates_without_a_default_are_refused_by_name(folders, tmp_path):
    message = r"hold the chat templates rag, tool_use, and none is 'default'; give the one to be used that name"
    several = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "rag", "template": "{{ 2 }}"}]
    with pytest.raises(ValueError, match=message):
        load_model(changed(folders, tmp_path / "named", several))
    folder = changed(folders, tmp_path / "files")
    (folder / "additional_chat_templates").mkdir()
    for entry in several:
        (folder / "additional_chat_templates" / f"{entry['name']}.jinja").write_text(entry["template"])
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.jinja", b"{% for m in messages %}", r"chat_template\.jinja fails .*TemplateSyntaxError"),
        ("chat_template.jinja", b"{{ messages[0]['content'] + 1 }}", r"chat_template\.jinja fails .*TypeError"),
        ("chat_template.jinja", b"{{ nothing.at.all }}", r"chat_template\.jinja fails .*UndefinedError"),
        ("chat_template.jinja", b"{{ messages[0]['content'] }}", r"chat_template\.jinja does not write the text of a message of blocks"),
        ("chat_template.jinja", b"\xff{{ 1 }}", r"chat_template\.jinja is not UTF-8 \(byte 1"),
        ("additional_chat_templates/rag.jinja", b"a\xff", r"rag\.jinja is not UTF-8 \(byte 2"),
        ("chat_template.json", b"{", r"chat_template\.json cannot be read \(JSONDecodeError"),
        ("chat_template.json", b"[]", r"chat_template\.json cannot be read \(AttributeError"),
        ("chat_template.json", b"{}", r"chat_template\.json has no 'chat_template'"),
        ("chat_template.json", b'{"chat_template": "{% if %}"}', r"chat_template\.json fails"),
        ("chat_template.json", b'{"chat_template": 3}', r"chat_template\.json fails"),
        ("chat_template.json", b'{"chat_template": [{"name": "default"}]}', r"chat_template\.json cannot be read \(KeyError: 'template'"),
        ("chat_template.json", b'{"chat_template": ["default"]}', r"chat_template\.json cannot be read \(TypeError"),
        ("chat_template.json", b"\xff{}", r"chat_template\.json is not UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', r"tokenizer_config\.json cannot be read \(KeyError"),
        ("tokenizer_config.json", b"{", r"tokenizer_config\.json cannot be read \(JSONDecodeError"),
    ],
)
def test_broken_templates_are_refused_when_loaded(folders, tmp_path, name, content, message):
    folder = changed(folders, tmp_path / "janus")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_templates_that_do_more_than_trimming(folders, tmp_path):
    """They see the text itself; where that would make a control token of it, it is refused."""
    folder = changed(folders, tmp_path / "janus")
    (folder / "chat_template.jinja").write_text("<|User|>: {{ messages[0]['content'][0]['text'].split('!')[-1] }}<|Assistant|>:")
    model = load_model(folder)
    assert model.decode_text(text_ids(model.encode_prompt(Document((Text("no! red ball"),))))) == ":  red ball:"
    with pytest.raises(
        ValueError, match=r"the text spells a control token in the chat template of .*which does more with it than trimming"
    ):
        model.encode_prompt(Document((Text("no! a <|User|> b"),)))
    model.template = "{{ raise_exception('no words here') }}"
    with pytest.raises(ValueError, match=r"the chat template of .* fails for this prompt: no words here"):
        model.encode_prompt(Document((Text("a"),)))
