"""Drawing against transformers' warpers: the same tokens kept, drawn with the same probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qruntime.sampling import noise, ranked_weights, running_sum, sample, uniforms

CODES, VOCAB = 96, 112  # the last 16 logits are no codes
WARPINGS = [(0.9, None, 0.75), (1.0, 5, 1.0), (0.7, 20, 0.5), (1.3, 1, 0.9), (0.9, 200, 0.05), (0.05, None, 0.99)]


def stock_probabilities(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float, codes: int = CODES
) -> Tensor:
    """What transformers' sampling draws codes from, when it is shown codes only."""
    scores = TemperatureLogitsWarper(temperature)(None, logits[:, :codes].float())
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(dim=-1)


def logits_of(seed: int, rows: int = 1) -> Tensor:
    return 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def drawn_shares(logits: Tensor, count: int, warping: tuple[float, int | None, float]) -> Tensor:
    """Shares of [1, V] logits' codes over `count` evenly spread uniforms: the CDF, read off without chance."""
    spread = (torch.arange(count, dtype=torch.float32) + 0.5) / count
    ids = sample(logits.expand(count, -1), spread, *warping, CODES)
    return torch.bincount(ids, minlength=CODES) / count


@pytest.mark.parametrize("warping", WARPINGS)
def test_the_distribution_is_the_stock_one(warping: tuple[float, int | None, float]) -> None:
    for seed in range(5):
        logits = logits_of(seed)
        expected = stock_probabilities(logits, *warping)[0]
        shares = drawn_shares(logits, 20_000, warping)
        assert (shares - expected).abs().max() < 2 / 20_000  # a step of the grid at each end of a token's interval
        assert set(shares.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())


@pytest.mark.parametrize("warping", WARPINGS)
@pytest.mark.parametrize("width", [CODES, 16_384])
def test_the_kept_set_is_the_stock_one(warping: tuple[float, int | None, float], width: int) -> None:
    for seed in range(20 if width == CODES else 3):
        scores = 3 * torch.randn(4, width, generator=torch.Generator().manual_seed(seed))
        weights, codes = ranked_weights(scores, *warping)
        by_code = torch.zeros_like(weights).scatter(1, codes, weights)
        expected = stock_probabilities(scores, *warping, codes=width)
        assert torch.equal(by_code > 0, expected > 0)
        torch.testing.assert_close(by_code / by_code.sum(dim=-1, keepdim=True), expected)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.05, 5.0),
    top_k=st.none() | st.integers(1, 2 * CODES),
    top_p=st.floats(0.01, 1.0),
)
def test_only_kept_codes_are_drawn(seed: int, temperature: float, top_k: int | None, top_p: float) -> None:
    logits = logits_of(seed, rows=16)
    ids = sample(logits, uniforms(seed, 16), temperature, top_k, top_p, CODES)
    kept = stock_probabilities(logits, temperature, top_k, top_p) > 0
    assert kept.gather(1, ids[:, None]).all()


def test_draws_pass_a_chi_square_test_against_the_stock_softmax() -> None:
    count = 40_000
    logits = logits_of(7) / 3
    expected = stock_probabilities(logits, 0.9, None, 0.75)[0] * count
    kept = expected > 0
    freedom = int(kept.sum()) - 1
    assert freedom >= 20
    assert expected[kept].min() >= 5  # what the test's approximation needs

    def statistic(draws: Tensor) -> float:
        ids = sample(logits.expand(count, -1), draws, 0.9, None, 0.75, CODES)
        observed = torch.bincount(ids, minlength=CODES)
        return ((observed - expected)[kept] ** 2 / expected[kept]).sum().item()

    bound = freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations
    assert statistic(uniforms(123, count)) < bound
    assert statistic(uniforms(123, count) ** 1.1) > bound  # draws a little off are told apart


@pytest.mark.parametrize("top_p", [0.125, 0.25, 0.5, 0.75])
def test_a_sum_that_meets_top_p_exactly_is_cut_as_in_transformers(top_p: float) -> None:
    weights, _ = ranked_weights(torch.zeros(1, 8), 1.0, None, top_p)
    assert (weights > 0).sum() == (stock_probabilities(torch.zeros(1, 8), 1.0, None, top_p, codes=8) > 0).sum()


def test_ties_at_the_top_k_boundary_stay_as_in_transformers() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = 2.0
    shares = drawn_shares(logits, 8_000, (1.0, 2, 1.0))
    assert torch.allclose(shares[:4], torch.full((4,), 0.25), atol=2 / 8_000)


@pytest.mark.parametrize("temperature", [0, 0.0, 0.9])
def test_no_code_is_drawn_from_beyond_the_codebook(temperature: float) -> None:
    logits = logits_of(3, rows=64)
    logits[:, CODES:] = 1e4
    ids = sample(logits, uniforms(3, 64), temperature, None, 1.0, CODES)
    assert ids.max() < CODES
    assert ids.dtype == torch.int64
    assert ids.shape == (64,)


