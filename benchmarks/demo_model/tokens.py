"""The demo model's tokenizer files, in the official form.

Byte-level BPE whose merges are learned on the prompts with everything quoted and every capital and digit left out: the
words of a template become one token each, and what is to be spelled in the picture stays letter by letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from qruntime.prompt import GLYPH_QUOTES, PromptTokenizer

from .config import CONTROL_TOKENS, Parts, Sizes, image_token

_WORDS = r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
_SPELLED = re.compile("|".join((*GLYPH_QUOTES, "[A-Z0-9]")))
_MIN_COUNT = 4  # a pair that is rarer than this in the corpus is not worth a row

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
START<|image|>END
{%- elif part.type == 'text' -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
"""


def build_tokenizer(sizes: Sizes, prompts: Iterable[str]) -> Tokenizer:
    """A tokenizer with the ids of `sizes`, its merges learned on `prompts`."""
    learned = _learn(sizes, prompts)
    pieces = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    image_tokens = [image_token(i) for i in range(sizes.text_start)]
    vocabulary = {token: i for i, token in enumerate(image_tokens)}
    vocabulary.update({piece: sizes.text_start + i for i, piece in enumerate(pieces)})
    vocabulary.update({token: sizes.control(token) for token in CONTROL_TOKENS})
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    codes, markers = image_tokens[: sizes.codes], image_tokens[sizes.codes :]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in codes])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in markers])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def _learn(sizes: Sizes, prompts: Iterable[str]) -> dict[str, Any]:
    """Vocabulary and merges of a BPE model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + sizes.merges,
        min_frequency=_MIN_COUNT,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((_SPELLED.sub("", prompt) for prompt in prompts), trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def write_processor(folder: Path, sizes: Sizes, tokenizer: Tokenizer) -> None:
    """The tokenizer's files of `processor/`."""
    folder.mkdir(parents=True, exist_ok=True)
    start, end = image_token(sizes.codes), image_token(sizes.codes + 1)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    special = {"grid_bos_token": "<sop>", "grid_eos_token": "<eop>", "image_token": "<|image|>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": start,
            "clean_up_tokenization_spaces": False,
            "do_lower_case": False,
            "eos_token": end,
            "extra_special_tokens": list(CONTROL_TOKENS),
            **special,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 65536,
            "model_specific_special_tokens": special,
            "pad_token": end,
            "padding_side": "left",
            "processor_class": "GlmImageProcessor",
            "remove_space": False,
            "tokenizer_class": "TokenizersBackend",
        },
    )
    template = CHAT_TEMPLATE.replace("START", start).replace("END", end)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_byte_tokenizer(folder: Path) -> None:
    """The three files of `tokenizer/`: ByT5 has no vocabulary, only names for its special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    sentinels = [f"<extra_id_{i}>" for i in range(125)]
    tokens = [(0, "<pad>", True), (1, "</s>", True), (2, "<unk>", True)]
    tokens += [(259 + i, token, False) for i, token in enumerate(sentinels)]
    decoder = {
        str(index): {
            "content": content,
            "lstrip": strip,
            "normalized": strip,
            "rstrip": strip,
            "single_word": False,
            "special": True,
        }
        for index, content, strip in tokens
    }
    write_json(folder / "added_tokens.json", {token: 259 + i for i, token in enumerate(sentinels)})
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": sentinels, **names})
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": decoder,
            "additional_special_tokens": sentinels,
            "clean_up_tokenization_spaces": False,
            "extra_ids": 0,
            "extra_special_tokens": {},
            "model_max_length": 1000000000000000019884624838656,
            "tokenizer_class": "ByT5Tokenizer",
            **names,
        },
    )


def open_tokenizer(folder: Path, sizes: Sizes) -> PromptTokenizer:
    """The runtime's own reader over a written `processor/` folder: training sees the ids that drawing will."""
    return PromptTokenizer.for_model(folder, Parts.of(sizes).ar)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file as the official ones are, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
