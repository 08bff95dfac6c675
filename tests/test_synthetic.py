"""Random checkpoints: whole, of the official form, the same for a seed, and drawn from alike by the stock libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qruntime.checkpoint import synthetic
from qruntime.checkpoint.reader import COMPONENTS, Checkpoint
from qruntime.checkpoint.synthetic import configs, read_specs, write_random
from qruntime.pipeline import GlmImagePipeline
from qruntime.prompt import PromptTokenizer

from .convert.trees import tree


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("synthetic") / "GLM-Image"
    write_random(made, full_size=False)
    return made


def test_it_opens_as_an_official_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.converted, checkpoint.recipe) == (False, "none")
    for component in checkpoint.components.values():
        assert {tensor.dtype for tensor in component.tensors.values()} == {"BF16"}
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 10**7


def test_the_seed_fixes_every_byte(folder: Path, tmp_path: Path) -> None:
    write_random(tmp_path / "same", full_size=False, seed=0)
    write_random(tmp_path / "other", full_size=False, seed=1)
    first, same, other = tree(folder), tree(tmp_path / "same"), tree(tmp_path / "other")
    assert same == first
    assert other.keys() == first.keys()
    assert {Path(name).parent.name for name in first if other[name] != first[name]} == set(COMPONENTS)


def test_the_global_generator_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    write_random(tmp_path / "made", full_size=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_number_is_out_of_scale(folder: Path) -> None:
    """Every matrix keeps the scale of what goes through it."""
    for file in folder.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all()
            if tensor.dim() == 1:
                assert (tensor == (0 if name.endswith("bias") else 1)).all()
            elif not name.endswith(synthetic.TABLES):
                gain = tensor.float().std() * tensor[0].numel() ** 0.5
                assert 0.8 < gain < 1.2, name


@pytest.mark.parametrize("shard_bytes", [1, 100_000, 10**9])
def test_shards_are_as_large_as_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    """A shard of one tensor may be larger; whatever the shards, the weights are the same."""
    monkeypatch.setattr(synthetic, "SHARD_BYTES", shard_bytes)
    made = tmp_path / "made"
    write_random(made, full_size=False)
    Checkpoint.open(made)
    for name in COMPONENTS:
        files = sorted((made / name).glob("*.safetensors"))
        contents = [load_file(file) for file in files]
        for content in contents:
            assert len(content) == 1 or sum(tensor.nbytes for tensor in content.values()) <= shard_bytes
        index = list((made / name).glob("*.index.json"))
        assert bool(index) == (len(files) > 1)
        if index:
            weight_map = json.loads(index[0].read_text("utf-8"))["weight_map"]
            assert weight_map == {t: f.name for f, content in zip(files, contents, strict=True) for t in content}
        merged = {tensor: values for content in contents for tensor, values in content.items()}
        wanted = {t: v for file in (folder / name).glob("*.safetensors") for t, v in load_file(file).items()}
        assert merged.keys() == wanted.keys()
        assert all(torch.equal(merged[tensor], wanted[tensor]) for tensor in wanted)


def test_what_is_announced_is_every_component(tmp_path: Path) -> None:
    announced: list[str] = []
    write_random(tmp_path / "made", full_size=False, announce=announced.append)
    assert [text.removeprefix("writing ") for text in announced] == sorted(COMPONENTS)


@pytest.mark.parametrize("full_size", [False, True])
def test_its_tokenizer_agrees_with_its_configs(tmp_path: Path, full_size: bool) -> None:
    files = configs(full_size)
    config = files["vision_language_encoder/config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps(files[f"processor/{name}"]), "utf-8")
    tokenizer = PromptTokenizer.from_folder(
        tmp_path,
        image_start_id=config["image_start_token_id"],
        image_end_id=config["image_end_token_id"],
        image_id=config["image_token_id"],
        vocab_size=config["text_config"]["vocab_size"],
    )
    text = "a cat, 一只猫 <|image|>\n"
    ids = tokenizer.encode_text(text)
    assert len(ids) == len(text.encode())  # one a byte
    codes = files["transformer/config.json"]["prior_vq_quantizer_codebook_size"]
    assert min(ids) >= codes + 2


def test_full_size_is_the_official_size() -> None:
    """17.7 billion parameters; the official files take 0.4 GB more, since their text encoder is float32."""
    sizes = {
        name: sum(torch.Size(shape).numel() for spec in specs for shape in spec.source_tensors().values())
        for name, specs in read_specs(configs(True)).items()
    }
    assert 2 * sum(sizes.values()) / 10**9 == pytest.approx(35.3, abs=0.1)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "transformer/config.json"),
        ("vae", "vae/config.json"),
        ("text_encoder", "text_encoder/config.json"),
        ("vision_language_encoder", "vision_language_encoder/config.json"),
        ("generation", "vision_language_encoder/generation_config.json"),
        ("scheduler", "scheduler/scheduler_config.json"),
        ("preprocessor", "processor/preprocessor_config.json"),
    ],
)
def test_full_size_configs_say_what_the_official_ones_say(part: str, file: str) -> None:
    from .oracle import full_config

    def contradictions(ours: dict[str, Any], theirs: dict[str, Any], where: str = "") -> list[str]:
        found = []
        for key in ours.keys() & theirs.keys():
            if isinstance(ours[key], dict):
                found += contradictions(ours[key], theirs[key], f"{where}{key}.")
            elif ours[key] != theirs[key]:
                found.append(f"{where}{key}: {ours[key]}, officially {theirs[key]}")
        return found

    ours, theirs = configs(True)[file], full_config(part)
    assert len(ours.keys() & theirs.keys()) > 3
    assert not contradictions(ours, theirs)


def test_it_draws_and_every_pixel_counts(folder: Path) -> None:
    pipe = GlmImagePipeline.from_pretrained(folder, device="cpu", dtype="float32")
    pixels = pipe("a cat", height=64, width=64, num_inference_steps=2, seed=0, output_type="pt").images[0]
    assert pixels.std() > 0.05
    assert ((pixels > 0) & (pixels < 1)).float().mean() > 0.5


def test_the_stock_pipeline_draws_the_same_from_it(folder: Path) -> None:
    """The oracle for form and meaning at once: names, shapes, configurations, tokenizers."""
    pytest.importorskip("transformers", reason="the extra `reference` is not installed")
    pytest.importorskip("diffusers", reason="the extra `reference` is not installed")
    from .oracle import load_reference, reference_pictures

    latents = torch.randn((1, 16, 8, 8), generator=torch.Generator().manual_seed(3))
    codes = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(4))
    given = {"height": 64, "width": 64, "latents": latents, "prior_token_ids": codes}
    prompt = 'a sign that says "猫"'
    wanted = reference_pictures(load_reference(folder), prompt, steps=2, guidance=1.5, **given)
    pipe = GlmImagePipeline.from_pretrained(folder, device="cpu", dtype="float32")
    found = pipe(prompt, num_inference_steps=2, guidance_scale=1.5, seed=0, output_type="latent", **given)
    torch.testing.assert_close(found.images, wanted.latents, rtol=0, atol=1e-3)