def test_temperature_zero_is_the_most_likely_code() -> None:
    logits = logits_of(11, rows=64)
    assert torch.equal(sample(logits, uniforms(0, 64), 0, None, 0.75, CODES), logits[:, :CODES].argmax(dim=-1))


def test_a_tiny_top_p_keeps_the_most_likely_code() -> None:
    logits = logits_of(11, rows=64)
    likeliest = logits[:, :CODES].argmax(dim=-1)
    weights, codes = ranked_weights(logits[:, :CODES], 0.9, None, 1e-9)
    assert torch.equal(codes[:, -1], likeliest)
    assert torch.equal((weights > 0).sum(dim=-1), torch.ones(64, dtype=torch.int64))
    assert torch.equal(sample(logits, uniforms(0, 64), 0.9, None, 1e-9, CODES), likeliest)


def test_the_ends_of_the_unit_interval_draw_kept_codes() -> None:
    for seed in range(200):
        logits = logits_of(seed, rows=2)
        ids = sample(logits, torch.tensor([0.0, 1 - 2**-24]), 0.9, None, 0.75, CODES)
        kept = stock_probabilities(logits, 0.9, None, 0.75) > 0
        assert kept.gather(1, ids[:, None]).all()
        assert ids[1] == logits[1, :CODES].argmax()  # ranked last, so it owns the top of the interval
        past = sample(logits, torch.tensor([1.0, 1.0]), 0.9, None, 0.75, CODES)
        assert torch.equal(past, logits[:, :CODES].argmax(dim=-1))  # and what was rounded up to its end


def test_a_row_of_nan_gives_a_code() -> None:
    logits = torch.full((3, VOCAB), float("nan"))
    for temperature in (0.0, 0.9):
        ids = sample(logits, torch.tensor([0.0, 0.5, 0.99]), temperature, 50, 0.75, CODES)
        assert ((ids >= 0) & (ids < CODES)).all()


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    logits = logits_of(5, rows=32)
    draws = uniforms(5, 32)
    together = sample(logits, draws, 0.9, 50, 0.75, CODES)
    alone = [sample(logits[i : i + 1], draws[i : i + 1], 0.9, 50, 0.75, CODES) for i in range(32)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_running_sum_is_cumsum(rows: int) -> None:
    weights = torch.rand(rows, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(running_sum(weights), weights.cumsum(dim=-1))


class _Recorder(TorchDispatchMode):
    """The operators that run, and the dtypes they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.dtypes |= {t.dtype for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_nothing_is_read_back_and_no_float64_is_used(temperature: float) -> None:
    with _Recorder() as recorder:
        sample(logits_of(0, rows=2), torch.tensor([0.1, 0.7]), temperature, 50, 0.75, CODES)
    reads = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_to_copy.cpu"}
    assert not recorder.names & reads
    assert torch.float64 not in recorder.dtypes


def test_shapes_depend_on_no_data() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():  # raises on any operator whose output shape or control flow needs values
        ids = sample(torch.empty(3, VOCAB), torch.empty(3), 0.9, 50, 0.75, CODES)
    assert ids.shape == (3,)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**63 - 1])
def test_noise_is_what_diffusers_draws(seed: int) -> None:
    for shape in [(1, 16, 8, 8), (1, 4, 1, 2), (2, 16, 128, 128)]:
        stock = randn_tensor(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
        assert torch.equal(noise(seed, shape), stock)


def test_uniforms_lie_in_the_half_open_unit_interval() -> None:
    draws = uniforms(9, 1_000_000)
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.002


def test_the_draft_has_a_stream_of_its_own() -> None:
    for seed in (0, 1, 2**32 - 1, 2**40):
        own = torch.rand(1000, generator=torch.Generator("cpu").manual_seed(seed))
        assert (uniforms(seed, 1000) == own).float().mean() < 0.01
    assert not torch.equal(uniforms(0, 100), uniforms(2**32, 100))  # the CPU generator alone would not tell them apart
    assert not torch.equal(uniforms(0, 100), uniforms(1, 100))


def test_the_same_seed_draws_the_same() -> None:
    assert torch.equal(uniforms(5, 100), uniforms(5, 100))
    assert torch.equal(noise(5, (1, 4, 8, 8)), noise(5, (1, 4, 8, 8)))


def test_global_generators_stay_as_they_were() -> None:
    before = torch.random.get_rng_state()
    sample(logits_of(0, rows=4), uniforms(1, 4), 0.9, None, 0.75, CODES)
    noise(1, (1, 4, 8, 8))
    assert torch.equal(before, torch.random.get_rng_state())
