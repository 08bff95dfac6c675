"""Random weights for measuring: a converted folder that no converter made, which loads, verifies and multiplies."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.synthetic import OUTLIERS, main, random_linear, write_converted, write_official
from convert.recipe import RECIPES
from convert.run import convert
from qruntime.checkpoint.manifest import verify_files
from qruntime.checkpoint.reader import Checkpoint
from qruntime.checkpoint.synthetic import OUTLIER_CHANNELS
from qruntime.memory.blocks import Loader
from qruntime.pipeline import GlmImagePipeline
from qruntime.quant.quantize import dequantize
from qruntime.quant.scheme import Scheme

CPU = torch.device("cpu")
SCHEMES = [Scheme("plain"), Scheme("int4", group_size=64), Scheme("int4", group_size=32), Scheme("int8"),
           Scheme("int8", rotation=128)]  # fmt: skip


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official(tmp_path_factory.mktemp("official") / "GLM-Image", full_size=False)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_has_the_form_that_the_converter_gives(official: Path, tmp_path: Path, recipe: str) -> None:
    made = Checkpoint.open(write_converted(tmp_path / "made", recipe, full_size=False))
    wanted = Checkpoint.open(convert(official, tmp_path / "converted", recipe=recipe).path)
    assert (made.converted, made.recipe) == (True, recipe)
    for name, component in wanted.components.items():
        found = made.components[name]
        assert found.schemes.pairs == component.schemes.pairs
        assert found.tensors.keys() == component.tensors.keys()
        for key, tensor in component.tensors.items():
            assert (found.tensors[key].dtype, found.tensors[key].shape) == (tensor.dtype, tensor.shape)
        assert all(found.run(spec) is not None for spec in found.specs.values())
    assert verify_files(made.path) == []


@pytest.mark.parametrize("recipe", ["balanced", "quality", "small"])
def test_every_matrix_keeps_the_scale_of_what_goes_through_it(tmp_path: Path, recipe: str) -> None:
    checkpoint = Checkpoint.open(write_converted(tmp_path / "made", recipe, full_size=False))
    quantised = 0
    for component in checkpoint.components.values():
        loader = Loader(component, CPU, torch.float32)
        for spec in component.specs.values():
            weights = loader.new_weights(spec)
            loader.fill(weights, spec)
            for linear in weights.linears.values():
                if linear.scheme.kind == "plain":
                    continue
                weight = dequantize(linear.parts, linear.scheme, torch.float32)
                assert float(weight.std()) * math.sqrt(weight.shape[1]) == pytest.approx(1, abs=0.1)
                assert abs(float(weight.mean())) * math.sqrt(weight.shape[1]) < 0.1
                quantised += 1
    assert quantised > 10


def test_it_draws(tmp_path: Path) -> None:
    pipe = GlmImagePipeline.from_pretrained(
        write_converted(tmp_path / "made", "balanced", full_size=False), device="cpu"
    )
    pixels = pipe("a cat", height=64, width=64, num_inference_steps=2, seed=0, output_type="pt").images[0]
    assert pixels.std() > 0.05


def test_a_few_channels_are_larger_than_the_others(official: Path) -> None:
    """The same ones in every norm of the decoder, and in the scale of every AdaLN, and nowhere else."""
    decoder = {
        name: t.float()
        for file in (official / "vision_language_encoder").glob("*.safetensors")
        for name, t in load_file(file).items()
    }
    norms = [t for name, t in decoder.items() if name.endswith("layernorm.weight")]
    assert len(norms) == 4 * 2
    for norm in norms:
        assert int((norm == OUTLIERS).sum()) == OUTLIER_CHANNELS
        assert int((norm == 1).sum()) == len(norm) - OUTLIER_CHANNELS
        assert torch.equal(norm, norms[0])
    biases = load_file(next((official / "transformer").glob("*.safetensors")))
    for i in range(4):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (
            biases[f"transformer_blocks.{i}.norm1.linear.bias"].float().view(6, 2, -1)
        )
        for untouched in (shift, gate, mlp_shift, mlp_gate):
            assert not untouched.any()
        for rows in (scale, mlp_scale):
            assert ((1 + rows == OUTLIERS).sum(-1) == OUTLIER_CHANNELS).all()
            assert ((1 + rows == 1).sum(-1) == rows.shape[-1] - OUTLIER_CHANNELS).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_alone_is_that_of_its_weights(scheme: Scheme, dtype: torch.dtype) -> None:
    """However its weights were packed for the kernel of this device."""
    n, k = 96, 256
    stored = random_linear(n, k, scheme, torch.float32, torch.Generator().manual_seed(1))
    weight = stored.parts[""] if scheme.kind == "plain" else dequantize(stored.parts, scheme, torch.float32)
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(2)).to(dtype)
    y = random_linear(n, k, scheme, dtype, torch.Generator().manual_seed(1))(x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(y.float(), x.float() @ weight.float().T, rtol=tolerance, atol=tolerance)


def test_the_seed_fixes_every_byte(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_converted(tmp_path / name, "balanced", full_size=False, seed=seed)
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in "abc"]
    assert manifests[0] == manifests[1] != manifests[2]


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "made"), "--recipe", "small", "--small"]) == 0
    assert '"bytes"' in capsys.readouterr().out.splitlines()[-1]
    assert Checkpoint.open(tmp_path / "made").recipe == "small"
