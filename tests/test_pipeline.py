"""The pipeline as its callers see it: what decides a picture, what comes out, what happens when something goes wrong.

That the pictures are the right ones is for the parity tests to say. Here a picture is held against another one that the
same pipeline must draw: twice from one seed, alone instead of among others, from its own noise and codes, in other
memory. Where the draft is not the subject, codes are given, which skips the slowest stage.
"""

from __future__ import annotations

import inspect
import itertools
import random
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from qruntime.errors import Cancelled, CheckpointError, InputError, MemoryBudgetError, QruntimeError
from qruntime.events import SHARES, Progress
from qruntime.media import EXIF_ORIENTATION
from qruntime.memory.blocks import Loader
from qruntime.memory.estimates import PHASES, Estimate
from qruntime.memory.planner import GB, MODES, Needs, Plan
from qruntime.pipeline import GlmImagePipeline, PipelineOutput
from qruntime.request import MAX_SEED, GenerateRequest
from qruntime.sampling import noise

Folder = Callable[..., Path]

PROMPT = 'a red house on a hill, with a sign that says "OPEN"'
SIDE = 64
CODES = 4 * (SIDE // 32) ** 2
CHANNELS, CODEBOOK = 16, 64  # of the base variant
STEPS = 3
STAGES = tuple(SHARES)


def open_pipeline(folder: Path, **options: Any) -> GlmImagePipeline:
    return GlmImagePipeline.from_pretrained(folder, **{"device": "cpu", "dtype": torch.float32, **options})


def draw(pipe: GlmImagePipeline, **changes: Any) -> PipelineOutput:
    """Latents of a small picture, unless `changes` say otherwise."""
    arguments: dict[str, Any] = {
        "prompt": PROMPT,
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "seed": 7,
        "output_type": "latent",
        **changes,
    }
    return pipe(**arguments)


def codes(count: int = 1, seed: int = 0) -> Tensor:
    """Codes for pictures of SIDE x SIDE, no two pictures alike."""
    return torch.randint(CODEBOOK, (count, CODES), generator=torch.Generator().manual_seed(seed))


def quick(pipe: GlmImagePipeline, **changes: Any) -> PipelineOutput:
    """As `draw`, from given codes."""
    return draw(pipe, **{"prior_token_ids": codes(), **changes})


def source(width: int = 64, height: int = 96, seed: int = 0) -> Image.Image:
    from .tiny import source_picture

    return source_picture(width, height, seed)


def edit(pipe: GlmImagePipeline, **changes: Any) -> PipelineOutput:
    """As `draw`, from a source picture: the draft has no preview, and takes 4 tokens instead of 260."""
    return draw(pipe, **{"image": source(), **changes})


@pytest.fixture(scope="module")
def pipe(official: Folder) -> GlmImagePipeline:
    """A pipeline that no test leaves changed."""
    return open_pipeline(official())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the blocks that are loaded while the test runs, in order."""
    names: list[str] = []
    fill = Loader.fill

    def spy(self: Loader, weights: Any, spec: Any) -> None:
        names.append(f"{self.component.name}/{spec.name}")
        fill(self, weights, spec)

    monkeypatch.setattr(Loader, "fill", spy)
    return names


def assert_refused(error: QruntimeError, *complaints: str) -> None:
    """One line, with what matters in it, and a tip."""
    for complaint in complaints:
        assert complaint in error.message
    assert str(error).isprintable()
    assert error.tip
    assert not error.message.endswith(".")


def held_bytes(pipe: GlmImagePipeline) -> int:
    return pipe._parts.held_bytes


# --- Seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "dtype", "make"),
    [
        ("official", "float32", draw),
        ("official", "bfloat16", edit),
        ("quantised", "float32", edit),
        ("quantised", "bfloat16", draw),
    ],
)
def test_one_seed_gives_one_picture(
    folder: str, dtype: str, make: Callable[..., PipelineOutput], request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(folder)()
    first, again = (make(open_pipeline(path, dtype=dtype)) for _ in range(2))
    assert torch.equal(first.prior_token_ids, again.prior_token_ids)
    assert torch.equal(first.images, again.images)
    assert first.images.dtype == torch.float32
    assert (first.seed, again.seed) == (7, 7)


def test_another_seed_gives_another_draft_and_other_noise(pipe: GlmImagePipeline) -> None:
    first, second = edit(pipe, seed=7), edit(pipe, seed=8)
    assert not torch.equal(first.prior_token_ids, second.prior_token_ids)
    assert not torch.equal(quick(pipe, seed=7).images, quick(pipe, seed=8).images)


def test_picture_i_is_what_seed_plus_i_draws_alone(pipe: GlmImagePipeline) -> None:
    for make, count in ((draw, 2), (edit, 3)):
        together = make(pipe, seed=40, num_images_per_prompt=count)
        assert together.images.shape == (count, CHANNELS, SIDE // 8, SIDE // 8)
        assert together.seed == 40
        for i in range(count):
            alone = make(pipe, seed=40 + i)
            assert torch.equal(together.prior_token_ids[i], alone.prior_token_ids[0])
            assert torch.equal(together.images[i], alone.images[0])


def test_several_prompts_are_drawn_as_if_apart(pipe: GlmImagePipeline) -> None:
    prompts = [PROMPT, "a cat in the snow"]
    together = draw(pipe, prompt=prompts, seed=5)
    apart = [draw(pipe, prompt=prompt, seed=5 + i) for i, prompt in enumerate(prompts)]
    assert torch.equal(together.images, torch.cat([each.images for each in apart]))
    assert torch.equal(together.prior_token_ids, torch.cat([each.prior_token_ids for each in apart]))
    assert not torch.equal(together.prior_token_ids[0], together.prior_token_ids[1])


def test_several_prompts_take_a_list_of_pictures_each(pipe: GlmImagePipeline) -> None:
    prompts, pictures = ["make it blue", "make it red"], [[source()], [source(96, 64, 1), source(64, 64, 2)]]
    together = draw(pipe, prompt=prompts, image=pictures, num_images_per_prompt=2, seed=5)
    for i in range(4):
        alone = draw(pipe, prompt=prompts[i // 2], image=pictures[i // 2], seed=5 + i)
        assert torch.equal(together.images[i], alone.images[0])


@pytest.mark.parametrize("images", [[[]], ["a.png", "b.png"], [["a.png"]], "a.png"])
def test_prompts_and_lists_of_pictures_must_match(pipe: GlmImagePipeline, images: Any) -> None:
    with pytest.raises(InputError) as refused:
        draw(pipe, prompt=["one", "two"], image=images)
    assert_refused(refused.value, "2 prompts")


def test_a_prompt_alone_in_a_list_is_that_prompt(pipe: GlmImagePipeline) -> None:
    wanted = quick(pipe).images
    assert torch.equal(quick(pipe, prompt=[PROMPT]).images, wanted)
    assert torch.equal(quick(pipe, prompt=(PROMPT,), image=[]).images, wanted)
    edited = quick(pipe, image=source()).images
    assert not torch.equal(edited, wanted)
    for image in ([source()], (source(),), [[source()]]):
        assert torch.equal(quick(pipe, image=image).images, edited)
        assert torch.equal(quick(pipe, prompt=[PROMPT], image=image).images, edited)


def test_global_generators_are_left_alone(pipe: GlmImagePipeline) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    draw(pipe, seed=None, output_type="pil")
    quick(pipe, image=source(), output_type="pil")
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_global_generators_decide_nothing(pipe: GlmImagePipeline) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = edit(pipe)
        torch.manual_seed(2)
        assert torch.equal(edit(pipe).images, first.images)


def test_a_generator_gives_its_initial_seed_and_nothing_else(pipe: GlmImagePipeline) -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    torch.rand(100, generator=generator)
    state = generator.get_state()
    out = edit(pipe, seed=None, generator=generator)
    assert out.seed == 7
    assert torch.equal(out.images, edit(pipe, seed=7).images)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(quick(pipe, seed=None, generator=[generator]).images, quick(pipe, seed=7).images)


def test_a_generator_of_any_seed_is_taken(pipe: GlmImagePipeline) -> None:
    out = quick(pipe, seed=None, generator=torch.Generator().manual_seed(-3))
    assert 0 <= out.seed <= MAX_SEED
    assert torch.equal(out.images, quick(pipe, seed=out.seed).images)


@pytest.mark.parametrize("generator", [7, "cpu", [], [torch.Generator(), torch.Generator()], random.Random(0)])
def test_what_is_no_generator_is_refused(pipe: GlmImagePipeline, generator: Any) -> None:
    with pytest.raises(InputError) as refused:
        draw(pipe, seed=None, generator=generator)
    assert_refused(refused.value, "generator")


def test_seed_and_generator_together_are_refused(pipe: GlmImagePipeline) -> None:
    with pytest.raises(InputError) as refused:
        draw(pipe, seed=0, generator=torch.Generator())
    assert_refused(refused.value, "seed and generator")


def test_a_seed_that_was_drawn_draws_again(pipe: GlmImagePipeline) -> None:
    first, other = quick(pipe, seed=None), quick(pipe, seed=None)
    assert first.seed != other.seed
    assert torch.equal(quick(pipe, seed=first.seed).images, first.images)


# --- Noise and codes from the caller ----------------------------------------------------------------------------------


def test_what_came_out_draws_the_same_picture_again(pipe: GlmImagePipeline) -> None:
    first = draw(pipe, num_images_per_prompt=2)
    again = draw(pipe, num_images_per_prompt=2, seed=first.seed, prior_token_ids=first.prior_token_ids)
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.prior_token_ids, first.prior_token_ids)


def test_given_codes_skip_the_draft(official: Folder, loaded: list[str]) -> None:
    pipe = open_pipeline(official())
    out = draw(pipe, prior_token_ids=codes())
    assert loaded
    assert not [name for name in loaded if name.startswith("vision_language_encoder/")]
    assert list(out.stats["stages"]) == ["encode", "denoise"]
    loaded.clear()
    edit(pipe)
    assert [name for name in loaded if name.startswith("vision_language_encoder/")]


def test_given_codes_decide_the_picture(pipe: GlmImagePipeline) -> None:
    out = quick(pipe, prior_token_ids=codes(seed=1))
    assert torch.equal(out.prior_token_ids, codes(seed=1))
    assert not torch.equal(out.images, quick(pipe, prior_token_ids=codes(seed=2)).images)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_codes_may_be_any_integers(pipe: GlmImagePipeline, dtype: torch.dtype) -> None:
    assert torch.equal(quick(pipe, prior_token_ids=codes().to(dtype)).images, quick(pipe).images)


def test_one_row_of_codes_serves_every_picture(pipe: GlmImagePipeline) -> None:
    once = quick(pipe, prompt=[PROMPT, "a cat"], num_images_per_prompt=2)
    repeated = quick(pipe, prompt=[PROMPT, "a cat"], num_images_per_prompt=2, prior_token_ids=codes().expand(4, -1))
    assert once.prior_token_ids.shape == (4, CODES)
    assert torch.equal(once.images, repeated.images)


def test_rows_of_codes_go_to_their_pictures(pipe: GlmImagePipeline) -> None:
    rows = codes(4)
    together = quick(pipe, prompt=[PROMPT, "a cat"], num_images_per_prompt=2, prior_token_ids=rows)
    for i, prompt in enumerate([PROMPT, PROMPT, "a cat", "a cat"]):
        alone = quick(pipe, prompt=prompt, seed=7 + i, prior_token_ids=rows[i : i + 1])
        assert torch.equal(together.images[i], alone.images[0])


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        (torch.zeros(CODES, dtype=torch.long), f"[{CODES}]"),
        (torch.zeros(1, CODES - 1, dtype=torch.long), f"[1, {CODES}]"),
        (torch.zeros(3, CODES, dtype=torch.long), f"[2, {CODES}]"),
        (torch.zeros(1, 1, CODES, dtype=torch.long), f"[1, 1, {CODES}]"),
        (torch.full((1, CODES), CODEBOOK), f"hold {CODEBOOK}, and codes are 0 to {CODEBOOK - 1}"),
        (torch.arange(-5, CODES - 5)[None], f"hold -5, and codes are 0 to {CODEBOOK - 1}"),
        (torch.zeros(1, CODES), "no tensor of integers"),
        ([[0] * CODES], "no tensor of integers"),
    ],
)
def test_wrong_codes_are_refused(pipe: GlmImagePipeline, loaded: list[str], ids: Any, complaint: str) -> None:
    with pytest.raises(InputError) as refused:
        draw(pipe, prior_token_ids=ids, num_images_per_prompt=2 if complaint.startswith("[2") else 1)
    assert_refused(refused.value, "prior_token_ids", complaint)
    assert not loaded


def test_given_latents_are_the_noise(pipe: GlmImagePipeline) -> None:
    shape = (CHANNELS, SIDE // 8, SIDE // 8)
    rows = torch.stack([noise(7, shape), noise(8, shape)])
    given = quick(pipe, latents=rows, num_images_per_prompt=2)
    assert torch.equal(given.images, quick(pipe, num_images_per_prompt=2).images)
    assert not torch.equal(given.images[0], given.images[1])
    assert torch.equal(quick(pipe, latents=rows[1:], seed=0).images[0], given.images[1])
    prompts = quick(pipe, prompt=[PROMPT, PROMPT], latents=rows)  # each prompt's picture has its row
    assert torch.equal(prompts.images, given.images)


@pytest.mark.parametrize(
    ("latents", "complaint"),
    [
        (torch.zeros(CHANNELS, 8, 8), f"[{CHANNELS}, 8, 8], not [1, {CHANNELS}, 8, 8]"),
        (torch.zeros(2, CHANNELS, 8, 8), f"not [1, {CHANNELS}, 8, 8]"),
        (torch.zeros(1, CHANNELS, 8, 9), "[1, 16, 8, 9]"),
        (torch.full((1, CHANNELS, 8, 8), float("nan")), "NaN"),
        ([[0.0]], "type list"),
    ],
)
def test_wrong_latents_are_refused(pipe: GlmImagePipeline, loaded: list[str], latents: Any, complaint: str) -> None:
    with pytest.raises(InputError) as refused:
        draw(pipe, latents=latents)
    assert_refused(refused.value, "latents", complaint)
    assert not loaded


# --- What comes out ---------------------------------------------------------------------------------------------------


def test_the_three_outputs_are_one_picture(pipe: GlmImagePipeline) -> None:
    size = {"height": 64, "width": 96, "prior_token_ids": codes()[:, :1].expand(2, 24), "num_images_per_prompt": 2}
    latents, pixels, pictures = (draw(pipe, **size, output_type=kind).images for kind in ("latent", "pt", "pil"))
    assert (latents.shape, latents.dtype) == ((2, CHANNELS, 8, 12), torch.float32)
    assert (pixels.shape, pixels.dtype, pixels.device.type) == ((2, 3, 64, 96), torch.float32, "cpu")
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels.std() > 0.01
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (96, 64))] * 2
    for picture, tensor in zip(pictures, pixels, strict=True):
        assert np.array_equal(np.asarray(picture), np.rint(tensor.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def test_latents_take_no_decoding(official: Folder, loaded: list[str]) -> None:
    out = quick(open_pipeline(official()))
    assert not [name for name in loaded if name.startswith("vae/")]
    assert "decode" not in out.stats["stages"]


@pytest.mark.parametrize("kind", ["np", "PIL", "", None, []])
def test_an_unknown_output_type_is_refused(pipe: GlmImagePipeline, loaded: list[str], kind: Any) -> None:
    with pytest.raises(InputError) as refused:
        draw(pipe, output_type=kind)
    assert_refused(refused.value, "output_type", repr(kind))
    assert not loaded


def test_stats_tell_of_every_stage(pipe: GlmImagePipeline) -> None:
    began = time.monotonic()
    pictures = [[source()], [source(64, 64)]]
    out = edit(pipe, prompt=[PROMPT, "a cat"], image=pictures, num_images_per_prompt=2, output_type="pt")
    wall_s = time.monotonic() - began
    stages = out.stats["stages"]
    request = GenerateRequest(prompt="", images=(source(),), height=SIDE, width=SIDE)
    assert {name: stage["units"] for name, stage in stages.items()} == {
        "encode": 2,
        "draft": 4 * request.draft_tokens,
        "denoise": 4 * STEPS,
        "decode": 4,
    }
    assert tuple(stages) == STAGES
    for stage in stages.values():
        assert stage.keys() == {"seconds", "units", "peak_bytes"}
        assert stage["seconds"] > 0
        assert stage["peak_bytes"] is None  # the CPU counts none
    assert sum(stage["seconds"] for stage in stages.values()) <= wall_s
    assert out.stats["plan"] in MODES
    assert out.stats["predicted_bytes"] == max(out.stats["predicted_phases"].values())


def test_generate_draws_what_the_call_draws(pipe: GlmImagePipeline) -> None:
    settings: dict[str, Any] = {"prompt": PROMPT, "height": SIDE, "width": 96, "num_inference_steps": 2, "seed": 3}
    settings["num_images_per_prompt"] = 2
    pictures = pipe.generate(GenerateRequest(images=(source(),), **settings)).images
    called = pipe(image=source(), **settings).images
    assert [picture.size for picture in pictures] == [(96, SIDE)] * 2
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in called]


def test_the_draft_may_be_greedy(pipe: GlmImagePipeline) -> None:
    first, other = (edit(pipe, seed=seed, temperature=0).prior_token_ids for seed in (1, 2))
    assert torch.equal(first, other)


def test_without_guidance_there_is_one_pass(pipe: GlmImagePipeline) -> None:
    """One Euler step is linear in the velocity, and guidance is linear in its scale."""
    at = {scale: quick(pipe, num_inference_steps=1, guidance_scale=scale).images for scale in (0, 0.5, 1, 1.5, 2, 4)}
    assert torch.equal(at[1], at[0.5])
    assert torch.equal(at[1], at[0])
    torch.testing.assert_close(at[2] - at[1], 2 * (at[1.5] - at[1]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(at[4] - at[1], 6 * (at[1.5] - at[1]), rtol=1e-3, atol=1e-4)
    assert (at[2] - at[1]).abs().max() > 1e-2


# --- Callbacks, progress, cancel --------------------------------------------------------------------------------------


def test_the_callback_sees_every_step(pipe: GlmImagePipeline) -> None:
    calls: list[tuple[Any, ...]] = []

    def callback(caller: Any, step: int, sigma: float, tensors: dict[str, Tensor]) -> None:
        calls.append((caller, step, sigma, tensors.keys(), tensors["latents"].clone()))

    plain = quick(pipe, num_images_per_prompt=2)
    seen = quick(pipe, num_images_per_prompt=2, callback_on_step_end=callback)
    assert torch.equal(seen.images, plain.images)
    assert [call[1] for call in calls] == list(range(STEPS))
    assert all(call[0] is pipe and call[3] == {"latents"} for call in calls)
    sigmas = [call[2] for call in calls]
    assert sigmas == sorted(sigmas, reverse=True)
    assert 0 < sigmas[-1] < sigmas[0] <= 1
    assert all(call[4].shape == plain.images.shape for call in calls)
    assert torch.equal(calls[-1][4], plain.images)


def test_the_callback_may_change_the_latents(pipe: GlmImagePipeline) -> None:
    """Put into another run after its first step, one run's latents end as that run's picture."""
    kept: dict[int, Tensor] = {}

    def keep(_: Any, step: int, __: float, tensors: dict[str, Tensor]) -> None:
        kept[step] = tensors["latents"].clone()

    first = quick(pipe, seed=1, callback_on_step_end=keep)
    second = quick(
        pipe, seed=2, callback_on_step_end=lambda _, step, __, ___: {"latents": kept[0]} if step == 0 else {}
    )
    assert torch.equal(second.images, first.images)


@pytest.mark.parametrize(("latents", "complaint"), [(torch.zeros(3), "[3]"), (None, "NoneType")])
def test_a_callback_that_returns_nonsense_is_told(pipe: GlmImagePipeline, latents: Any, complaint: str) -> None:
    with pytest.raises(InputError) as refused:
        quick(pipe, callback_on_step_end=lambda *_: {"latents": latents})
    assert_refused(refused.value, "latents", complaint)


@pytest.mark.parametrize("name", ["callback_on_step_end", "progress", "cancel"])
def test_what_cannot_be_called_is_refused(pipe: GlmImagePipeline, loaded: list[str], name: str) -> None:
    with pytest.raises(InputError) as refused:
        draw(pipe, **{name: 3})
    assert_refused(refused.value, name)
    assert not loaded


def test_progress_covers_every_stage_with_one_eta(pipe: GlmImagePipeline) -> None:
    reports: list[Progress] = []
    draw(pipe, num_images_per_prompt=2, output_type="pt", progress=reports.append)
    draft = 2 * GenerateRequest(prompt="", height=SIDE, width=SIDE).draft_tokens
    totals = {"encode": 1, "draft": draft, "denoise": 2 * STEPS, "decode": 2}
    for stage, group in itertools.groupby(reports, lambda report: report.stage):
        of_stage = list(group)
        done = [report.done for report in of_stage]
        assert {report.total for report in of_stage} == {totals[stage]}
        assert (done[0], done[-1]) == (0, totals.pop(stage))
        assert done == sorted(done)
    assert not totals
    assert tuple(dict.fromkeys(report.stage for report in reports)) == STAGES
    elapsed = [report.elapsed_s for report in reports]
    assert elapsed == sorted(elapsed)
    assert reports[0].eta_s is None
    assert all(report.eta_s is not None and report.eta_s >= 0 for report in reports[2:])
    assert reports[-1].eta_s == 0


class Mishap(Exception):
    pass


def failing(at: str) -> Callable[[Progress], None]:
    def progress(report: Progress) -> None:
        if report.stage == at and report.done:
            raise Mishap(at)

    return progress


@pytest.mark.parametrize("stage", STAGES)
def test_an_exception_from_progress_leaves_a_usable_pipeline(official: Folder, stage: str) -> None:
    pipe = open_pipeline(official())
    with pytest.raises(Mishap, match=stage):
        edit(pipe, output_type="pt", progress=failing(stage))
    assert held_bytes(pipe) == 0
    assert torch.equal(quick(pipe).images, quick(open_pipeline(official())).images)


def test_an_exception_from_the_callback_leaves_a_usable_pipeline(official: Folder) -> None:
    pipe = open_pipeline(official())

    def callback(*_: Any) -> None:
        raise Mishap

    with pytest.raises(Mishap):
        quick(pipe, callback_on_step_end=callback)
    assert held_bytes(pipe) == 0
    assert torch.equal(quick(pipe).images, quick(open_pipeline(official())).images)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", ["function", "event"])
def test_a_run_is_cancelled_within_a_stage(official: Folder, stage: str, form: str) -> None:
    pipe = open_pipeline(official())
    event = threading.Event()
    reports: list[Progress] = []

    def progress(report: Progress) -> None:
        reports.append(report)
        if report.stage == stage and report.done:
            event.set()

    with pytest.raises(Cancelled) as stopped:
        edit(
            pipe,
            num_images_per_prompt=2,
            output_type="pt",
            progress=progress,
            cancel=event if form == "event" else event.is_set,
        )
    last = reports[-1]
    assert f"in stage {stage} after {last.done} of {last.total}" in stopped.value.message  # not a unit later
    assert stopped.value.exit_code == 1
    assert held_bytes(pipe) == 0
    event.clear()
    assert torch.equal(quick(pipe, cancel=event).images, quick(open_pipeline(official())).images)


def test_a_cancelled_resident_pipeline_keeps_whole_weights(official: Folder) -> None:
    pipe, questions = open_pipeline(official(), vram=100), itertools.count()
    with pytest.raises(Cancelled):
        edit(pipe, cancel=lambda: next(questions) == 20)
    assert held_bytes(pipe) > 0
    out = edit(pipe)
    assert out.stats["plan"] == "resident"
    assert torch.equal(out.images, edit(open_pipeline(official())).images)


def test_cancel_is_asked_before_anything_is_loaded(pipe: GlmImagePipeline, loaded: list[str]) -> None:
    with pytest.raises(Cancelled):
        draw(pipe, cancel=lambda: True)
    assert not loaded


def test_cancel_is_asked_at_every_block(pipe: GlmImagePipeline) -> None:
    """A step of the full-size model may take seconds on a slow device, and a block a thirtieth of that."""
    for picture in (None, source()):
        asked = 0

        def cancel() -> bool:
            nonlocal asked
            asked += 1
            return False

        draw(pipe, image=picture, cancel=cancel)
        layers = pipe.checkpoint.ar.text.num_layers
        tokens = GenerateRequest(prompt="", images=(picture,) if picture else (), height=SIDE, width=SIDE).draft_tokens
        blocks = STEPS * pipe.checkpoint.dit.num_layers + tokens * layers
        assert asked >= blocks


# --- Source pictures --------------------------------------------------------------------------------------------------


def test_a_source_is_the_same_in_every_form(pipe: GlmImagePipeline, tmp_path: Path) -> None:
    picture = source(70, 101)  # no side is a multiple of anything
    wanted = draw(pipe, image=picture)
    path = tmp_path / "source.png"
    picture.save(path)
    for image in (path, str(path), [picture], [str(path)], picture.convert("RGBA")):
        out = draw(pipe, image=image)
        assert torch.equal(out.prior_token_ids, wanted.prior_token_ids)
        assert torch.equal(out.images, wanted.images)


def test_a_turned_source_is_seen_upright(pipe: GlmImagePipeline, tmp_path: Path) -> None:
    picture = source(64, 96)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned by a quarter clockwise
    path = tmp_path / "turned.png"
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    upright, turned = quick(pipe, image=picture).images, quick(pipe, image=path).images
    assert torch.equal(turned, upright)
    assert not torch.equal(quick(pipe, image=picture.transpose(Image.Transpose.ROTATE_90)).images, upright)


def test_transparency_is_seen_as_white(pipe: GlmImagePipeline) -> None:
    layer = source().convert("RGBA")
    layer.putalpha(Image.linear_gradient("L").resize(layer.size))
    flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    assert torch.equal(quick(pipe, image=layer).images, quick(pipe, image=flat).images)
    assert not torch.equal(quick(pipe, image=layer).images, quick(pipe, image=source()).images)


def test_every_source_counts_and_so_does_their_order(pipe: GlmImagePipeline) -> None:
    first, second = source(64, 96, 1), source(128, 64, 2)
    pictures = ([first], [second], [first, second], [second, first])
    drafted = [draw(pipe, image=each, temperature=0) for each in pictures]
    for one, other in itertools.combinations(drafted, 2):
        assert not torch.equal(one.images, other.images)
    given = [quick(pipe, image=each).images for each in pictures]
    for one, other in itertools.combinations(given[:3], 2):
        assert not torch.equal(one, other)


def test_an_edit_reads_its_sources_before_weights(pipe: GlmImagePipeline, loaded: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n")
    for image in (broken, tmp_path / "missing.png", [source(), broken], 7):
        with pytest.raises(InputError) as refused:
            draw(pipe, image=image)
        assert_refused(refused.value)
    assert not loaded


# --- Numbers that are none --------------------------------------------------------------------------------------------


def spoilt(folder: Path, into: Path, name: str, change: Callable[[Tensor], object]) -> Path:
    """A copy of a checkpoint in which one tensor was changed in place."""
    copy = shutil.copytree(folder, into)
    for file in sorted(copy.glob("*/*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            change(tensors[name])
            save_file(tensors, file, {"format": "pt"})
            return copy
    raise LookupError(name)


def one_nan(tensor: Tensor) -> None:
    tensor.view(-1)[-1] = float("nan")


@pytest.mark.parametrize(
    "name",
    [
        "encoder.block.1.layer.1.DenseReluDense.wo.weight",
        "model.language_model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
        "transformer_blocks.2.attn1.to_v.bias",
        "transformer_blocks.1.norm1.linear.weight",
        "proj_out.weight",
        "decoder.conv_in.weight",
    ],
)
def test_a_nan_in_official_weights_is_named(official: Folder, tmp_path: Path, name: str) -> None:
    pipe = open_pipeline(spoilt(official(), tmp_path / "GLM-Image", name, one_nan))
    with pytest.raises(CheckpointError) as refused:
        draw(pipe, output_type="pt", prior_token_ids=None if "model" in name or "head" in name else codes())
    assert_refused(refused.value, name, "NaN")
    assert held_bytes(pipe) == 0


@pytest.mark.parametrize("name", ["model.language_model.embed_tokens.weight", "prior_token_embedding.weight"])
def test_a_nan_in_an_embedding_is_named(official: Folder, tmp_path: Path, name: str) -> None:
    pipe = open_pipeline(spoilt(official(), tmp_path / "GLM-Image", name, lambda table: table.fill_(float("nan"))))
    with pytest.raises(CheckpointError) as refused:
        draw(pipe)
    assert_refused(refused.value, name, "NaN")


@pytest.mark.parametrize("name", ["model.visual.blocks.1.attn.qkv.weight", "model.vqmodel.quantize.embedding.weight"])
def test_a_nan_that_only_edits_read_is_named(official: Folder, tmp_path: Path, name: str) -> None:
    pipe = open_pipeline(spoilt(official(), tmp_path / "GLM-Image", name, one_nan))
    quick(pipe)
    with pytest.raises(CheckpointError) as refused:
        quick(pipe, image=source())
    assert_refused(refused.value, name, "NaN")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("proj_out.weight", "the latents hold"), ("lm_head.weight", "logits hold"), ("decoder.conv_in.weight", "picture")],
)
def test_a_result_that_is_no_number_is_an_error(official: Folder, tmp_path: Path, name: str, complaint: str) -> None:
    """Weights that are finite, but overflow."""

    def overflow(tensor: Tensor) -> None:
        tensor.mul_(1e38).clamp_(-3e38, 3e38)

    pipe = open_pipeline(spoilt(official(), tmp_path / "GLM-Image", name, overflow))
    with pytest.raises(QruntimeError) as failed:
        draw(pipe, output_type="pt", prior_token_ids=None if "head" in name else codes())
    assert_refused(failed.value, complaint, "NaN")
    assert failed.value.exit_code == 1


# --- Opening ----------------------------------------------------------------------------------------------------------


def test_the_names_that_diffusers_uses_are_taken(official: Folder) -> None:
    pipe = GlmImagePipeline.from_pretrained(str(official()), torch_dtype=torch.bfloat16, device_map="cpu")
    assert (pipe.dtype, pipe.device) == (torch.bfloat16, torch.device("cpu"))
    for device_map in ({"": "cpu"}, {"transformer": "cpu", "vae": torch.device("cpu").type}, torch.device("cpu")):
        pipe = GlmImagePipeline.from_pretrained(official(), torch_dtype="float32", device_map=device_map)
        assert (pipe.dtype, pipe.device) == (torch.float32, torch.device("cpu"))
    auto = GlmImagePipeline.from_pretrained(official()).device
    for strategy in ("auto", "balanced", "sequential", None):
        assert GlmImagePipeline.from_pretrained(official(), device_map=strategy).device == auto


@pytest.mark.parametrize("name", ["device", "device_map"])
def test_device_zero_is_no_missing_device(official: Folder, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError) as refused:
        GlmImagePipeline.from_pretrained(official(), **{name: 0 if name == "device" else {"": 0}})
    assert_refused(refused.value, "'cuda:0'")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "float32", "torch_dtype": "float32"}, "dtype and torch_dtype"),
        ({"device": "cpu", "device_map": "cpu"}, "device and device_map"),
        ({"device_map": {"vae": "cpu", "transformer": "cuda"}}, "names 2 devices"),
        ({"device_map": {}}, "names 0 devices"),
        ({"device": "tpu"}, "'tpu'"),
        ({"device": "meta"}, "'meta'"),
        ({"device": "cuda:99"}, "'cuda:99'"),
        ({"device": 99}, "'cuda:99'"),
        ({"device_map": {"": 99}}, "'cuda:99'"),
        ({"dtype": torch.float16}, "float16"),
        ({"torch_dtype": "auto"}, "auto"),
        ({"vram": 0}, "vram 0"),
        ({"vram": -3.0}, "vram -3.0"),
        ({"vram": "nan"}, "vram 'nan'"),
        ({"vram": "lots"}, "vram 'lots'"),
        ({"vram": None}, "vram None"),
        ({"vram": 1e300}, "vram 1e+300"),
    ],
)
def test_wrong_options_are_refused(official: Folder, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError) as refused:
        GlmImagePipeline.from_pretrained(official(), **options)
    assert_refused(refused.value, complaint)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        GlmImagePipeline.from_pretrained(tmp_path / "nothing here")
    assert_refused(refused.value, "nothing here")


def test_opening_loads_nothing(official: Folder, loaded: list[str]) -> None:
    pipe = open_pipeline(official())
    assert held_bytes(pipe) == 0
    assert not loaded


def test_moving_to_the_same_device_changes_nothing(official: Folder) -> None:
    pipe = open_pipeline(official(), vram=100)
    first = quick(pipe).images
    held = held_bytes(pipe)
    assert held > 0
    assert pipe.to("cpu") is pipe
    assert pipe.to(torch.device("cpu")) is pipe
    assert held_bytes(pipe) == held
    assert torch.equal(quick(pipe).images, first)
    with pytest.raises(InputError) as refused:
        pipe.to("cuda:99")
    assert_refused(refused.value, "cuda:99")
    assert torch.equal(quick(pipe).images, first)


def test_release_gives_all_weights_back(official: Folder) -> None:
    pipe = open_pipeline(official(), vram=100)
    first = edit(pipe).images
    assert held_bytes(pipe) > 0
    pipe.release()
    assert held_bytes(pipe) == 0
    assert torch.equal(edit(pipe).images, first)


def test_the_call_has_the_arguments_of_the_interface() -> None:
    defaults = {name: p.default for name, p in inspect.signature(GlmImagePipeline.__call__).parameters.items()}
    request = GenerateRequest(prompt="")
    for name in defaults.keys() & {"height", "width", "num_inference_steps", "guidance_scale", "temperature", "top_p"}:
        assert defaults[name] == getattr(request, name)
    assert list(defaults)[1:] == [
        "prompt", "image", "height", "width", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "seed",
        "generator", "latents", "prior_token_ids", "temperature", "top_p", "output_type", "callback_on_step_end",
        "progress", "cancel",
    ]  # fmt: skip


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as if weights were all: in a tiny model they are nothing beside the working memory."""
    working = Estimate.working.fget  # type: ignore[attr-defined]
    for name in ("working", "working_again"):
        monkeypatch.setattr(Estimate, name, property(lambda self: dict.fromkeys(working(self), 1)))
    monkeypatch.setattr(Estimate, "beside", {"draft": 1, "denoise": 1})


def budgets(folder: Path, images: tuple[Any, ...] = (), sides: Sequence[tuple[int, int]] = ()) -> dict[str, Plan]:
    """What each of the corners takes, most first."""
    pipe = open_pipeline(folder)
    request = GenerateRequest(prompt=PROMPT, images=images, height=SIDE, width=SIDE, num_inference_steps=STEPS)
    plans = pipe._needs(request, sides).modes()
    assert [plan.mode for plan in plans] == list(MODES)
    return {plan.mode: plan for plan in plans}


@pytest.mark.usefixtures("weights_decide")
@pytest.mark.parametrize("folder", ["official", "quantised"])
@pytest.mark.parametrize("edit", [False, True], ids=["text", "edit"])
def test_a_picture_is_the_same_at_any_budget(folder: str, edit: bool, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)("mixed")
    images = (source(64, 96, 1), source(96, 64, 2)) if edit else ()
    sides = [(96, 64), (64, 96)] if edit else []
    corners = budgets(path, images, sides)
    most, least = (corners[mode].peak_bytes for mode in ("resident", "streamed"))
    found = {}
    for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1):
        vram = (least + share * (most - least) + 0.5) / GB
        pipe = open_pipeline(path, vram=vram)
        given = None if edit else codes()
        found[share] = draw(pipe, image=list(images), prior_token_ids=given, output_type="pt")
        stats = found[share].stats
        assert stats["predicted_bytes"] <= vram * GB
        assert (held_bytes(pipe) > 0) == bool(stats["kept"])
        again = draw(pipe, image=list(images), prior_token_ids=given, output_type="pt")
        assert torch.equal(again.images, found[share].images)
    assert len({(tuple(out.stats["kept"]), out.stats["streamed_blocks"]) for out in found.values()}) > 3
    for out in found.values():
        assert torch.equal(out.prior_token_ids, found[1].prior_token_ids)
        assert torch.equal(out.images, found[1].images)


