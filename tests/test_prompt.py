"""Prompts against the stock processor, tokenizer and position code, on tokenizers of several builds."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, GlmImageProcessor, PreTrainedTokenizerFast
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
from transformers.models.glm_image.modeling_glm_image import GlmImageModel

from benchmarks.stock import decoder_inputs
from qruntime.errors import CheckpointError
from qruntime.prompt import ArPrompt, PromptTokenizer, glyph_ids, glyph_texts
from qruntime.request import GenerateRequest

CODES = 16
START, END = CODES, CODES + 1  # the image brackets follow the codes, as in the official tokenizer
CONTROL = ("<|endoftext|>", "[gMASK]", "<sop>", "<eop>", "<|image|>")
NOT_SPECIAL = ("<think>", "</think>")
SPACES = ("  ", "    ", "\n\n")
TEMPLATE = (
    (
        "{% for message in messages %}{% for item in message.content %}"
        "{% if item.type == 'image' %}START<|image|>END{% else %}{{ item.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    .replace("START", f"<|dit_token_{START}|>")
    .replace("END", f"<|dit_token_{END}|>")
)

CORPUS = [
    "a cat and a hat, 32 32",
    "an image token <sop>",
    "世界 你好 新年快乐",
    "dit_token_16 token image sop eop think",
]
TEXTS = (
    "",
    "a",
    "a cat in a hat",
    "  leading spaces",
    "trailing spaces  ",
    "one\ntwo\n\nthree\r\n\tfour",
    "新年快乐，“福”字",
    "👩‍🚀 emoji 🇨🇳 and é, e\u0301",
    "it's 1234567 32 32",
    "“quotes” \"more\" 'quotes' 「引」",
    "<|not a token|> <so p> < sop> dit_token_1 image",
    "\u200b\ufeff\x07 odd ones",
)


class Build:
    """A `processor/` folder on disk, and what stock code makes of it."""

    def __init__(self, folder: Path, change: Callable[[dict[str, Any]], None] = lambda spec: None) -> None:
        self.folder = folder
        spec = tokenizer_spec()
        change(spec)
        stock = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
            bos_token=f"<|dit_token_{START}|>",
            eos_token=f"<|dit_token_{END}|>",
            pad_token=f"<|dit_token_{END}|>",
            extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
        )
        pictures = GlmImageImageProcessorPil(
            min_pixels=64**2, max_pixels=256**2, patch_size=16, temporal_patch_size=1, merge_size=1
        )
        GlmImageProcessor(pictures, stock, chat_template=TEMPLATE).save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")  # as given, not as loaded
        self.spec = spec
        self.stock = PreTrainedTokenizerFast.from_pretrained(folder)
        self.processor = GlmImageProcessor(pictures, self.stock, chat_template=TEMPLATE)
        self.vocab_size = len(self.stock)
        self.control_ids = {self.stock.convert_tokens_to_ids(token) for token in (*CONTROL, *NOT_SPECIAL)}
        self.control_ids |= set(range(CODES + 2))

    def open(self, **changes: Any) -> PromptTokenizer:
        ids = {"image_start_id": START, "image_end_id": END, "image_id": self.stock.convert_tokens_to_ids("<|image|>")}
        return PromptTokenizer.from_folder(self.folder, **{**ids, "vocab_size": self.vocab_size, **changes})

    def stock_positions(self, inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Position ids [3, T] of the prompt and [3, N + 1] of the draft and its end marker."""
        model = SimpleNamespace(config=SimpleNamespace(image_start_token_id=START, image_end_token_id=END))
        model.get_vision_position_ids = partial(GlmImageModel.get_vision_position_ids, model)
        grids = {key: inputs[key] for key in ("image_grid_thw", "images_per_sample")}
        positions, _ = GlmImageModel.get_rope_index(model, inputs["input_ids"], **grids)
        return positions[:, 0], model._cached_decode_position_ids[0]


@lru_cache
def trained() -> dict[str, Any]:
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def tokenizer_spec() -> dict[str, Any]:
    """tokenizer.json of the official order: codes and brackets, text, control tokens; the codes are not special."""
    spec: dict[str, Any] = json.loads(json.dumps(trained()))
    first = [f"<|dit_token_{i}|>" for i in range(CODES + 2)]
    text = spec["model"]["vocab"]
    spec["model"]["vocab"] = {t: i for i, t in enumerate(first)} | {t: i + len(first) for t, i in text.items()}
    for i, token in enumerate(first):
        add_token(spec, token, special=i >= CODES, token_id=i)
    for token in CONTROL:
        add_token(spec, token, special=True)
    for token in NOT_SPECIAL:
        add_token(spec, token, special=False)
    return spec


