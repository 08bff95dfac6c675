"""The test checkpoints are what they claim: official in form, accepted by the stock pipeline, alive in every input.

If these fail, no parity test means anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra `reference` is not installed")
pytest.importorskip("diffusers", reason="the extra `reference` is not installed")

import torch
from diffusers import AutoencoderKL, GlmImagePipeline, GlmImageTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, T5Config, T5EncoderModel

from .oracle import (
    draft_grids,
    full_config,
    load_reference,
    reference_ar_logits,
    reference_dit,
    reference_glyph_states,
    reference_greedy_draft,
    reference_inputs,
    reference_pictures,
    reference_pixels,
    reference_positions,
    reference_vae_decode,
    reference_vae_encode,
    reference_vq_codes,
    upsample_codes,
)
from .tiny import OFFICIAL_FILES, VARIANTS, Variant, image_token, source_picture, text_tokenizer, write_official

Folders = Callable[..., Path]
Pipelines = Callable[..., Any]

PROMPT = "a red house with a sign “你好” and 'open'"
variants = pytest.mark.parametrize("variant", sorted(VARIANTS))


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def first_latents(variant: str, height: int, width: int, seed: int = 0) -> torch.Tensor:
    channels = VARIANTS[variant].vae["latent_channels"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((1, channels, height // 8, width // 8), generator=generator)


def draw_prior(variant: str, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Upsampled prior ids as a draft would give them, [1, N]."""
    generator = torch.Generator().manual_seed(seed)
    return upsample_codes(
        torch.randint(VARIANTS[variant].codebook_size, (height // 32, width // 32), generator=generator)
    )


@variants
def test_the_files_are_the_official_ones(official: Folders, variant: str) -> None:
    assert sorted(file_bytes(official(variant))) == sorted(OFFICIAL_FILES)
    assert len(OFFICIAL_FILES) == 27


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(official: Folders, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    again = write_official(tmp_path / "again", "narrow")
    assert torch.equal(torch.random.get_rng_state(), state)
    first = file_bytes(official("narrow"))
    assert file_bytes(again) == first
    other = file_bytes(write_official(tmp_path / "other", "narrow", seed=1))
    changed = {name for name in first if other[name] != first[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}


def test_options_change_the_form_and_the_stock_pipeline_still_loads_it(official: Folders) -> None:
    folder = official("narrow", sharded=False, nested_processor=True, dtype=torch.bfloat16)
    names = set(file_bytes(folder))
    assert {"transformer/diffusion_pytorch_model.safetensors", "vision_language_encoder/model.safetensors"} <= names
    assert "processor/processor_config.json" in names
    assert "processor/preprocessor_config.json" not in names
    pipe = load_reference(folder)
    assert pipe.processor.image_processor.size["shortest_edge"] == 64 * 64
    # float32 weights rounded to bf16 are the same model to rounding, so the option changed the dtype and nothing else.
    expected = load_reference(official("narrow")).transformer.state_dict()
    found = pipe.transformer.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].bfloat16().float()) for name in found)


@variants
def test_configs_hold_the_official_keys(official: Folders, variant: str) -> None:
    """So that defaults are exercised: a key our reader wants, but the official file lacks, shows here."""
    folder = official(variant)

    def read(name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        return value

    found, wanted = read("vision_language_encoder/config.json"), full_config("vision_language_encoder")
    sizes: dict[str, Any] = {"text_config": VARIANTS[variant].text, "vision_config": VARIANTS[variant].vision}
    for section in ("text_config", "vision_config", "vq_config"):
        assert set(found[section]) == set(wanted[section]) | set(sizes.get(section, {})), section
    assert set(full_config("transformer")) == set(read("transformer/config.json")) - {"_diffusers_version"}
    assert set(full_config("preprocessor")) == set(read("processor/preprocessor_config.json"))
    for part, name in (
        ("vae", "vae/config.json"),
        ("scheduler", "scheduler/scheduler_config.json"),
        ("text_encoder", "text_encoder/config.json"),
        ("generation", "vision_language_encoder/generation_config.json"),
    ):
        assert set(full_config(part)) <= set(read(name)), part
    assert full_config("scheduler").items() <= read("scheduler/scheduler_config.json").items()


def test_full_configs_make_models_of_the_published_size() -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    decoder_config = full_config("vision_language_encoder")
    parts = ("text_config", "vision_config", "vq_config")
    with torch.device("meta"):
        model = GlmImageForConditionalGeneration(GlmImageConfig(**{part: decoder_config[part] for part in parts}))
        transformer = GlmImageTransformer2DModel.from_config(full_config("transformer"))
        vae = AutoencoderKL.from_config(full_config("vae"))
        glyph = T5EncoderModel(T5Config(**full_config("text_encoder")))
    assert count(model.model.language_model.layers) == 8_158_760_960
    assert count(model.model.language_model.embed_tokens) == 688_390_144
    assert count(model.lm_head) == 67_633_152
    assert count(model.model.visual) == 1_159_607_808
    assert count(model.model.vqmodel) == 39_849_472
    assert count(transformer.transformer_blocks) == 6_797_352_960
    assert count(transformer.prior_token_embedding) == 67_108_864
    assert (count(vae.encoder), count(vae.decoder)) == (172_443_808, 233_656_835)
    assert count(glyph) == 217_657_472


@variants
@pytest.mark.parametrize("sources", [0, 1, 2])
def test_the_stock_pipeline_loads_and_draws(official: Folders, variant: str, sources: int) -> None:
    pipe = GlmImagePipeline.from_pretrained(official(variant))
    pipe.set_progress_bar_config(disable=True)
    images = [source_picture(64 + 32 * i, 96, seed=i) for i in range(sources)]
    with torch.random.fork_rng(devices=[]):
        latents = pipe(
            PROMPT,
            image=images or None,
            height=64,
            width=96,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    assert latents.shape == (1, VARIANTS[variant].vae["latent_channels"], 8, 12)
    assert torch.isfinite(latents).all()
    assert latents.std() > 0.1


@variants
def test_chinese_and_non_square(reference: Pipelines, variant: str) -> None:
    pipe = reference(variant)
    prior = draw_prior(variant, 128, 32)

    def draw(prompt: str) -> torch.Tensor:
        run = reference_pictures(
            pipe,
            prompt,
            height=128,
            width=32,
            steps=2,
            guidance=1.5,
            latents=first_latents(variant, 128, 32),
            prior_token_ids=prior,
        )
        assert run.pictures.shape == (1, 3, 128, 32)
        assert 0 <= run.pictures.min() < run.pictures.max() <= 1
        clipped = (run.pictures == 0) | (run.pictures == 1)
        assert clipped.float().mean() < 0.2, "what is clipped hides differences"
        return run.latents

    assert (draw("一张海报，写着“你好”") - draw("一张海报，写着“再见”")).abs().max() > 1e-2


@variants
def test_prompt_forms(reference: Pipelines, variant: str) -> None:
    """The official forms, spelled out token by token."""
    pipe = reference(variant)
    start, end = (image_token(VARIANTS[variant].codebook_size + i) for i in range(2))
    decode = pipe.processor.tokenizer.decode

    inputs = reference_inputs(pipe.processor, "a cat, 你好", 128, 64)
    assert decode(inputs["input_ids"][0]) == f"a cat, 你好<sop>4 2<eop><sop>22 11<eop>{start}"
    assert draft_grids(inputs) == [(22, 11), (4, 2)]

    images = [source_picture(64, 96), source_picture(96, 64)]
    inputs = reference_inputs(pipe.processor, "a cat, 你好", 128, 64, images)
    picture = start + "<|image|>" * 6 + end
    assert decode(inputs["input_ids"][0]) == f"{picture}{picture}a cat, 你好<sop>4 2<eop>{start}"
    assert draft_grids(inputs) == [(4, 2)]


def test_positions_of_a_short_edit(reference: Pipelines) -> None:
    """The positions rule of the model card, worked out by hand for one 3 x 2 source and a 2 x 1 target."""
    pipe = reference("base")
    images = [source_picture(64, 96)]
    positions = reference_positions(pipe, "a", 64, 32, images)
    text = (
        reference_inputs(pipe.processor, "a", 64, 32, images)["input_ids"].shape[1] - 8
    )  # the source is 1 + 6 + 1 tokens
    source = [[0, 0, 0]] + [[1, 1 + row, 1 + column] for row in range(3) for column in range(2)] + [[4, 4, 4]]
    words = [[5 + i] * 3 for i in range(text)]
    p = 5 + text
    target = [[p, p, p], [p, p + 1, p], [p + 2, p + 2, p + 2]]
    assert positions.T.tolist() == source + words + target


@variants
def test_greedy_draft_and_teacher_forced_logits_agree(reference: Pipelines, variant: str) -> None:
    pipe, sizes = reference(variant), VARIANTS[variant]
    for images in (None, [source_picture(64, 96)]):
        drafted = reference_greedy_draft(pipe, PROMPT, 64, 96, images)
        logits = reference_ar_logits(pipe, PROMPT, 64, 96, drafted, images)
        assert logits.shape[1] == sizes.vision_vocab_size
        codes = logits[-drafted.numel() - 1 : -1, : sizes.codebook_size]
        assert torch.equal(codes.argmax(dim=-1), drafted)
        best = codes.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 2e-4, "a tie would make greedy parity a matter of rounding"
        assert drafted.unique().numel() > drafted.numel() ** 0.5 / 2, "a draft of one code proves little"


def test_tempting_markers_lead_an_unguarded_decoder_astray(reference: Pipelines) -> None:
    tempting, plain, first_marker = reference(tempting_markers=True), reference(), VARIANTS["base"].codebook_size
    drafted = reference_greedy_draft(tempting, PROMPT, 64, 64)
    assert torch.equal(drafted, reference_greedy_draft(plain, PROMPT, 64, 64))
    assert reference_ar_logits(tempting, PROMPT, 64, 64, drafted).argmax(dim=-1).min() >= first_marker
    assert reference_ar_logits(plain, PROMPT, 64, 64, drafted).argmax(dim=-1).max() < first_marker


@variants
def test_every_input_of_the_dit_matters(reference: Pipelines, variant: str) -> None:
    pipe = reference(variant)
    sources = [source_picture(64, 64), source_picture(96, 64, seed=1)]
    conditions = [
        (reference_vae_encode(pipe, reference_pixels(pipe, source)), upsample_codes(codes))
        for source, codes in zip(sources, reference_vq_codes(pipe, sources), strict=True)
    ]
    given_inputs: dict[str, Any] = {
        "latents": first_latents(variant, 64, 96),
        "glyph_states": reference_glyph_states(pipe, PROMPT),
        "prior_token_ids": draw_prior(variant, 64, 96),
        "timestep": 499.0,
    }
    output = reference_dit(pipe, **given_inputs)
    assert output.shape == (1, VARIANTS[variant].vae["latent_channels"], 8, 12)
    changes: list[dict[str, Any]] = [
        {"latents": first_latents(variant, 64, 96, seed=1)},
        {"glyph_states": reference_glyph_states(pipe, "a house")},
        {"prior_token_ids": draw_prior(variant, 64, 96, seed=1)},
        {"timestep": 500.0},
        {"target_size": (96, 64)},
        {"drop_prior": True},
        {"conditions": conditions[:1]},
        {"conditions": conditions},
        {"conditions": conditions[::-1]},
    ]
    outputs = [reference_dit(pipe, **{**given_inputs, **change}) for change in changes]
    for change, changed in zip(changes, outputs, strict=True):
        assert (changed - output).abs().max() > 0.02, change.keys()
    # Attention does not care in which order the sources stand in the cache; that they are two it must notice.
    torch.testing.assert_close(outputs[-1], outputs[-2], rtol=0, atol=1e-5)
    assert (outputs[-2] - outputs[-3]).abs().max() > 0.02


def test_one_step_of_the_pipeline_is_one_prediction(reference: Pipelines) -> None:
    """One step goes from sigma 1 to 0 and tells the network 999: latents minus the prediction."""
    pipe, latents, prior = reference(), first_latents("base", 64, 96), draw_prior("base", 64, 96)
    images = [source_picture(64, 64), source_picture(96, 64, seed=1)]
    conditions = [
        (reference_vae_encode(pipe, reference_pixels(pipe, image)), upsample_codes(codes))
        for image, codes in zip(images, reference_vq_codes(pipe, images), strict=True)
    ]
    cond = reference_dit(pipe, latents, reference_glyph_states(pipe, PROMPT), prior, 999.0, conditions=conditions)
    uncond = reference_dit(pipe, latents, reference_glyph_states(pipe, ""), prior, 999.0, drop_prior=True)
    run = reference_pictures(
        pipe,
        PROMPT,
        height=64,
        width=96,
        steps=1,
        guidance=1.5,
        latents=latents,
        prior_token_ids=prior,
        images=images,
    )
    torch.testing.assert_close(run.latents, latents - (uncond + 1.5 * (cond - uncond)), rtol=0, atol=1e-5)
    drawn = reference_vae_decode(pipe, run.latents)
    torch.testing.assert_close(run.pictures, (drawn / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sources", [0, 2])
def test_matched_randomness_gives_the_stock_picture(reference: Pipelines, sources: int) -> None:
    """Handing tokens and latents in from outside draws what the stock pipeline draws when it makes them itself."""
    pipe, latents = reference(), first_latents("base", 64, 96)
    images = [source_picture(64, 96 + 32 * i, seed=i) for i in range(sources)]
    with torch.random.fork_rng(devices=[]):
        sampled = pipe.generate_prior_tokens(
            PROMPT, 64, 96, [images] if images else None, generator=torch.Generator().manual_seed(3)
        )[0]
        expected = pipe(
            PROMPT,
            image=images or None,
            height=64,
            width=96,
            num_inference_steps=3,
            latents=latents.clone(),
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
    run = reference_pictures(
        pipe,
        PROMPT,
        height=64,
        width=96,
        steps=3,
        guidance=1.5,
        latents=latents,
        prior_token_ids=sampled,
        images=images,
    )
    torch.testing.assert_close(run.pictures, expected, rtol=0, atol=1e-6)


@variants
def test_codes_are_diverse_and_clear_cut(reference: Pipelines, variant: str) -> None:
    pipe = reference(variant)
    codes = reference_vq_codes(pipe, [source_picture(256, 128), source_picture(64, 64)])
    assert [tuple(part.shape) for part in codes] == [(4, 8), (2, 2)]
    assert codes[0].unique().numel() > 6
    alone = reference_vq_codes(pipe, [source_picture(256, 128)])
    assert torch.equal(alone[0], codes[0]), "a picture's codes must not depend on its neighbours"


@pytest.fixture(scope="module")
def tokenizer(official: Folders) -> Tokenizer:
    return Tokenizer.from_file(str(official("base") / "processor" / "tokenizer.json"))


@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=40))
def test_plain_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_run_as_officially_and_words_are_merged(tokenizer: Tokenizer) -> None:
    sizes: Variant = VARIANTS["base"]
    tokenizer.encode_special_tokens = False
    assert [tokenizer.token_to_id(image_token(i)) for i in (0, 64, 65, 79)] == [0, 64, 65, 79]
    ids = tokenizer.encode("the house 你好<sop>4 2<eop><|dit_token_64|><|image|>").ids
    assert len(ids) < len("the house 你好".encode()) + 6
    assert min(ids[:4]) >= sizes.vision_vocab_size
    sop, eop, image = (tokenizer.token_to_id(name) for name in ("<sop>", "<eop>", "<|image|>"))
    assert (eop, image) == (sop + 1, sop + 10)
    assert ids.count(sop) == 1
    assert ids[-3:] == [eop, 64, image]
    assert tokenizer.to_str() == text_tokenizer(sizes).to_str()


def test_codes_are_tokens_that_are_not_special(tokenizer: Tokenizer) -> None:
    """The trap for code that only turns special tokens off in a user's text."""
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("<|dit_token_5|>").ids == [5]
    assert len(tokenizer.encode("<sop>").ids) > 1
