"""Code that was written for diffusers, as the official model card shows it, with the import and the path changed.

The calls below have the card's form, argument by argument; the prompts are our own. What a test then changes in them
makes them run here: the folder, "cuda", and the sizes and steps, which are those of a GPU and a trained model.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import qruntime
from qruntime.errors import InputError

THEIR_IMPORT = "from diffusers.pipelines.glm_image import GlmImagePipeline"
OUR_IMPORT = "from qruntime import GlmImagePipeline"

TEXT_TO_IMAGE = """
import torch
from diffusers.pipelines.glm_image import GlmImagePipeline

pipe = GlmImagePipeline.from_pretrained("zai-org/GLM-Image", torch_dtype=torch.bfloat16, device_map="cuda")
prompt = "a magazine page titled 'Raspberry cake', with a list that says 'Flour 150g' and 'Eggs 3'"
image = pipe(
    prompt=prompt,
    height=32 * 32,
    width=36 * 32,
    num_inference_steps=50,
    guidance_scale=1.5,
    generator=torch.Generator(device="cuda").manual_seed(42),
).images[0]

image.save("output_t2i.png")
"""

EDIT = """
import torch
from diffusers.pipelines.glm_image import GlmImagePipeline
from PIL import Image

pipe = GlmImagePipeline.from_pretrained("zai-org/GLM-Image", torch_dtype=torch.bfloat16, device_map="cuda")
image_path = "cond.jpg"
prompt = "put the house into a snowy forest"
image = Image.open(image_path).convert("RGB")
image = pipe(
    prompt=prompt,
    image=[image],
    height=33 * 32,
    width=32 * 32,
    num_inference_steps=50,
    guidance_scale=1.5,
    generator=torch.Generator(device="cuda").manual_seed(42),
).images[0]

image.save("output_i2i.png")
"""

SMALLER = {
    "height=32 * 32": "height=2 * 32",
    "width=36 * 32": "width=3 * 32",
    "height=33 * 32": "height=3 * 32",
    "width=32 * 32": "width=2 * 32",
    "num_inference_steps=50": "num_inference_steps=2",
    '"cuda"': '"cpu"',
}


def run(snippet: str, folder: Path) -> None:
    """Execute a snippet with the import and the path changed, and what cannot be had here made smaller."""
    assert snippet.count(THEIR_IMPORT) == snippet.count('"zai-org/GLM-Image"') == 1
    changed = snippet.replace(THEIR_IMPORT, OUR_IMPORT).replace('"zai-org/GLM-Image"', repr(str(folder)))
    for card, here in SMALLER.items():
        changed = changed.replace(card, here)
    exec(compile(changed, "model card", "exec"), {"__name__": "__main__"})


def prompt_of(snippet: str) -> str:
    (prompt,) = re.findall(r'^prompt = "(.*)"$', snippet, re.MULTILINE)
    return prompt


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the snippets write lands in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("folder", ["official", "quantised"])
def test_text_to_image(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(folder)()
    run(TEXT_TO_IMAGE, path)
    picture = Image.open(tmp_path / "output_t2i.png")
    assert (picture.mode, picture.size) == ("RGB", (96, 64))
    pipe = qruntime.GlmImagePipeline.from_pretrained(path, device="cpu", dtype="bfloat16")
    again = pipe(
        prompt_of(TEXT_TO_IMAGE), height=64, width=96, num_inference_steps=2, guidance_scale=1.5, seed=42
    ).images[0]
    assert picture.tobytes() == again.tobytes()  # the generator's seed, the dtype and the device all arrived


@pytest.mark.parametrize("folder", ["official", "quantised"])
def test_edit(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from .tiny import source_picture

    source_picture(90, 130).save(tmp_path / "cond.jpg")
    path = request.getfixturevalue(folder)()
    run(EDIT, path)
    picture = Image.open(tmp_path / "output_i2i.png")
    assert (picture.mode, picture.size) == ("RGB", (64, 96))
    pipe = qruntime.GlmImagePipeline.from_pretrained(path, device="cpu", dtype="bfloat16")
    sizes = {"height": 96, "width": 64, "num_inference_steps": 2}
    again = pipe(prompt_of(EDIT), "cond.jpg", **sizes, guidance_scale=1.5, seed=42).images[0]
    assert picture.tobytes() == again.tobytes()


def test_every_argument_means_what_it_means_in_diffusers(official: Callable[..., Path]) -> None:
    """Names, order and defaults of those that both have."""
    pytest.importorskip("diffusers")
    from diffusers.pipelines.glm_image import GlmImagePipeline as Theirs

    theirs = inspect.signature(Theirs.__call__).parameters
    ours = inspect.signature(qruntime.GlmImagePipeline.__call__).parameters
    shared = [name for name in ours if name in theirs and name != "self"]
    assert {"prompt", "image", "height", "width", "num_inference_steps", "guidance_scale"} <= set(shared)
    assert {"generator", "latents", "prior_token_ids", "output_type", "callback_on_step_end"} <= set(shared)
    assert shared == [name for name in theirs if name in shared]
    for name in ("guidance_scale", "num_inference_steps", "num_images_per_prompt", "output_type"):
        assert ours[name].default == theirs[name].default
    assert list(ours)[:5] == list(theirs)[:5]  # those that are given by position


def test_the_cards_device_is_the_default_of_this_machine() -> None:
    """Where there is no GPU, "cuda" is refused in a sentence, and leaving `device_map` out draws on the CPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match="cuda"):
        run(TEXT_TO_IMAGE.replace('device_map="cuda"', 'device_map="cu" "da"'), Path(sys.prefix))
