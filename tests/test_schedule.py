"""The schedule against diffusers' scheduler driven as its GLM-Image pipeline drives it: every bit must agree."""

from __future__ import annotations

import itertools

import diffusers.pipelines.glm_image.pipeline_glm_image as stock
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from qruntime.request import MAX_STEPS
from qruntime.schedule import dit_timesteps, euler_step, guide, raw_timesteps, shift_mu, shifted_sigmas

ALL_STEP_COUNTS = range(1, MAX_STEPS + 1)
SEQ_LENS = (16, 256, 1024, 1536, 4096, 4095, 10_000, 16_384, 65_536)  # latent tokens, (height/16) * (width/16)


def stock_scheduler(**changes: float) -> FlowMatchEulerDiscreteScheduler:
    numbers = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "max_image_seq_len": 4096, **changes}
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000, use_dynamic_shifting=True, time_shift_type="linear", **numbers
    )


def stock_schedule(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, seq_len: int) -> torch.Tensor:
    """The timesteps of the stock pipeline; the sigmas are left in the scheduler."""
    raw = np.linspace(scheduler.config.num_train_timesteps, 1.0, steps + 1)[:-1].astype(np.int64).astype(np.float32)
    config = scheduler.config
    mu = stock.calculate_shift(seq_len, config.base_image_seq_len, config.base_shift, config.max_shift)
    sigmas = raw / config.num_train_timesteps
    return stock.retrieve_timesteps(scheduler, steps, "cpu", raw, sigmas, mu=mu)[0]


def test_raw_timesteps_equal_linspace_at_every_step_count() -> None:
    for steps in ALL_STEP_COUNTS:
        assert raw_timesteps(steps) == np.linspace(1000, 1.0, steps + 1)[:-1].astype(np.int64).tolist()


def test_raw_timesteps_fall_strictly_at_every_step_count() -> None:
    for steps in ALL_STEP_COUNTS:
        table = raw_timesteps(steps)
        assert all(later < earlier for earlier, later in itertools.pairwise(table))
        assert table[0] == 1000
        assert table[-1] >= 1


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 28, 49, 50, 51, 100, 333, 999, 1000])
def test_schedule_equals_the_stock_scheduler(steps: int) -> None:
    for seq_len in SEQ_LENS:
        scheduler = stock_scheduler()
        timesteps = stock_schedule(scheduler, steps, seq_len)
        assert dit_timesteps(steps) == [int(t) for t in timesteps - 1]
        assert torch.equal(shifted_sigmas(raw_timesteps(steps), seq_len), scheduler.sigmas)


@pytest.mark.parametrize(("base_shift", "max_shift", "base_len"), [(0.5, 1.15, 256), (0.25, 0.75, 64), (0.1, 3.0, 777)])
def test_schedule_follows_the_scheduler_config(base_shift: float, max_shift: float, base_len: int) -> None:
    scheduler = stock_scheduler(base_shift=base_shift, max_shift=max_shift, base_image_seq_len=base_len)
    stock_schedule(scheduler, 23, 1000)
    ours = shifted_sigmas(
        raw_timesteps(23), 1000, base_shift=base_shift, max_shift=max_shift, base_image_seq_len=base_len
    )
    assert torch.equal(ours, scheduler.sigmas)


@pytest.mark.parametrize(("side", "mu"), [(512, 1.75), (1024, 3.25), (2048, 6.25)])
def test_the_shift_at_the_sizes_the_model_card_names(side: int, mu: float) -> None:
    assert shift_mu((side // 16) ** 2, 0.25, 0.75, 256) == mu


def test_a_whole_denoising_equals_the_stock_loop() -> None:
    torch.manual_seed(0)
    scheduler = stock_scheduler()
    timesteps = stock_schedule(scheduler, 9, 4096)
    sigmas = shifted_sigmas(raw_timesteps(9), 4096)
    ours = theirs = torch.randn(2, 4, 8, 8)
    for i, t in enumerate(timesteps):
        cond, uncond = torch.randn(2, 2, 4, 8, 8, dtype=torch.bfloat16).unbind()
        noise_pred = uncond.float() + 1.5 * (cond.float() - uncond.float())
        theirs = scheduler.step(noise_pred, t, theirs, return_dict=False)[0]
        ours = euler_step(ours, guide(cond, uncond, 1.5), sigmas[i], sigmas[i + 1])
        assert torch.equal(ours, theirs)


def test_guidance_is_computed_in_float32() -> None:
    cond, uncond = torch.tensor([1.0078125]).bfloat16(), torch.tensor([1.0]).bfloat16()
    assert guide(cond, uncond, 1.5).item() == 1.01171875  # bfloat16 would round it to 1.015625
