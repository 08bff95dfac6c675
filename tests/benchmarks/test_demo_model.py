"""The demo model's training code: that it trains the model the runtime runs, and that its stages learn.

A wrong axis in a training module would waste the GPU's time and show only in bad pictures. So each module is given the
stock libraries' random checkpoints and must answer as they do, in float32; only then does it matter that losses fall.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.demo_model import ar, config, dit, draw, glyph, loop, sequences, stages, store, tokens, vae, vision
from qruntime.checkpoint.reader import Checkpoint
from qruntime.media import to_vae_input
from qruntime.pipeline import GlmImagePipeline
from qruntime.prompt import PromptTokenizer, glyph_ids, glyph_texts
from qruntime.request import preview_grid

TOLERANCE = 1e-4
CPU = torch.device("cpu")
PROMPT = "a red house with a sign “你好” and 'open'"
VARIANTS = ("base", "mixed", "narrow", "wide")
EYE = ("model.visual.", "model.vqmodel.")


def difference(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    return float((found - wanted).abs().max())


def halves(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
    """The tensors of every component, those of the vision tower apart."""
    found = {
        name: {tensor: component.tensor(tensor).float() for tensor in component.tensors}
        for name, component in checkpoint.components.items()
    }
    both = found.pop("vision_language_encoder")
    return {
        **found,
        "vision": {name: value for name, value in both.items() if name.startswith(EYE)},
        "ar": {name: value for name, value in both.items() if not name.startswith(EYE)},
    }


class Trained:
    """The training modules over a checkpoint's weights."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        parts, tensors = self.checkpoint, halves(self.checkpoint)

        def filled(module: nn.Module, name: str) -> Any:
            module.load_state_dict(tensors[name])  # strict: the names are the official ones, and all of them
            return module.eval().requires_grad_(False)

        self.vae = filled(vae.Vae(parts.vae), "vae")
        self.eye = filled(vision.Eye(parts.ar), "vision")
        self.drafter = filled(ar.Drafter(parts.ar), "ar")
        self.painter = filled(dit.Painter(parts.dit), "transformer")
        self.encoder = filled(glyph.GlyphEncoder(parts.glyph), "text_encoder")
        self.tokenizer = PromptTokenizer.for_model(folder / "processor", parts.ar)


@pytest.fixture(scope="module")
def trained(official: Callable[..., Path]) -> Callable[[str], Trained]:
    return lambda variant: Trained(official(variant))


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code_draws(checkpoint: Checkpoint, *shape: int) -> Tensor:
    return torch.randint(checkpoint.dit.codebook_size, shape, generator=torch.Generator().manual_seed(1))


def padded(texts: Sequence[Sequence[int]], length: int) -> Tensor:
    """Glyph ids [1, texts, length], -1 where unused."""
    rows = [[*ids, *[-1] * (length - len(ids))] for ids in texts]
    return torch.tensor(rows)[None]


