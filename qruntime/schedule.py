"""The noise schedule of GLM-Image and the Euler step, as pure functions.

Two clocks run side by side, and mixing them gives magenta, grainy pictures: the diffusion transformer is told the *raw*
integer timestep minus one, while Euler steps on the *shifted* noise levels. Arithmetic is float32 in the order of
diffusers' FlowMatchEulerDiscreteScheduler with linear dynamic shifting, so that the numbers agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def raw_timesteps(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """The integer timestep of each step, falling from `num_train_timesteps` towards 1.

    The table is `int(linspace(T, 1, steps + 1))` without its last entry; it repeats no value up to `steps = T`.
    """
    stride = (1.0 - num_train_timesteps) / steps
    return [int(i * stride + num_train_timesteps) for i in range(steps)]  # float64, in the order linspace adds up


def dit_timesteps(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """What the diffusion transformer is conditioned on at each step: the raw timestep minus one."""
    return [timestep - 1 for timestep in raw_timesteps(steps, num_train_timesteps)]


def shift_mu(image_seq_len: int, base_shift: float, max_shift: float, base_image_seq_len: int) -> float:
    """How far noise levels are shifted for a picture of `image_seq_len` latent tokens: 3.25 at 1024 x 1024."""
    return float((image_seq_len / base_image_seq_len) ** 0.5) * max_shift + base_shift


def shifted_sigmas(
    timesteps: list[int],
    image_seq_len: int,
    *,
    base_shift: float = 0.25,
    max_shift: float = 0.75,
    base_image_seq_len: int = 256,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """Noise levels of every step and a last zero: float32 [steps + 1] on the CPU, mu / (mu + 1/sigma - 1).

    `image_seq_len` is (height/16) * (width/16); the other numbers come from the checkpoint's scheduler config.
    """
    # mu stays a tensor: torch turns `number / tensor` into a reciprocal and a product, which rounds twice.
    mu = torch.tensor(shift_mu(image_seq_len, base_shift, max_shift, base_image_seq_len), dtype=torch.float32)
    sigmas = torch.tensor(timesteps, dtype=torch.float32) / num_train_timesteps
    shifted = mu / (mu + (1 / sigmas - 1))
    return torch.cat([shifted, torch.zeros(1)])


def euler_step(latents: Tensor, noise_pred: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """One step along the flow: latents + (sigma_next - sigma) * noise_pred, in float32."""
    return latents.float() + (sigma_next - sigma) * noise_pred.float()


def guide(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance, uncond + scale * (cond - uncond), in float32."""
    uncond = uncond.float()
    return uncond + guidance_scale * (cond.float() - uncond)
