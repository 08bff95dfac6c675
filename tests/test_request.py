"""The request's bounds, its refusals, and its sizes against the stock processor."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import GlmImageProcessor

from qruntime.errors import InputError
from qruntime.request import (
    MAX_ASPECT,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    MAX_SIDE,
    MIN_SIDE,
    SIZE_MULTIPLE,
    GenerateRequest,
)

SIDES = range(MIN_SIDE, MAX_SIDE + 1, SIZE_MULTIPLE)
ANY_SIDE = st.integers(0, 5000) | st.integers(0, 160).map(lambda tokens: tokens * SIZE_MULTIPLE)


class Stranger:
    """A value whose text is a nuisance."""

    def __repr__(self) -> str:
        return "line one\nline two " + "x" * 500


MALFORMED: list[tuple[str, dict[str, Any], str, str]] = [
    ("no text", {"prompt": None}, "NoneType", "one string"),
    ("bytes", {"prompt": b"a cat"}, "bytes", "one string"),
    ("several prompts", {"prompt": ["a", "b"]}, "list", "one string"),
    ("an endless prompt", {"prompt": "a" * (MAX_PROMPT_CHARS + 1)}, str(MAX_PROMPT_CHARS + 1), "shorten"),
    ("a surrogate", {"prompt": "a \udc80 cat"}, "U+DC80 at position 2", "UTF-8"),
    ("a NUL", {"prompt": "a\0cat"}, "U+0000 at position 1", "remove"),
    ("width off the grid", {"width": 1000}, "width 1000 is not a multiple of 32", "use 992 or 1024"),
    ("height off the grid", {"height": 1025}, "height 1025 is not a multiple of 32", "use 1024 or 1056"),
    ("just under the largest", {"height": 4095}, "4095", "use 4064 or 4096"),
    ("too small", {"width": 32}, "width 32 is outside 64 to 4096", "use 64"),
    ("zero", {"height": 0}, "height 0", "use 64"),
    ("negative", {"height": -1024}, "height -1024", "use 64"),
    ("too large", {"width": 8192}, "width 8192", "use 4096"),
    ("wide", {"width": 2080, "height": 512}, "width 2080 is more than 4 times height 512", "at most 2048"),
    ("tall", {"width": 512, "height": 4096}, "height 4096", "width of at least 1024"),
    ("a fraction of a pixel", {"width": 1024.0}, "1024.0, not a whole number", "whole number"),
    ("a size in words", {"width": "1024"}, "'1024', not a whole number", "whole number"),
    ("a true size", {"width": True}, "True, not a whole number", "whole number"),
    ("a NaN size", {"height": math.nan}, "nan, not a whole number", "whole number"),
    ("no steps", {"num_inference_steps": 0}, "num_inference_steps 0 is outside 1 to 1000", "use 1"),
    ("too many steps", {"num_inference_steps": 1001}, "1001", "use 1000"),
    ("half a step", {"num_inference_steps": 2.5}, "2.5", "whole number"),
    ("negative guidance", {"guidance_scale": -0.1}, "guidance_scale -0.1", "use 0"),
    ("NaN guidance", {"guidance_scale": math.nan}, "guidance_scale nan", "use"),
    ("infinite guidance", {"guidance_scale": math.inf}, "guidance_scale inf", "use 100"),
    ("guidance in words", {"guidance_scale": "1.5"}, "'1.5', not a number", "as a number"),
    ("guidance past float", {"guidance_scale": 10**400}, "guidance_scale", "as a number"),
    ("no pictures", {"num_images_per_prompt": 0}, "num_images_per_prompt 0", "use 1"),
    ("a thousand pictures", {"num_images_per_prompt": 1000}, "1000", "use 64"),
    ("negative seed", {"seed": -1}, "seed -1", "use 0"),
    ("seed past 63 bits", {"seed": 2**63}, str(2**63), str(MAX_SEED)),
    ("seed + i past 63 bits", {"seed": MAX_SEED, "num_images_per_prompt": 2}, str(MAX_SEED), str(MAX_SEED - 1)),
    ("a seed of 10,000 digits", {"seed": 10**10_000}, "seed", str(MAX_SEED)),
    ("negative temperature", {"temperature": -0.5}, "temperature -0.5", "use 0"),
    ("a vanishing temperature", {"temperature": 1e-30}, "temperature 1e-30", "use 0"),
    ("infinite temperature", {"temperature": math.inf}, "temperature inf", "use 100"),
    ("top_p of nothing", {"top_p": 0}, "top_p is 0", "over 0"),
    ("top_p over one", {"top_p": 1.01}, "top_p 1.01", "use 1"),
    ("NaN top_p", {"top_p": math.nan}, "top_p nan", "use"),
    ("top_k of nothing", {"top_k": 0}, "top_k 0", "use 1"),
    ("one picture, no list", {"images": "cat.png"}, "str", "list"),
    ("one Pillow picture, no list", {"images": Image.new("RGB", (8, 8))}, "Image", "list"),
    ("no picture in the list", {"images": [None]}, "None", "empty"),
    ("nine pictures", {"images": ["a.png"] * 9}, "9 source pictures", "fewer"),
    ("a nuisance", {"seed": Stranger()}, "line one line two", "whole number"),
]


@pytest.mark.parametrize(
    ("changes", "named", "advised"), [case[1:] for case in MALFORMED], ids=[case[0] for case in MALFORMED]
)
def test_malformed_requests_are_refused_in_one_line(changes: dict[str, Any], named: str, advised: str) -> None:
    with pytest.raises(InputError) as refused:
        GenerateRequest(**{"prompt": "a cat", **changes})
    error = refused.value
    assert named in error.message
    assert advised in error.tip
    assert "\n" not in str(error)
    assert len(str(error)) < 250
    assert not error.message.endswith(".")
    assert error.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"prompt": "新年快乐 “福” 👩‍🚀\n\tand 'more' <|image|>"},
        {"prompt": "a" * MAX_PROMPT_CHARS},
        {"width": 64, "height": 64},
        {"width": 4096, "height": 4096},
        {"width": 2048, "height": 512},
        {"num_inference_steps": 1},
        {"num_inference_steps": 1000},
        {"guidance_scale": 0},
        {"seed": MAX_SEED},
        {"seed": MAX_SEED - 1, "num_images_per_prompt": 2},
        {"temperature": 0},
        {"temperature": 0.01},
        {"top_p": 1},
        {"top_k": 1},
    ],
    ids=str,
)
def test_the_bounds_themselves_are_legal(changes: dict[str, Any]) -> None:
    GenerateRequest(**{"prompt": "a cat", **changes})


def test_defaults_are_those_of_the_interface() -> None:
    request = GenerateRequest("a cat", seed=1)
    assert dataclasses.asdict(request) == {
        "prompt": "a cat",
        "images": (),
        "height": 1024,
        "width": 1024,
        "num_inference_steps": 50,
        "guidance_scale": 1.5,
        "num_images_per_prompt": 1,
        "seed": 1,
        "temperature": 0.9,
        "top_p": 0.75,
        "top_k": None,
    }


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerateRequest("a cat").seed = 5  # type: ignore[misc]


def test_a_missing_seed_is_drawn_and_kept() -> None:
    drawn = {GenerateRequest("a cat").seed for _ in range(20)}
    assert len(drawn) > 1
    assert all(0 <= seed < 2**32 for seed in drawn)
    request = GenerateRequest("a cat")
    assert request.seeds == (request.seed,)


def test_seeds_count_up() -> None:
    assert GenerateRequest("a cat", seed=7, num_images_per_prompt=3).seeds == (7, 8, 9)


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    request = GenerateRequest("a", width=np.int64(512), guidance_scale=np.float32(2), seed=np.uint8(3), top_p=1)
    assert [type(v) for v in (request.width, request.guidance_scale, request.seed, request.top_p)] == [
        int,
        float,
        int,
        float,
    ]
    json.dumps(request.settings())


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1, False), (1.0001, True), (1.5, True)])
def test_guidance_is_on_where_diffusers_has_it_on(scale: float, guided: bool) -> None:
    assert GenerateRequest("a", guidance_scale=scale).guided is guided


def test_grids_equal_the_stock_processor_at_every_legal_size() -> None:
    sizes = 0
    for height in SIDES:
        for width in range(max(MIN_SIDE, -(-height // MAX_ASPECT)), min(MAX_SIDE, MAX_ASPECT * height) + 1):
            if width % SIZE_MULTIPLE:
                continue
            request = GenerateRequest("a", height=height, width=width, seed=0)
            grids = (*request.token_grid, *request.preview_grid)
            assert grids == GlmImageProcessor._get_target_shape(None, height, width)
            assert min(grids) >= 1
            sizes += 1
    assert sizes > 9000


@given(ANY_SIDE, ANY_SIDE)
def test_every_size_is_drawn_or_refused_with_legal_ones(height: int, width: int) -> None:
    if height in SIDES and width in SIDES and max(height, width) <= MAX_ASPECT * min(height, width):
        GenerateRequest("a", height=height, width=width)
        return
    with pytest.raises(InputError) as refused:
        GenerateRequest("a", height=height, width=width)
    side = width if refused.value.message.startswith("width") else height
    assert str(side) in refused.value.message
    options = [int(word) for word in refused.value.tip.split() if word.isdigit()]
    assert options
    assert all(option in SIDES for option in options)


@pytest.mark.parametrize(("side", "tokens"), [(512, 512), (1024, 1280), (2048, 4352)])
def test_draft_lengths_are_those_of_the_model(side: int, tokens: int) -> None:
    assert GenerateRequest("a", height=side, width=side).draft_tokens == tokens
    edit = GenerateRequest("a", images=("cat.png",), height=side, width=side)
    assert edit.draft_tokens == (side // 32) ** 2
    assert not edit.text_to_image


def test_settings_rebuild_the_request() -> None:
    request = GenerateRequest("a “cat”", images=["cat.png"], width=512, seed=3, temperature=0, top_p=0.5, top_k=9)
    assert GenerateRequest(**json.loads(json.dumps(request.settings()))) == request


def test_settings_of_each_picture_draw_that_picture_alone() -> None:
    request = GenerateRequest("a", seed=10, num_images_per_prompt=4)
    for i, seed in enumerate(request.seeds):
        again = GenerateRequest(**request.settings(i))
        assert again.seeds == (seed,)


def test_settings_name_files_without_their_folders() -> None:
    pictures = ["/home/me/secret/cat.png", Path("/home/me/dog.png"), Image.new("RGB", (8, 8))]
    assert GenerateRequest("a", images=pictures).settings()["images"] == ["cat.png", "dog.png", None]


def test_it_needs_no_torch_and_no_pillow() -> None:
    code = "import sys, qruntime.request; sys.exit(bool({'torch', 'PIL', 'numpy'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