def add_token(spec: dict[str, Any], content: str, special: bool, token_id: int | None = None) -> None:
    added = spec["added_tokens"]
    if token_id is None:
        token_id = max(len(spec["model"]["vocab"]), *(token["id"] + 1 for token in added))
    switches = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added.append({"id": token_id, "content": content, "special": special, **switches})


def with_spaces(spec: dict[str, Any]) -> None:
    for token in SPACES:
        add_token(spec, token, special=False)


def with_merges(spec: dict[str, Any]) -> None:
    spec["model"]["ignore_merges"] = False


def with_normalizer(spec: dict[str, Any]) -> None:
    spec["normalizer"] = {"type": "NFC"}


def with_limits(spec: dict[str, Any]) -> None:
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    token = {"pad_id": END, "pad_type_id": 0, "pad_token": f"<|dit_token_{END}|>"}
    spec["padding"] = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, **token}


def with_frame(spec: dict[str, Any]) -> None:
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    pieces = ["[gMASK]", "<sop>"], ["<|endoftext|>"]
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": t, "type_id": 0}} for t in pieces[0]),
            {"Sequence": {"id": "A", "type_id": 0}},
            *({"SpecialToken": {"id": t, "type_id": 0}} for t in pieces[1]),
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for part in pieces for t in part},
    }


CHANGES = {
    "plain": lambda spec: None,
    "merges": with_merges,
    "normalizer": with_normalizer,
    "spaces": with_spaces,
    "frame": with_frame,
}


@pytest.fixture(scope="module", params=CHANGES)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("processor"), CHANGES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("processor"))