@pytest.mark.parametrize("variant", VARIANTS)
class TestParity:
    """Against the stock libraries."""

    def test_vae(self, trained: Callable[[str], Trained], reference: Callable[..., Any], variant: str) -> None:
        from ..oracle import reference_vae_decode, reference_vae_encode

        ours, pipe = trained(variant), reference(variant)
        pixels = draws(2, 3, 64, 96).clamp(-1, 1)
        latents = reference_vae_encode(pipe, pixels)
        assert difference(ours.vae.encode(pixels), latents) <= TOLERANCE
        assert difference(ours.vae.decode(latents), reference_vae_decode(pipe, latents)) <= TOLERANCE

    def test_vision_codes(self, trained: Callable[[str], Trained], reference: Callable[..., Any], variant: str) -> None:
        from benchmarks.demo_model.data import halved

        from ..oracle import reference_vq_codes
        from ..tiny import source_picture

        ours, pictures = trained(variant), [source_picture(96, 64), source_picture(64, 128, seed=1)]
        for picture, wanted in zip(pictures, reference_vq_codes(reference(variant), pictures), strict=True):
            views = stages.as_pixels(torch.from_numpy(halved(picture))[None], torch.float32)
            assert torch.equal(ours.eye.codes(views).view(wanted.shape), wanted)

    def test_glyph_states(self, trained: Callable[[str], Trained], reference: Callable[..., Any], variant: str) -> None:
        from ..oracle import reference_glyph_states

        ours = trained(variant)
        for prompt in ("none", "'HELLO7'", PROMPT):
            ids = padded(glyph_ids(glyph_texts(prompt)), 12)
            states, used = draw.glyph_states(ours.encoder, ids, torch.float32)
            wanted = reference_glyph_states(reference(variant), prompt)[0]
            assert difference(states[used], wanted) <= TOLERANCE

    @pytest.mark.parametrize("source", [False, True])
    def test_ar_logits(
        self, trained: Callable[[str], Trained], reference: Callable[..., Any], variant: str, source: bool
    ) -> None:
        from ..oracle import reference_ar_logits, reference_vq_codes
        from ..tiny import source_picture

        ours, pictures = trained(variant), [source_picture(96, 64)] if source else []
        target, preview, grids = (2, 3), preview_grid(2, 3), [(2, 3)] if source else []
        built = [ours.tokenizer.build(prompt, target, preview, grids) for prompt in (PROMPT, "red")]
        prompts = stacked(built, [target] if source else [preview, target])
        codes = code_draws(ours.checkpoint, 2, prompts.drafted)
        seen = (
            torch.cat([each.flatten() for each in reference_vq_codes(reference(variant), pictures)]) if source else None
        )
        ids, positions, heads = prompts.sequences(codes, None if seen is None else seen.expand(2, -1))
        states = ours.drafter.states(ids, positions, torch.float32)
        logits = ours.drafter.logits(states.gather(1, heads[..., None].expand(-1, -1, states.shape[-1])))
        for row, prompt in enumerate((PROMPT, "red")):
            wanted = reference_ar_logits(reference(variant), prompt, 64, 96, codes[row], pictures or None)
            assert difference(logits[row], wanted[len(built[row].ids) - 1 :]) <= TOLERANCE

    @pytest.mark.parametrize("source", [False, True])
    @pytest.mark.parametrize("drop", [False, True])
    def test_velocity(
        self, trained: Callable[[str], Trained], reference: Callable[..., Any], variant: str, source: bool, drop: bool
    ) -> None:
        from ..oracle import reference_dit

        ours = trained(variant)
        sizes = ours.checkpoint.dit
        latents, states = draws(1, sizes.in_channels, 12, 8), draws(1, 7, sizes.text_embed_dim)
        codes = code_draws(ours.checkpoint, 1, 24)
        used = torch.tensor([[False, True, True, False, True, True, False]])  # unused slots hold noise
        seen = [(draws(1, sizes.in_channels, 8, 8, seed=2), code_draws(ours.checkpoint, 1, 16))] if source else []
        condition = ours.painter.condition(*seen[0], padding=3) if source else None
        found = ours.painter(latents, states, used, codes, torch.tensor([not drop]), torch.tensor([499.0]), condition)
        wanted = reference_dit(
            reference(variant), latents, states[:, used[0]], codes, 499, drop_prior=drop, conditions=seen
        )
        assert difference(found, wanted) <= TOLERANCE


def stacked(built: Sequence[Any], grids: Sequence[tuple[int, int]]) -> sequences.Prompts:
    width = max(len(prompt.ids) for prompt in built)
    ids, positions = (
        torch.zeros(len(built), width, dtype=torch.long),
        torch.zeros(len(built), 3, width, dtype=torch.long),
    )
    for row, prompt in enumerate(built):
        ids[row, : len(prompt.ids)] = torch.tensor(prompt.ids)
        positions[row, :, : len(prompt.ids)] = torch.tensor(prompt.positions)
    lengths = torch.tensor([len(prompt.ids) for prompt in built])
    starts = torch.tensor([prompt.decode_positions[0][0] for prompt in built])
    slot = built[0].image_slots[0] if built[0].image_slots else None
    return sequences.Prompts.stacked(ids, positions, lengths, starts, slot, tuple(grids))