@pytest.mark.parametrize("folder", ["official", "quantised"])
def test_a_picture_is_the_same_under_any_plan(
    folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = open_pipeline(request.getfixturevalue(folder)("mixed"))
    first = draw(pipe, output_type="pt")
    ways = (((), 0), ((), 1), (("denoise",), 0), (("denoise", "decode"), 2), (("draft",), 5), (PHASES, 1), (PHASES, 5))
    for kept, own in ways:
        layers = 4 - own if kept == () else 0
        monkeypatch.setattr(pipe, "_plan", lambda needs, plan=(frozenset(kept), own, 0, layers): needs.plan(*plan))
        for _ in range(2):
            out = draw(pipe, output_type="pt")
            assert out.stats["streamed_layers"] == layers
            assert out.stats["streamed_blocks"] == (5 - own if own < 3 else 0)
            assert out.stats["kept"] == sorted(set(kept) & set(out.stats["predicted_phases"]))
            assert torch.equal(out.prior_token_ids, first.prior_token_ids)
            assert torch.equal(out.images, first.images)
        assert (held_bytes(pipe) > 0) == bool(kept)


@pytest.mark.usefixtures("weights_decide")
def test_what_another_kind_of_request_loaded_stays_where_there_is_room(official: Folder) -> None:
    """A picture from text needs no encoders of sources: they give way to a budget, and only to it."""
    edited = budgets(official("mixed"), (source(64, 64),))["resident"].peak_bytes
    text = budgets(official("mixed"))["resident"].peak_bytes
    assert edited > text
    pipe = open_pipeline(official("mixed"), vram=edited / GB + 0.001)
    edit(pipe)
    held = held_bytes(pipe)
    quick(pipe)
    assert held_bytes(pipe) == held
    pipe.vram_bytes = text
    quick(pipe)
    assert held_bytes(pipe) < held
    assert quick(pipe).stats["plan"] == "resident"


@pytest.mark.usefixtures("weights_decide")
def test_weights_that_stayed_go_when_the_plan_says_so(official: Folder) -> None:
    found = budgets(official("mixed"))
    pipe = open_pipeline(official("mixed"), vram=100)
    first = quick(pipe).images
    assert held_bytes(pipe) > 0
    pipe.vram_bytes = found["streamed"].peak_bytes
    held = []
    second = quick(pipe, progress=lambda _: held.append(held_bytes(pipe)))
    assert held[0] == 0
    assert second.stats["plan"] == "streamed"
    assert torch.equal(second.images, first)


@pytest.mark.usefixtures("weights_decide")
def test_a_budget_that_cannot_be_met_is_refused(official: Folder, loaded: list[str]) -> None:
    least = budgets(official("mixed"))["streamed"].peak_bytes / GB
    pipe = open_pipeline(official("mixed"), vram=least * 0.99)
    with pytest.raises(MemoryBudgetError) as refused:
        draw(pipe)
    assert_refused(refused.value, "64x64", f"{least:.2f} GB", f"{least * 0.99:.2f} GB are allowed")
    assert not loaded


def test_the_requests_of_a_call_are_planned_together(official: Folder) -> None:
    pipe = open_pipeline(official(), vram=100)
    request = GenerateRequest(prompt=PROMPT, height=SIDE, width=SIDE, num_inference_steps=STEPS, images=("a", "b"))
    alone = [pipe._needs(replace(request, images=images), ()) for images in ((), ("a", "b"))]
    together = Needs.together(alone).modes()[0].peak_bytes
    assert together > max(each.modes()[0].peak_bytes for each in alone)  # no edit drafts a preview
    for order in (1, -1):
        pictures = [[], [source(64, 64), source(64, 64)]][::order]
        out = quick(pipe, prompt=[PROMPT, PROMPT], image=pictures)
        assert out.stats["predicted_bytes"] == together