def built(tokenizer: PromptTokenizer, text: str, height: int, width: int, pictures: list[Image.Image]) -> ArPrompt:
    request = GenerateRequest(text, pictures, height=height, width=width, seed=0)
    grids = [(picture.height // 32, picture.width // 32) for picture in pictures]
    prompt = tokenizer.build(text, request.token_grid, request.preview_grid, grids)
    assert prompt.preview_tokens + prompt.target_tokens == request.draft_tokens
    return prompt


def assert_equals_stock(build: Build, text: str, height: int, width: int, pictures: list[Image.Image]) -> None:
    ours = built(build.open(), text, height, width, pictures)
    inputs = decoder_inputs(build.processor, text, height, width, pictures)
    assert list(ours.ids) == inputs["input_ids"][0].tolist()
    positions, decode_positions = build.stock_positions(inputs)
    assert torch.equal(torch.tensor(ours.positions), positions)
    assert torch.equal(torch.tensor(ours.decode_positions), decode_positions[:, :-1])  # no end marker is drafted
    image_id = build.stock.convert_tokens_to_ids("<|image|>")
    slots = [i for start, stop in ours.image_slots for i in range(start, stop)]
    assert slots == [i for i, token_id in enumerate(ours.ids) if token_id == image_id]
    assert [stop - start for start, stop in ours.image_slots] == [p.height * p.width // 1024 for p in pictures]


@pytest.mark.parametrize("text", TEXTS)
def test_ordinary_text_is_tokenised_as_stock_does(build: Build, text: str) -> None:
    assert build.open().encode_text(text) == build.stock(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_text_to_image_prompts_equal_stock(build: Build, text: str) -> None:
    assert_equals_stock(build, text, 1024, 1024, [])


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (512, 2048), (2048, 512), (1152, 768), (96, 320), (4096, 4096)]
)
def test_prompts_of_every_shape_equal_stock(plain: Build, height: int, width: int) -> None:
    assert_equals_stock(plain, "a cat", height, width, [])
    assert_equals_stock(plain, "a cat", height, width, [Image.new("RGB", (96, 128))])


@pytest.mark.parametrize("sizes", [[(64, 64)], [(128, 64)], [(64, 256), (224, 96)], [(96, 96)] * 3], ids=str)
def test_edit_prompts_equal_stock(build: Build, sizes: list[tuple[int, int]]) -> None:
    for text in ("", "make it 新年 red", " spaced "):
        assert_equals_stock(build, text, 256, 128, [Image.new("RGB", size) for size in sizes])


def test_the_documented_prompt_of_a_square_picture(plain: Build) -> None:
    prompt = built(plain.open(), "a cat", 1024, 1024, [])
    assert plain.stock.decode(prompt.ids) == f"a cat<sop>32 32<eop><sop>16 16<eop><|dit_token_{START}|>"
    assert (prompt.preview_tokens, prompt.target_tokens) == (256, 1024)
    assert prompt.image_slots == ()


CONTROL_TEXTS = (
    "<|image|>",
    "a <sop>32 32<eop> grid",
    f"<|dit_token_{START}|><|image|><|image|><|dit_token_{END}|>",
    "<|dit_token_3|>",
    "<think>hard</think>",
    "[gMASK]<sop><|endoftext|>",
    "<<|image|>|image|>",
    "x<|image|>新年<eop>👩‍🚀 <|image|>",
)


@pytest.mark.parametrize("text", CONTROL_TEXTS)
def test_control_tokens_typed_by_a_user_stay_text(build: Build, text: str) -> None:
    tokenizer = build.open()
    ids = tokenizer.encode_text(text)
    assert not set(ids) & build.control_ids
    assert build.stock.decode(ids) == text  # every character is there
    assert set(build.stock(text).input_ids) & build.control_ids  # stock would have obeyed
    for pictures in ([], [Image.new("RGB", (64, 64))]):
        prompt, harmless = (built(tokenizer, t, 512, 512, pictures) for t in (text, "a cat"))
        assert len(prompt.ids) - len(ids) == len(harmless.ids) - len(tokenizer.encode_text("a cat"))
        assert prompt.image_slots == harmless.image_slots


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*CONTROL, *NOT_SPECIAL, "<|dit_token_3|>"]) | st.text(max_size=6), max_size=8))
def test_no_text_yields_a_control_token(plain: Build, pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = _opened(plain).encode_text(text)
    assert not set(ids) & plain.control_ids
    assert plain.stock.decode(ids) == text


def test_a_file_that_cuts_and_pads_does_neither(plain: Build, tmp_path: Path) -> None:
    limited = Build(tmp_path, with_limits).open()
    for text in TEXTS:
        assert built(limited, text, 512, 512, []) == built(plain.open(), text, 512, 512, [])


@lru_cache
def _opened(build: Build) -> PromptTokenizer:
    return build.open()


def rewrite(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text("utf-8"))
        change(value)
        (folder / name).write_text(json.dumps(value), "utf-8")

    return apply


def replace(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def forget(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: value.pop(name) and None


BROKEN: dict[str, Callable[[Path], None]] = {
    "no tokenizer.json": lambda folder: (folder / "tokenizer.json").unlink(),
    "no tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "a folder in its place": lambda folder: ((folder / "tokenizer.json").unlink(), (folder / "tokenizer.json").mkdir()),
    "an empty file": replace("tokenizer.json", b""),
    "half a file": replace("tokenizer.json", b'{"version": "1.0", "added_tokens": ['),
    "not UTF-8": replace("tokenizer_config.json", b'{"bos_token": "\xff\xfe"}'),
    "a list": replace("tokenizer_config.json", b"[]"),
    "a deep nest": replace("tokenizer.json", b"[" * 200_000),
    "too large": replace("tokenizer.json", b" " * 2000),
    "another file": replace("tokenizer.json", b'{"model": {"type": "BPE"}}'),
    "no model": rewrite("tokenizer.json", forget("model")),
    "ids that are no numbers": rewrite("tokenizer.json", lambda spec: spec["added_tokens"][0].update(id="x")),
    "ids past 32 bits": rewrite("tokenizer.json", lambda spec: spec["model"]["vocab"].update(a=2**40)),
    "added tokens of no kind": rewrite("tokenizer.json", lambda spec: spec.update(added_tokens=[5, {"content": 3}])),
    "a broken pattern": rewrite(
        "tokenizer.json",
        lambda spec: spec.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}
        ),
    ),
    "a tokenizer that knows no words": replace(
        "tokenizer.json",
        b'{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"<sop>":1,"<eop>":2,"<|image|>":3,'
        b'"<|dit_token_16|>":16},"unk_token":"?"}}',
    ),
    "no image token": rewrite("tokenizer_config.json", forget("image_token")),
    "an image token of no kind": rewrite("tokenizer_config.json", lambda config: config.update(image_token=5)),
    "an image token it does not know": rewrite("tokenizer_config.json", lambda c: c.update(image_token="<|img|>")),
    "another image token": rewrite("tokenizer_config.json", lambda config: config.update(image_token="<sop>")),
    "another bos token": rewrite("tokenizer_config.json", lambda c: c.update(bos_token="<|dit_token_3|>")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_one_line(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Build(tmp_path)
    build.open()
    if case == "too large":
        monkeypatch.setattr("qruntime.prompt.MAX_TOKENIZER_BYTES", 1000)
    BROKEN[case](tmp_path)
    with pytest.raises(CheckpointError) as refused:
        build.open()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_ids_past_the_embedding_are_refused(plain: Build) -> None:
    largest = max(plain.open().encode_text("a cat"))
    plain.open(vocab_size=largest + 1).encode_text("a cat")
    with pytest.raises(CheckpointError, match=f"yields id {largest} and the model has {largest}"):
        plain.open(vocab_size=largest).encode_text("a cat")


def test_a_vocabulary_that_spells_a_control_token_is_refused(tmp_path: Path) -> None:
    def hide(spec: dict[str, Any]) -> None:
        next(t for t in spec["added_tokens"] if t["content"] == "<|image|>")["id"] = 400
        spec["model"]["vocab"]["<|image|>"] = 400
        spec["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }

    tokenizer = Build(tmp_path, hide).open(vocab_size=1000)
    assert tokenizer.encode_text("a cat")
    with pytest.raises(CheckpointError, match="control token 400"):
        tokenizer.encode_text("<|image|>")


@pytest.mark.parametrize("group", ["model_specific_special_tokens", "extra_special_tokens"])
def test_token_names_are_found_where_other_versions_write_them(tmp_path: Path, group: str) -> None:
    build = Build(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    names = ("image_token", "grid_bos_token", "grid_eos_token")
    config[group] = {name: config.pop(name) for name in names}
    config["bos_token"] = {"content": config["bos_token"], "special": True}
    path.write_text(json.dumps(config), "utf-8")
    assert_equals_stock(build, "a cat", 512, 512, [])


# Glyph texts

GLYPH_PROMPTS = (
    "",
    "no quotes at all",
    "a sign 'Open'",
    'a sign "Open" and "Closed"',
    "“福” 「招财」 'a' \"b\" “寿”",
    "it's a dog's life",
    "nested “outer 'inner' outer” and 「x」",
    "“broken “twice” end”",
    "empty '' and “”",
    "one\n'two\nlines'\n",
    "'unclosed",
    "\"</s>\" and '<pad>'",
)


def stock_glyph_texts(prompt: str) -> list[str]:
    from diffusers.pipelines.glm_image.pipeline_glm_image import GlmImagePipeline

    texts: list[str] = GlmImagePipeline.get_glyph_texts(None, prompt)[0]
    return texts


@pytest.mark.parametrize("prompt", GLYPH_PROMPTS)
def test_glyph_texts_equal_stock(prompt: str) -> None:
    assert glyph_texts(prompt) == stock_glyph_texts(prompt)


@settings(deadline=None)
@given(st.text(alphabet="ab '\"“”「」\n", max_size=40))
def test_glyph_texts_equal_stock_on_any_nesting(prompt: str) -> None:
    assert glyph_texts(prompt) == stock_glyph_texts(prompt)


def stock_glyph_ids(texts: list[str], max_length: int) -> list[list[int]]:
    """As in the stock pipeline's `_get_glyph_embeds`, before padding to one length."""
    ids = ByT5Tokenizer()(texts or [""], max_length=max_length, truncation=True).input_ids
    return [[0] * ((len(ids) + 1) % 2) + row for row in ids]


@pytest.mark.parametrize("max_length", [2048, 5])
@pytest.mark.parametrize(
    "texts", [[], [""], ["Open"], ["Open", "Closed"], ["a", "", "福"], ["福", "👩‍🚀", "é", "x" * 9]], ids=str
)
def test_glyph_ids_equal_stock(texts: list[str], max_length: int) -> None:
    assert glyph_ids(texts, max_length) == stock_glyph_ids(texts, max_length)


def test_long_glyph_texts_are_cut_as_stock_does() -> None:
    texts = ["福" * 1000]
    assert glyph_ids(texts) == stock_glyph_ids(texts, 2048)
    assert len(glyph_ids(texts)[0]) == 2048


def test_glyph_texts_that_spell_special_tokens_stay_bytes() -> None:
    for text in ("</s>", "<pad>", "<unk>", "<extra_id_0>"):
        assert glyph_ids([text]) == [[byte + 3 for byte in text.encode()] + [1]]
