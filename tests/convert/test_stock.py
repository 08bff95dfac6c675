"""`--recipe stock`, judged by the libraries it is for: what they write themselves, load, draw and dequantise."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from convert import stock
from convert.run import convert
from qruntime.checkpoint.index import index_component
from qruntime.checkpoint.manifest import read_manifest, verify_files
from qruntime.checkpoint.reader import Checkpoint
from qruntime.errors import CheckpointError, InputError

Official = Callable[..., Path]
AR, DIT = "vision_language_encoder", "transformer"
ROOT = Path(__file__).resolve().parents[2]
PROMPT = 'a cat beside a sign that says "open"'
HEIGHT, WIDTH = 96, 64

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers says that quanto leaves it in 1.0


@dataclass(frozen=True)
class Converted:
    source: Path
    folder: Path
    report: dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    for name in ("transformers", "diffusers", "accelerate", "bitsandbytes", "optimum.quanto"):
        pytest.importorskip(name, reason="the extras `reference` and `peers` are not installed")


@pytest.fixture(scope="module")
def converted(official: Official, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Converted]:
    """`converted(variant, dtype)`: a tiny checkpoint and what the recipe made of it, once a module."""
    made: dict[tuple[str, torch.dtype], Converted] = {}

    def folder(variant: str = "base", dtype: torch.dtype = torch.bfloat16) -> Converted:
        if (variant, dtype) not in made:
            source, out = official(variant, dtype=dtype), tmp_path_factory.mktemp("stock") / "out"
            made[variant, dtype] = Converted(source, out, convert(source, out, recipe="stock", device="cpu").report)
        return made[variant, dtype]

    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def load(folder: Path, **options: Any) -> Any:
    from diffusers import GlmImagePipeline

    pipe = GlmImagePipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, *, edit: bool) -> Tensor:
    from .. import tiny

    sources = {"image": [tiny.source_picture(WIDTH, HEIGHT)]} if edit else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the stock decoder samples by the global generator
        pictures = pipe(
            prompt=PROMPT, height=HEIGHT, width=WIDTH, num_inference_steps=3, output_type="pt", **sources
        ).images
    return pictures.float()


def relative_error(wanted: Tensor, found: Tensor) -> float:
    wanted, found = wanted.detach().double(), found.detach().double()
    return float((wanted - found).norm() / wanted.norm())


@pytest.mark.parametrize(("variant", "dtype"), [("base", torch.bfloat16), ("wide", torch.float32)])
def test_quantised_tensors_and_configs_are_those_that_the_libraries_write(
    converted: Callable[..., Converted], tmp_path: Path, variant: str, dtype: torch.dtype
) -> None:
    from diffusers import GlmImageTransformer2DModel, QuantoConfig
    from transformers import BitsAndBytesConfig, GlmImageForConditionalGeneration

    made = converted(variant, dtype)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.visual", "model.vqmodel"],
    )
    int8 = QuantoConfig(weights_dtype="int8", modules_to_not_convert=["linear", "linear_1", "linear_2", "proj_out"])
    for name, cls, config in (
        (AR, GlmImageForConditionalGeneration, nf4),
        (DIT, GlmImageTransformer2DModel, int8),
    ):
        model = cls.from_pretrained(made.source / name, quantization_config=config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        expected, found = weights(tmp_path / name), weights(made.folder / name)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype, key
            assert torch.equal(found[key], tensor), key
        folders = (tmp_path, made.folder)
        written, ours = (json.loads((folder / name / "config.json").read_text()) for folder in folders)
        assert ours["quantization_config"] == written["quantization_config"]
        assert [path.name for path in sorted((made.folder / name).glob("*.safetensors*"))] == [
            path.name for path in sorted((tmp_path / name).glob("*.safetensors*"))
        ]


def test_everything_else_is_the_source_in_bf16(converted: Callable[..., Converted]) -> None:
    made = converted()
    for name in ("text_encoder", "vae"):
        before, after = weights(made.source / name), weights(made.folder / name)
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor.bfloat16()), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_the_stock_pipeline_loads_and_draws(converted: Callable[..., Converted], dtype: torch.dtype | None) -> None:
    pipe = load(converted().folder, **({} if dtype is None else {"torch_dtype": dtype}))
    for edit in (False, True):
        picture = draw(pipe, edit=edit)
        assert picture.shape == (1, 3, HEIGHT, WIDTH)
        assert torch.isfinite(picture).all()
        assert picture.std() > 0.02


def test_a_width_that_does_not_fit_stays_bf16_and_draws(converted: Callable[..., Converted]) -> None:
    made = converted("narrow")
    # Not in bf16: rows of 20 bytes crash torch's int8 product on CPUs with AVX512.
    pipe = load(made.folder, torch_dtype=torch.float32)
    assert torch.isfinite(draw(pipe, edit=False)).all()
    schemes = {entry["scheme"]["type"] for entry in made.report["tensors"][AR].values()}
    assert schemes == {"plain"}
    assert not quantised_modules(pipe.vision_language_encoder, "Linear4bit")


def quantised_modules(model: Any, kind: str) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == kind}


def test_weights_are_nf4_and_int8_where_they_should_be(converted: Callable[..., Converted]) -> None:
    pipe = load(converted().folder, torch_dtype=torch.bfloat16)
    decoder = pipe.vision_language_encoder
    expected = {
        name
        for name, module in decoder.named_modules()
        if name.startswith("model.language_model.layers.") and isinstance(module, torch.nn.Linear)
    }
    assert quantised_modules(decoder, "Linear4bit") == expected
    assert len(expected) == 6 * 3  # q, k, v, o, gate_up and down of three layers
    for name in expected:
        module = decoder.get_submodule(name)
        state = module.weight.quant_state
        assert (module.weight.dtype, state.quant_type, state.blocksize, state.nested) == (torch.uint8, "nf4", 64, False)
        assert 2 * module.weight.numel() == module.in_features * module.out_features
        assert module.compute_dtype == torch.bfloat16
    for name in ("model.visual.blocks.0.mlp.fc1", "lm_head", "model.vqmodel.quant_conv"):
        assert decoder.get_submodule(name).weight.dtype == torch.bfloat16

    blocks = pipe.transformer.transformer_blocks
    for module in (blocks[0].attn1.to_q, blocks[1].attn1.to_out[0], blocks[2].ff.net[0].proj, blocks[2].ff.net[2]):
        assert type(module).__name__ == "QLinear"
        assert module.weight._data.dtype == torch.int8
    kept = (blocks[0].norm1.linear, pipe.transformer.norm_out.linear, pipe.transformer.proj_out)
    embedders = pipe.transformer.time_condition_embed
    for module in (*kept, embedders.timestep_embedder.linear_1, embedders.condition_embedder.linear_2):
        assert type(module) is torch.nn.Linear
        assert module.weight.dtype == torch.bfloat16


def test_what_runs_is_the_dequantised_model(
    official: Official, converted: Callable[..., Converted], reference: Callable[..., Any]
) -> None:
    from bitsandbytes.functional import dequantize_4bit

    from .. import oracle, tiny

    plain, pipe = reference("base", dtype=torch.bfloat16), oracle.load_reference(converted().folder)
    dequantised = oracle.load_reference(official("base", dtype=torch.bfloat16))
    dequantised.text_encoder.bfloat16().float()
    for name in quantised_modules(pipe.vision_language_encoder, "Linear4bit"):
        weight = pipe.vision_language_encoder.get_parameter(f"{name}.weight")
        exact = dequantize_4bit(weight.data, weight.quant_state)
        dequantised.vision_language_encoder.get_parameter(f"{name}.weight").data.copy_(exact)
    for name in quantised_modules(pipe.transformer, "QLinear"):
        exact = pipe.transformer.get_parameter(f"{name}.weight").dequantize()
        dequantised.transformer.get_parameter(f"{name}.weight").data.copy_(exact)
    pipes = (plain, dequantised, pipe)

    images = [tiny.source_picture(WIDTH, HEIGHT)]
    expected, *others = (oracle.reference_vq_codes(p, images) for p in pipes)
    assert all(torch.equal(found[0], expected[0]) for found in others)  # the vision tower is untouched

    generator = torch.Generator().manual_seed(0)
    drafted = torch.randint(0, 64, (HEIGHT * WIDTH // 32**2,), generator=generator)
    before, wanted, found = (
        oracle.reference_ar_logits(p, PROMPT, HEIGHT, WIDTH, drafted, images)[:, :64] for p in pipes
    )
    # The decoder's products are computed in bf16, by kernels that round the scales to bf16 too.
    assert relative_error(wanted, found) < 0.1 * relative_error(wanted, before)

    given = {
        "height": HEIGHT,
        "width": WIDTH,
        "steps": 3,
        "guidance": 1.5,
        "latents": torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=generator),
        "prior_token_ids": oracle.upsample_codes(drafted.view(HEIGHT // 32, WIDTH // 32)),
    }
    for sources in (None, images):
        runs = (oracle.reference_pictures(p, PROMPT, images=sources, **given) for p in pipes)
        before, wanted, found = (run.latents for run in runs)
        assert relative_error(wanted, found) < 0.001 * relative_error(wanted, before)


def test_the_report_is_what_the_libraries_dequantise(converted: Callable[..., Converted]) -> None:
    from bitsandbytes.functional import dequantize_4bit

    made = converted("wide", torch.float32)
    assert json.loads((made.folder / "quant_report.json").read_text()) == made.report
    assert made.report["recipe"] == "stock"
    pipe = load(made.folder, torch_dtype=torch.bfloat16)
    models = {name: getattr(pipe, name) for name in made.report["tensors"]}
    counts = {"plain": 0, "bitsandbytes nf4": 0, "optimum-quanto int8": 0}
    for component, entries in made.report["tensors"].items():
        before, after = weights(made.source / component), weights(made.folder / component)
        assert entries.keys() == before.keys()
        assert sum(entry["bytes"] for entry in entries.values()) == sum(t.nbytes for t in after.values())
        for name, entry in entries.items():
            kind = entry["scheme"]["type"]
            counts[kind] += 1
            if kind == "bitsandbytes nf4":
                weight = models[component].get_parameter(name)
                found = dequantize_4bit(weight.data, weight.quant_state)
            elif kind == "optimum-quanto int8":
                found = models[component].get_parameter(name).dequantize()
            else:
                found = after[name]
            assert entry["relative_error"] == pytest.approx(relative_error(before[name], found), rel=1e-4), name
    assert min(counts.values()) > 0


def test_errors_stand_beside_those_of_balanced(converted: Callable[..., Converted], tmp_path: Path) -> None:
    made = converted("wide", torch.float32)
    balanced = convert(made.source, tmp_path / "balanced", recipe="balanced", device="cpu").report

    def errors(report: dict[str, Any], component: str, names: set[str]) -> Tensor:
        found = report["tensors"][component]
        return torch.tensor([found[name]["relative_error"] for name in sorted(names)])

    for component, kind, ours, highest in (
        (AR, "bitsandbytes nf4", {"type": "int4", "group_size": 64}, 0.1),
        (DIT, "optimum-quanto int8", None, 0.012),
    ):
        entries = balanced["tensors"][component]
        names = {
            name
            for name, entry in made.report["tensors"][component].items()
            if entry["scheme"]["type"] == kind and entries[name]["scheme"]["type"] != "plain"
        }
        assert names == {
            name
            for name, entry in entries.items()
            if (entry["scheme"] == ours if ours else entry["scheme"]["type"] == "int8")
        }
        theirs, own = errors(made.report, component, names), errors(balanced, component, names)
        assert theirs.max() < highest
        assert own.mean() < theirs.mean()
        size = [sum(r["tensors"][component][n]["bytes"] for n in names) for r in (made.report, balanced)]
        assert size[0] == pytest.approx(size[1], rel=0.02)


@pytest.mark.parametrize("variant", ["base", "narrow", "mixed"])
def test_int8_matrices_lie_where_a_product_on_the_cpu_can_take_them(
    converted: Callable[..., Converted], variant: str
) -> None:
    matrices = [tensor for tensor in index_component(converted(variant).folder / DIT).values() if tensor.dtype == "I8"]
    assert matrices
    assert {tensor.start % 16 for tensor in matrices} == {0}


def test_shards_are_what_one_file_would_be(
    converted: Callable[..., Converted], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = converted()
    monkeypatch.setattr(stock, "SHARD_BYTES", 60_000)
    sharded = tmp_path / "out"
    convert(made.source, sharded, recipe="stock", device="cpu")
    for component in made.report["tensors"]:
        files = sorted(path.name for path in (sharded / component).glob("*.safetensors"))
        assert len(files) > 2
        assert (sharded / component / files[0]).stat().st_mode == (sharded / "manifest.json").stat().st_mode
        expected, found = weights(made.folder / component), weights(sharded / component)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        index = json.loads(next((sharded / component).glob("*.index.json")).read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    one, many = (load(folder, torch_dtype=torch.bfloat16).transformer for folder in (made.folder, sharded))
    assert all(torch.equal(many.state_dict()[name], tensor) for name, tensor in one.state_dict().items())


def test_the_folder_is_whole_and_holds_no_code(converted: Callable[..., Converted], tmp_path: Path) -> None:
    made = converted()
    source = tmp_path / "official"
    shutil.copytree(made.source, source)
    config = json.loads((source / DIT / "config.json").read_text())
    (source / DIT / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))
    (source / DIT / "evil.py").write_text("raise SystemExit\n")
    out = tmp_path / "out"
    convert(source, out, recipe="stock", device="cpu")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]
    assert verify_files(out) == []
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja"}
    assert files == {*read_manifest(out).files, "manifest.json"}
    assert "auto_map" not in json.loads((out / DIT / "config.json").read_text())
    assert read_manifest(out).recipe == "stock"


def test_a_folder_of_recipe_none_gives_the_same(converted: Callable[..., Converted], tmp_path: Path) -> None:
    made = converted()
    convert(made.source, tmp_path / "none", recipe="none", device="cpu")
    convert(tmp_path / "none", tmp_path / "out", recipe="stock", device="cpu")
    assert read_manifest(tmp_path / "none").source_sha256 == read_manifest(made.folder).source_sha256
    for component in made.report["tensors"]:
        expected, found = weights(made.folder / component), weights(tmp_path / "out" / component)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        ours, theirs = (folder / component / "config.json" for folder in (tmp_path / "out", made.folder))
        assert json.loads(ours.read_text()) == json.loads(theirs.read_text())


def test_this_runtime_refuses_the_folder_and_says_what_reads_it(
    converted: Callable[..., Converted], tmp_path: Path
) -> None:
    folder = converted().folder
    with pytest.raises(CheckpointError, match="diffusers"):
        Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="diffusers"):
        convert(folder, tmp_path / "out", recipe="balanced", device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["bitsandbytes", "optimum.quanto", "diffusers", "transformers"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    official: Official, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=missing.partition(".")[0]) as caught:
        convert(official(), tmp_path / "out", recipe="stock", device="cpu")
    assert caught.value.tip == 'pip install "qruntime[reference,peers]"'
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_replaced_only_when_told_and_only_by_a_whole_one(
    official: Official, tmp_path: Path
) -> None:
    source, out = official(), tmp_path / "out"
    with pytest.raises(InputError, match="resume"):
        convert(source, out, recipe="stock", resume=True, device="cpu")
    convert(source, out, recipe="none", device="cpu")
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(InputError, match="exists"):
        convert(source, out, recipe="stock", device="cpu")

    poisoned = tmp_path / "poisoned"
    shutil.copytree(source, poisoned)
    path = sorted((poisoned / AR).glob("*.safetensors"))[-1]
    values = load_file(path)
    name = next(name for name, tensor in values.items() if tensor.dim() == 2)
    values[name][0, 0] = torch.nan
    from safetensors.torch import save_file

    save_file(values, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}.* NaN"):
        convert(poisoned, out, recipe="stock", overwrite=True, device="cpu")
    assert (out / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "poisoned"]

    convert(source, out, recipe="stock", overwrite=True, device="cpu")
    assert read_manifest(out).recipe == "stock"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "poisoned"]


def test_a_killed_run_is_started_again_and_resumed_by_no_other_recipe(official: Official, tmp_path: Path) -> None:
    source, out = official(), tmp_path / "out"
    script = (
        "import os, sys; from convert.run import convert\n"
        "def stop(progress):\n"
        "    if progress.block == 'vision_language_encoder/layers.0': os._exit(9)\n"
        "convert(sys.argv[1], sys.argv[2], recipe='stock', device='cpu', progress=stop)\n"
    )
    command = [sys.executable, "-c", script, str(source), str(out)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == 9, killed.stderr.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(InputError, match="did not finish"):
        convert(source, out, recipe="stock", device="cpu")
    with pytest.raises(InputError, match="recipe"):
        convert(source, out, recipe="balanced", resume=True, device="cpu")
    convert(source, out, recipe="stock", overwrite=True, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert verify_files(out) == []