# Training


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Path:
    """All stages, a few steps each, on a model of toy size."""
    from benchmarks.demo_model.train import STAGES, Settings, run

    folder = tmp_path_factory.mktemp("micro")
    torch.set_num_threads(1)
    settings = Settings(folder, list(STAGES), 600.0, texts=72, edits=68, workers=1, compiled=False, micro=True)
    run(settings, lines.append)
    return folder


@pytest.fixture(scope="module")
def exported(micro: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store.export(micro, tmp_path_factory.mktemp("exported") / "demo")


@pytest.mark.parametrize("stage", ["vae", "vision", "ar", "dit"])
def test_a_stage_learns(micro: Path, stage: str) -> None:
    numbers = json.loads((micro / store.STATE).read_text())[stage]
    assert numbers["loss"] < 0.9 * numbers["first_loss"]


def test_latents_are_normalised(micro: Path) -> None:
    """Channel by channel, over posters, whatever the autoencoder chose."""
    facts = json.loads((micro / store.STATE).read_text())
    assert len(facts["latents_mean"]) == len(facts["latents_std"]) == config.MICRO.latent_channels
    assert min(facts["latents_std"]) > 0
    assert facts["latents_std"] != [1.0] * config.MICRO.latent_channels


def test_the_exported_model_is_the_trained_one(exported: Path) -> None:
    """Drawn by the training modules and by the runtime: the same codes, then the same latents."""
    ours, pipe = Trained(exported), GlmImagePipeline.from_pretrained(exported, device="cpu", dtype=torch.float32)
    side, prompt, steps, seed = config.MICRO.side, "a 'B2' and 'WORD' on red", 3, 5
    grid = config.MICRO.grid
    wanted = pipe(prompt, height=side, width=side, num_inference_steps=steps, seed=seed, output_type="latent")

    built = ours.tokenizer.build(prompt, (grid, grid), (16, 16))
    prompts = stacked([built], [(16, 16), (grid, grid)])
    drafted = draw.draft(ours.drafter, prompts, None, config.MICRO.codes, seed, torch.float32)[:, -grid * grid :]
    codes = draw.upsampled(drafted, grid)
    assert torch.equal(codes, wanted.prior_token_ids)
    ids = padded(glyph_ids(glyph_texts(prompt)), 12)
    latents = draw.denoise(ours.painter, ours.encoder, codes, ids, steps, seed, torch.float32)
    assert difference(latents, wanted.images) <= TOLERANCE


def test_the_exported_model_edits_as_the_trained_one(exported: Path) -> None:
    from benchmarks.demo_model.data import halved

    from ..tiny import source_picture

    ours, pipe = Trained(exported), GlmImagePipeline.from_pretrained(exported, device="cpu", dtype=torch.float32)
    side, prompt, steps, seed, grid = config.MICRO.side, "make it red", 2, 6, config.MICRO.grid
    picture = source_picture(side, side)
    wanted = pipe(prompt, picture, height=side, width=side, num_inference_steps=steps, seed=seed, output_type="latent")
    views = stages.as_pixels(torch.tensor(halved(picture))[None], torch.float32)
    source = ours.eye.codes(views)
    prompts = stacked([ours.tokenizer.build(prompt, (grid, grid), (16, 16), [(grid, grid)])], [(grid, grid)])
    drafted = draw.draft(ours.drafter, prompts, source, config.MICRO.codes, seed, torch.float32)
    codes = draw.upsampled(drafted, grid)
    assert torch.equal(codes, wanted.prior_token_ids)
    seen = ours.vae.encode(to_vae_input(picture)), draw.upsampled(source, grid)
    ids = draw.no_glyphs(torch.zeros(1, 1, 12, dtype=torch.long))
    latents = draw.denoise(ours.painter, ours.encoder, codes, ids, steps, seed, torch.float32, seen)
    assert difference(latents, wanted.images) <= TOLERANCE


def test_the_stock_pipeline_draws_the_same(exported: Path) -> None:
    from ..oracle import load_reference, reference_pictures
    from ..tiny import source_picture

    pipe = GlmImagePipeline.from_pretrained(exported, device="cpu", dtype=torch.float32)
    stock, side = load_reference(exported), config.MICRO.side
    for images in ([], [source_picture(side, side)]):
        latents = draws(1, config.MICRO.latent_channels, side // 8, side // 8)
        prior = code_draws(pipe.checkpoint, 1, 4 * config.MICRO.grid**2)
        given = {"height": side, "width": side, "latents": latents, "prior_token_ids": prior}
        found = pipe(PROMPT, images or None, num_inference_steps=2, output_type="pt", **given)
        wanted = reference_pictures(stock, PROMPT, steps=2, guidance=1.5, images=images, **given)
        assert difference(found.images, wanted.pictures) <= 1e-3


def test_training_files(micro: Path, lines: list[str]) -> None:
    """What a call leaves to look at: numbers, pictures, a line for every stage."""
    for name in ("vae", "vision", "texts", "edits"):
        assert (micro / f"{name}.png").stat().st_size > 0
    for stage in ("vae", "vision", "ar", "dit"):
        assert any(line.startswith(f"{stage} done") for line in lines)


def test_a_stage_without_the_one_before(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no vae"):
        store.load_state(tmp_path, "vae")


def test_full_size_fits(tmp_path: Path) -> None:
    """The real sizes, random: the official layout, within 40 MB and 15 MB a file."""
    parts, source = config.Parts.of(config.FULL), tmp_path / "trained"
    for name, module in (
        ("vae", vae.Vae(parts.vae)),
        ("vision", vision.Eye(parts.ar)),
        ("ar", ar.Drafter(parts.ar)),
        ("dit", dit.Painter(parts.dit)),
        ("glyph", glyph.GlyphEncoder(parts.glyph)),
    ):
        store.save_state(source, name, module.state_dict())
    channels = config.FULL.latent_channels
    store.write_facts(source, sizes="full", latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    tokens.write_processor(source / "processor", config.FULL, tokens.build_tokenizer(config.FULL, ["a red circle"] * 9))
    folder = store.export(source, tmp_path / "demo")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 40e6
    assert max(file.stat().st_size for file in files) <= 15e6
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1  # sharded, with an index
    Checkpoint.open(folder)
    widths = (config.FULL.ar_width, config.FULL.ar_inner, config.FULL.dit_heads * config.FULL.dit_head_dim)
    assert all(width % 64 == 0 for width in widths)
    assert config.FULL.vocabulary <= 4096


def test_words_are_spelled_and_prompts_are_short() -> None:
    """Templates become few tokens; what is quoted stays letter by letter."""
    prompts = [f"a {colour} circle on the left and the text 'WORD'" for colour in ("red", "blue", "green")] * 9
    tokenizer = tokens.build_tokenizer(config.FULL, prompts)
    assert len(tokenizer.encode(prompts[0]).ids) < 20
    spelled = tokenizer.encode("'RED7'").tokens
    assert spelled == ["'", "R", "E", "D", "7", "'"]
    assert tokenizer.decode(tokenizer.encode("a 'WORD' 你好").ids) == "a 'WORD' 你好"


# The loop


def test_the_time_box_is_kept() -> None:
    layer = nn.Linear(4, 4)
    numbers = loop.train(
        "toy",
        {"toy": layer},
        lambda share: {"loss": layer(torch.ones(2, 4)).square().mean()},
        loop.Box(1.0),
        loop.Recipe(lr=1e-2, batch=2),
        lambda line: None,
    )
    assert 0.9 < numbers["seconds"] < 2.0
    assert numbers["loss"] < 0.1 * numbers["first_loss"]


def test_the_rate_rises_and_falls() -> None:
    rates = [loop.rate(share / 100) for share in range(101)]
    top = rates.index(max(rates))
    assert rates[top] == 1.0
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.05


def test_a_loss_that_is_no_number_stops_the_stage() -> None:
    layer = nn.Linear(1, 1)

    def step(share: float) -> dict[str, Tensor]:
        return {"loss": layer(torch.ones(1, 1)).sum() * float("nan")}

    with pytest.raises(loop.Diverged, match="nan"):
        loop.train("toy", {"toy": layer}, step, loop.Box(9.0, 5), loop.Recipe(lr=1.0, batch=1), lambda line: None)
