"""Checkpoints made to do harm, or broken by accident: each is refused in one line, nothing outside its folder is read.

Every case starts from a folder that opens, and changes one thing. NaN in a tensor is none of these: weights are not
read when a folder is opened.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qruntime.checkpoint.manifest import MANIFEST, record_file, write_manifest
from qruntime.checkpoint.reader import Checkpoint
from qruntime.checkpoint.writer import open_shard, plan_shards
from qruntime.errors import CheckpointError
from qruntime.models.spec import block_layout
from qruntime.quant.scheme import Scheme, SchemeMap

from .forge import change_header, change_json, put_together, take_apart

Change = Callable[[Path], object]

AR = "vision_language_encoder"
AR_CONFIG = f"{AR}/config.json"
GENERATION = f"{AR}/generation_config.json"
DIT = "transformer/config.json"
VAE = "vae/config.json"
GLYPH = "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
PROCESSOR = "processor/preprocessor_config.json"
AR_SHARD = f"{AR}/model-00002-of-00004.safetensors"
AR_INDEX = f"{AR}/model.safetensors.index.json"
DIT_SHARD = "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"
DIT_INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
GLYPH_FILE = "text_encoder/model.safetensors"
BIAS = "decoder.conv_in.bias"  # of the VAE, [16]


@pytest.fixture
def folder(official: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny official checkpoint that may be changed."""
    return shutil.copytree(official("narrow"), tmp_path / "GLM-Image")


SCHEMES = {
    "transformer": {
        "transformer_blocks.*.attn1.to_q.weight": Scheme("int8", rotation=128),
        "transformer_blocks.*.attn1.to_k.weight": Scheme("int8", rotation=128),
        "transformer_blocks.*.attn1.to_v.weight": Scheme("int8", rotation=128),
        "transformer_blocks.*.ff.net.0.proj.weight": Scheme("int8"),
    },
    AR: {
        "model.language_model.layers.*.mlp.gate_up_proj.weight": Scheme("int4", group_size=64),
        "lm_head.weight": Scheme("int8"),
    },
}


@pytest.fixture(scope="session")
def converted_once(official: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of format 1, with the official configurations and quantised weights that are all zero."""
    source = official("wide")
    folder = tmp_path_factory.mktemp("converted") / "GLM-Image"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    for name, component in Checkpoint.open(source).components.items():
        pairs = SCHEMES.get(name, {})
        quantization = {"quant_method": "qruntime", "format": 1, "schemes": {k: v.to_json() for k, v in pairs.items()}}
        change_json(folder / name / "config.json", lambda config, q=quantization: config.update(quantization_config=q))
        schemes = SchemeMap(pairs)
        layouts = [(spec, block_layout(spec, schemes, component.plain_dtype)) for spec in component.specs.values()]
        for shard in plan_shards(layouts, shard_bytes=400_000):
            open_shard(folder / name, shard).close()
    renew_manifest(folder)
    return folder


def renew_manifest(folder: Path) -> None:
    """A manifest of the files as they are now, so that what is wrong with them is not seen by their size."""
    (folder / MANIFEST).unlink(missing_ok=True)
    files = [path for path in folder.rglob("*") if path.is_file()]
    write_manifest(
        folder,
        source_name="GLM-Image",
        source_sha256="0" * 64,
        recipe="balanced",
        environment={"device": "cpu"},
        files={path.relative_to(folder).as_posix(): record_file(path) for path in files},
    )


@pytest.fixture
def converted(converted_once: Path, tmp_path: Path) -> Path:
    """A folder of format 1 that may be changed."""
    return shutil.copytree(converted_once, tmp_path / "GLM-Image")


def assert_refused(folder: Path, complaint: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(folder)
    error = refused.value
    assert complaint in error.message
    assert str(error).isprintable()  # which a line end is not
    assert len(str(error)) < 600
    assert error.tip
    assert error.exit_code == 2


def test_the_official_folder_opens(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.converted
    assert checkpoint.recipe == "none"


def test_the_converted_folder_opens(converted: Path) -> None:
    checkpoint = Checkpoint.open(converted)
    assert checkpoint.converted
    assert checkpoint.recipe == "balanced"
    for component in checkpoint.components.values():
        assert all(component.run(spec) is not None for spec in component.specs.values())


# --- What the cases are made of ---------------------------------------------------------------------------------------


def header(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: change_header(folder / name, change)


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The entry of a file's first tensor."""
    return next(header[key] for key in header if not key.startswith("__"))


def config(name: str, *path: Any, value: Any) -> Change:
    """Set one value of a JSON file."""

    def change(folder: Path) -> None:
        def put(content: Any) -> None:
            for key in path[:-1]:
                content = content[key]
            content[path[-1]] = value

        change_json(folder / name, put)

    return change


def left_out(name: str, *path: Any) -> Change:
    """Take one value out of a JSON file."""

    def change(folder: Path) -> None:
        def cut(content: Any) -> None:
            for key in path[:-1]:
                content = content[key]
            del content[path[-1]]

        change_json(folder / name, cut)

    return change


def content(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def removed(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Rewrite a whole file, well-formed, with other tensors."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / name, {"format": "pt"})

    return rewrite


def a_folder_in_place_of(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def data(name: str, change: Callable[[bytes], bytes]) -> Change:
    def rewrite(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return rewrite


def announce(header_bytes: int) -> bytes:
    return header_bytes.to_bytes(8, "little") + b"{"


def grown(name: str) -> Change:
    """Lengthen a file to 100 MB, most of which no disk has to hold."""
    return lambda folder: os.truncate(folder / name, 10**8)


def linked(name: str, to: str | None = None) -> Change:
    """Put a link in a file's or folder's place: to `to`, or to the thing itself, moved out of the checkpoint."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside" / name
        outside.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(outside)
        try:
            (folder / name).symlink_to(to or outside)
        except OSError:  # Windows lets few users
            pytest.skip("cannot make links here")

    return change


def mapped(index: str, number: int, to: object) -> Change:
    """Let an index put the tensors of one shard elsewhere."""

    def change(folder: Path) -> None:
        def put(found: Any) -> None:
            shard = sorted(set(found["weight_map"].values()))[number]
            target = str(folder / shard) if to == "ABSOLUTE" else to
            found["weight_map"] = {k: target if v == shard else v for k, v in found["weight_map"].items()}

        change_json(folder / index, put)

    return change


def escaped(index: str, shard: str, to: str) -> Change:
    """Move a shard out of the folder and let the index point there: followed, the checkpoint would be whole."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        (folder / shard).rename(outside)
        target = str(outside) if to == "ABSOLUTE" else to

        def put(found: Any) -> None:
            name = Path(shard).name
            found["weight_map"] = {k: target if v == name else v for k, v in found["weight_map"].items()}

        change_json(folder / index, put)

    return change


def pickles_only(folder: Path) -> None:
    for path in (folder / "transformer").glob("*.safetensors*"):
        path.unlink()
    (folder / "transformer" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


# --- Official folders -------------------------------------------------------------------------------------------------


def case(name: str, change: Change, complaint: str) -> Any:
    return pytest.param(change, complaint, id=name)


HEADERS = [
    case("empty file", content(VAE_FILE, b""), "has 0 bytes"),
    case("file of three bytes", content(VAE_FILE, b"\x02\x00\x00"), "has 3 bytes"),
    case("cut in the header", data(VAE_FILE, lambda b: b[:100]), "has 100 bytes and announces a header"),
    case("cut in the data", data(VAE_FILE, lambda b: b[:-1]), "accounts for"),
    case("a trailing byte", data(VAE_FILE, lambda b: b + b"\0"), "accounts for"),
    case("header of 2^64 bytes", data(VAE_FILE, lambda b: b"\xff" * 8 + b[8:]), "a header of 18446744073709551615"),
    case("header of no bytes", data(VAE_FILE, lambda b: bytes(8) + b[8:]), "does not start with"),
    case("header of 99 MB", both(data(VAE_FILE, lambda b: announce(99 * 10**6)), grown(VAE_FILE)), "over 8388608"),
    case("header is a list", data(VAE_FILE, lambda b: b[:8] + b"[" + b[9:]), "does not start with"),
    case("header is no JSON", data(VAE_FILE, lambda b: b[:9] + b"'" + b[10:]), "not valid JSON"),
    case("header is no text", data(VAE_FILE, lambda b: b[:10] + b"\xff" + b[11:]), "not UTF-8"),
    case("key twice", lambda f: put_together(f / VAE_FILE, b'{"a":{},"a":{}}', b""), "'a' stands twice"),
    case("deep header", lambda f: put_together(f / VAE_FILE, b'{"a":' * 10**5, b""), "nested over"),
    case("span shifted", header(VAE_FILE, lambda h: first(h).update(data_offsets=[4, 8])), "shape takes"),
    case("shape of a terabyte", header(VAE_FILE, lambda h: first(h).update(shape=[10**6, 10**6])), "shape takes"),
    case("negative side", header(VAE_FILE, lambda h: first(h).update(shape=[-1])), "has the shape [-1]"),
    case("shape over 64 bits", header(VAE_FILE, lambda h: first(h).update(shape=[2**63, 2**63])), "has the shape"),
    case("negative offset", header(VAE_FILE, lambda h: first(h).update(data_offsets=[-4, 0])), "data_offsets"),
    case("dtype F64", header(VAE_FILE, lambda h: first(h).update(dtype="F64")), "is stored as F64; only"),
    case("dtype unknown", header(VAE_FILE, lambda h: first(h).update(dtype="pickle")), "has the dtype 'pickle'"),
    case("two tensors in one place", header(VAE_FILE, lambda h: h.update(x=first(h))), "overlaps"),
    case("a tensor cut from the header", header(VAE_FILE, lambda h: h.pop(next(k for k in h if k[0] != "_"))), "gap"),
    case("name of two lines", header(VAE_FILE, lambda h: h.update({"a\nb": {}})), "names a tensor 'a\\nb'"),
    case("metadata of objects", header(VAE_FILE, lambda h: h.update(__metadata__={"a": {}})), "metadata"),
    case("a folder in a file's place", a_folder_in_place_of(VAE_FILE), f"{VAE_FILE} is not a regular file"),
]
FILES = [
    case("missing shard", removed(AR_SHARD), "lacks model-00002-of-00004.safetensors"),
    case("missing shard, no index", both(removed(AR_SHARD), removed(AR_INDEX)), "holds 3 of 4 shards"),
    case("missing weights", removed(VAE_FILE), "vae holds no safetensors file"),
    case("pickles only", pickles_only, "transformer holds 1 pickle files"),
    case("stale weights", lambda f: shutil.copy(f / AR_SHARD, f / AR / "model.safetensors"), "not one of the 4"),
    case("two single files", lambda f: shutil.copy(f / VAE_FILE, f / "vae/model.safetensors"), "2 sets of weights"),
    case(
        "two indices", lambda f: shutil.copy(f / DIT_INDEX, f / "transformer/a.safetensors.index.json"), "2 index files"
    ),
    case("index without a map", content(AR_INDEX, b"{}"), "has no weight_map"),
    case("index is a list", content(AR_INDEX, b"[1]"), "has no weight_map"),
    case("index cut", content(AR_INDEX, b'{"weight_map":'), "not valid JSON"),
    case("map to a number", mapped(AR_INDEX, 0, 7), "in 7, which is no file"),
    case("map to another shard", mapped(AR_INDEX, 0, "model-00002-of-00004.safetensors"), "not one of the 3 files"),
    case(
        "one tensor mapped elsewhere",
        config(AR_INDEX, "weight_map", "lm_head.weight", value="model-00001-of-00004.safetensors"),
        "lm_head.weight",
    ),
    case(
        "map lacks a tensor",
        left_out(AR_INDEX, "weight_map", "lm_head.weight"),
        "lm_head.weight, which the index does not name",
    ),
    case(
        "map names a ghost",
        config(AR_INDEX, "weight_map", "ghost", value="model-00001-of-00004.safetensors"),
        "lacks ghost",
    ),
]
ESCAPES = [
    case("map climbs out", escaped(AR_INDEX, AR_SHARD, "../../outside.safetensors"), "no file of its folder"),
    case("map to an absolute path", escaped(AR_INDEX, AR_SHARD, "ABSOLUTE"), "no file of its folder"),
    case("map climbs backwards", escaped(AR_INDEX, AR_SHARD, "..\\..\\outside.safetensors"), "no file of its folder"),
    case("map to a drive", escaped(AR_INDEX, AR_SHARD, "C:outside.safetensors"), "no file of its folder"),
    case("map to another component", mapped(AR_INDEX, 1, "../transformer/config.json"), "no file of its folder"),
    case("shard linked out", linked(AR_SHARD), f"{AR_SHARD} is a link out"),
    case("weights linked to a device", linked(VAE_FILE, "/dev/zero"), f"{VAE_FILE} is a link out"),
    case(
        "weights linked in a circle",
        linked(VAE_FILE, "diffusion_pytorch_model.safetensors"),
        f"{VAE_FILE} cannot be read",
    ),
    case("index linked out", linked(AR_INDEX), f"{AR_INDEX} is a link out"),
    case("config linked out", linked(VAE), "vae/config.json is a link out"),
    case("component linked out", linked("vae"), "vae/config.json is a link out"),
    case("model_index linked out", linked("model_index.json"), "model_index.json is a link out"),
    case("scheduler linked out", linked("scheduler"), "scheduler_config.json is a link out"),
    case("preprocessor linked out", linked(PROCESSOR), "is a link out"),
    case("tokenizer linked out", linked("processor/tokenizer.json"), "processor/tokenizer.json is a link out"),
    case("config linked in a circle", linked(VAE, "config.json"), "vae/config.json cannot be read"),
    case("config linked to nothing", linked(VAE, "gone.json"), "vae/config.json is missing"),
]
TENSORS = [
    case("missing tensor", tensors(VAE_FILE, lambda t: t.pop(BIAS)), "vae lacks 1 of"),
    case("extra tensor", tensors(VAE_FILE, lambda t: t.update(extra=torch.zeros(1))), "does not have, first extra"),
    case("wrong shape", tensors(VAE_FILE, lambda t: t.update({BIAS: torch.zeros(3)})), "has shape [3], not [16]"),
    case("wrong rank", tensors(VAE_FILE, lambda t: t.update({BIAS: torch.zeros(16, 1)})), "has shape [16, 1]"),
    case("empty tensor", tensors(VAE_FILE, lambda t: t.update({BIAS: torch.zeros(0)})), "has shape [0]"),
    case(
        "wrong dtype",
        tensors(VAE_FILE, lambda t: t.update({BIAS: torch.zeros(16, dtype=torch.int8)})),
        "is stored as I8",
    ),
    case(
        "dtype I64", tensors(VAE_FILE, lambda t: t.update({BIAS: torch.zeros(16, dtype=torch.int64)})), "stored as I64"
    ),
    case(
        "a quantised part in official weights",
        tensors(GLYPH_FILE, lambda t: t.update({"shared.weight.q": torch.zeros(3, dtype=torch.uint8)})),
        "shared.weight.q",
    ),
    case("no tensors", tensors(VAE_FILE, lambda t: t.clear()), "vae lacks"),
    case("another component's weights", lambda f: shutil.copy(f / GLYPH_FILE, f / VAE_FILE), "vae lacks"),
]
CONFIGS = [
    case("config is no JSON", content(DIT, b"{'num_layers': 2}"), "not valid JSON"),
    case("config is empty", content(DIT, b""), "not valid JSON"),
    case("config is a pickle", content(DIT, b"\x80\x04N."), "not UTF-8"),
    case("config is a list", content(DIT, b"[]"), "not a JSON object"),
    case("config is null", content(DIT, b"null"), "not a JSON object"),
    case("config is deep", content(DIT, b'{"a":' * 10**5 + b"1" + b"}" * 10**5), "nested over"),
    case("config is almost too deep to parse", content(DIT, b"[" * 990 + b"]" * 990), "nested over"),
    case("number of 10000 digits", content(DIT, b'{"num_layers": ' + b"9" * 10**4 + b"}"), "not valid JSON"),
    case("config of 9 MB", content(DIT, b" " * 9 * 2**20 + b"{}"), "has 9437186 bytes"),
    case("missing config", removed(DIT), "transformer/config.json is missing"),
    case("config is a folder", a_folder_in_place_of(DIT), "is not a regular file"),
    case("missing component", removed("transformer"), "transformer/config.json is missing"),
    case("missing key", left_out(DIT, "num_layers"), "num_layers is None"),
    case("1e12 layers", config(DIT, "num_layers", value=1e12), "num_layers is 1000000000000.0"),
    case("10^12 layers", config(DIT, "num_layers", value=10**12), "num_layers is 1000000000000,"),
    case("513 layers", config(DIT, "num_layers", value=513), "from 1 to 512"),
    case("512 layers", config(DIT, "num_layers", value=512), "transformer lacks"),
    case("fewer layers than weights", config(DIT, "num_layers", value=1), "that GLM-Image does not have"),
    case("no layers", config(DIT, "num_layers", value=0), "num_layers is 0"),
    case("negative layers", config(DIT, "num_layers", value=-1), "num_layers is -1"),
    case("true layers", config(DIT, "num_layers", value=True), "num_layers is True"),
    case("layers in a text", config(DIT, "num_layers", value="2"), "num_layers is '2'"),
    case("a text that clears the screen", config(DIT, "num_layers", value="2\n\x1b[2J"), "num_layers is '2\\n"),
    case("a long list", config(DIT, "num_layers", value=[[2]] * 10**5), "num_layers is [[2]"),
    case("more channels in than out", config(DIT, "in_channels", value=16), "out_channels"),
    case("wider heads than weights", config(DIT, "attention_head_dim", value=1024), "shape"),
    case("codebooks differ", config(DIT, "prior_vq_quantizer_codebook_size", value=49), "codebook sizes"),
    case("text widths differ", config(DIT, "text_embed_dim", value=24), "text widths"),
    case(
        "latent channels differ",
        both(config(DIT, "in_channels", value=8), config(DIT, "out_channels", value=8)),
        "latent channels",
    ),
    case(
        "quantised by others",
        config(DIT, "quantization_config", value={"quant_method": "bitsandbytes"}),
        "quant_method is 'bitsandbytes'",
    ),
    case("another activation", config(VAE, "act_fn", value="relu"), "act_fn is 'relu'"),
    case("no blocks", config(VAE, "block_out_channels", value=[]), "block_out_channels"),
    case("NaN", config(VAE, "latents_std", value=[math.nan] * 4), "NaN is no number"),
    case("Infinity", config(VAE, "latents_mean", value=[math.inf] * 4), "Infinity is no number"),
    case("absurd mean", config(VAE, "latents_mean", value=[1e300] * 4), "latents_mean"),
    case("deviation of zero", config(VAE, "latents_std", value=[0] * 4), "latents_std holds a zero"),
    case("groups do not divide", config(VAE, "norm_num_groups", value=3), "not multiples of 3"),
    case("mid-block attention", config(VAE, "mid_block_add_attention", value=True), "mid_block_add_attention"),
    case("another feed-forward", config(GLYPH, "feed_forward_proj", value="relu"), "feed_forward_proj"),
    case("absurd width", config(GLYPH, "d_model", value=2**40), "d_model is 1099511627776"),
    case(
        "mrope sections",
        config(AR_CONFIG, "text_config", "rope_parameters", "mrope_section", value=[1, 1, 1]),
        "mrope_section sums to 3",
    ),
    case(
        "negative mrope section",
        config(AR_CONFIG, "text_config", "rope_parameters", "mrope_section", value=[-1, 2, 3]),
        "mrope_section",
    ),
    case(
        "another activation of the decoder", config(AR_CONFIG, "text_config", "hidden_act", value="gelu"), "hidden_act"
    ),
    case(
        "head smaller than codebook",
        config(AR_CONFIG, "text_config", "vision_vocab_size", value=47),
        "larger than the head",
    ),
    case("no heads", config(AR_CONFIG, "text_config", "num_attention_heads", value=0), "num_attention_heads is 0"),
    case("width of 2^70", config(AR_CONFIG, "vision_config", "hidden_size", value=2**70), "hidden_size"),
    case("section is a list", config(AR_CONFIG, "vq_config", value=[]), "vq_config is not a JSON object"),
    case("id outside the vocabulary", config(AR_CONFIG, "image_token_id", value=10**6), "image_token_id"),
    case("section twice", content(AR_CONFIG, b'{"text_config": {}, "text_config": {}}'), "'text_config' stands twice"),
    case("missing generation config", removed(GENERATION), "generation_config.json is missing"),
    case("negative temperature", config(GENERATION, "temperature", value=-1), "temperature is -1"),
    case("top_p over one", config(GENERATION, "top_p", value=1.5), "top_p is 1.5"),
    case("missing model_index", removed("model_index.json"), "model_index.json is missing"),
    case(
        "another pipeline",
        config("model_index.json", "_class_name", value="FluxPipeline"),
        "_class_name is 'FluxPipeline'",
    ),
    case("no pipeline", left_out("model_index.json", "_class_name"), "_class_name is None"),
    case("model_index is a text", content("model_index.json", b'"GlmImagePipeline"'), "not a JSON object"),
    case("missing scheduler", removed(SCHEDULER), "scheduler_config.json is missing"),
    case("another shift", config(SCHEDULER, "time_shift_type", value="exponential"), "time_shift_type"),
    case("no timesteps", config(SCHEDULER, "num_train_timesteps", value=0), "num_train_timesteps"),
    case("division by zero", config(SCHEDULER, "base_image_seq_len", value=0), "base_image_seq_len"),
    case("missing preprocessor", removed(PROCESSOR), "preprocessor_config.json is missing"),
    case("preprocessor is no JSON", content(PROCESSOR, b"{"), "not valid JSON"),
    case("division by a zero deviation", config(PROCESSOR, "image_std", value=[0.5, 0, 0.5]), "image_std holds a zero"),
    case("four colours", config(PROCESSOR, "image_mean", value=[0.5] * 4), "image_mean"),
    case("pictures of 2^40 pixels", config(PROCESSOR, "max_pixels", value=2**40), "max_pixels"),
    case("pixel range upside down", config(PROCESSOR, "min_pixels", value=2**20), "min_pixels is over max_pixels"),
    case("patch sizes differ", config(PROCESSOR, "patch_size", value=14), "patch sizes"),
    case("missing tokenizer", removed("processor/tokenizer.json"), "processor/tokenizer.json is missing"),
    case("a file in the folder's place", lambda f: (shutil.rmtree(f), f.write_bytes(b"")), "is not a folder"),
    case("no folder", shutil.rmtree, "is not a folder"),
]


@pytest.mark.parametrize(("change", "complaint"), [*HEADERS, *FILES, *ESCAPES, *TENSORS, *CONFIGS])
def test_a_malformed_official_checkpoint_is_refused(folder: Path, change: Change, complaint: str) -> None:
    change(folder)
    assert_refused(folder, complaint)


# --- Converted folders ------------------------------------------------------------------------------------------------


def shard(folder: Path, component: str = "transformer", number: int = 1) -> Path:
    return next((folder / component).glob(f"model-{number:05d}-of-*.safetensors"))


def scheme(
    value: object, component: str = "transformer", pattern: str = "transformer_blocks.*.ff.net.0.proj.weight"
) -> Change:
    return config(f"{component}/config.json", "quantization_config", "schemes", pattern, value=value)


def whole_header(component: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of whichever shards of a component it can be changed in."""

    def rewrite(folder: Path) -> None:
        for path in sorted((folder / component).glob("*.safetensors")):
            head, body = take_apart(path)
            change(head)
            put_together(path, head, body)

    return rewrite


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(head: dict[str, Any]) -> None:
        for name in [name for name in head if name.endswith(old)]:
            head[name.removesuffix(old) + new] = head.pop(name)

    return change


def retyped(suffix: str, dtype: str, shape: list[int] | None = None) -> Callable[[dict[str, Any]], object]:
    """Say another dtype, and a shape of as many bytes."""
    size = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}

    def change(head: dict[str, Any]) -> None:
        for name, found in head.items():
            if name.endswith(suffix) and not name.startswith("__"):
                shape = found["shape"]
                shape[-1] = shape[-1] * size[found["dtype"]] // size[dtype]
                found["dtype"] = dtype

    return change


TWO = {"type": "int8", "rotation": 64}
CONVERTED = [
    case("newer format of a component", config(DIT, "quantization_config", "format", value=2), "format is 2"),
    case("format is a text", config(DIT, "quantization_config", "format", value="1"), "format is '1'"),
    case("another method", config(DIT, "quantization_config", "quant_method", value="gptq"), "quant_method is 'gptq'"),
    case("quantisation is a list", config(DIT, "quantization_config", value=[1]), "is not a JSON object"),
    case("schemes are a list", config(DIT, "quantization_config", "schemes", value=[]), "schemes is []"),
    case(
        "5000 schemes",
        config(DIT, "quantization_config", "schemes", value={str(i): TWO for i in range(5000)}),
        "an object of at most",
    ),
    case("scheme of 2 bits", scheme({"type": "int2"}), "is not one of format 1"),
    case("groups of 48", scheme({"type": "int4", "group_size": 48}), "is not one of format 1"),
    case("groups of a float", scheme({"type": "int4", "group_size": 64.0}), "is not one of format 1"),
    case("groups of nothing", scheme({"type": "int4"}), "is not one of format 1"),
    case("groups of a negative number", scheme({"type": "int4", "group_size": -64}), "is not one of format 1"),
    case("rotation of 3", scheme({"type": "int8", "rotation": 3}), "is not one of format 1"),
    case("rotation is a list", scheme({"type": "int8", "rotation": [64]}), "is not one of format 1"),
    case("type is a list", scheme({"type": ["int8"]}), "is not one of format 1"),
    case("scheme is a text", scheme("int8"), "is not one of format 1"),
    case("scheme is null", scheme(None), "is not one of format 1"),
    case("another scheme than stored", scheme({"type": "int4", "group_size": 64}), "ff.net.0.proj"),
    case("rotation wider than the matrix", scheme({"type": "int8", "rotation": 256}), "has 128 columns"),
    case(
        "neighbours of different schemes",
        scheme({"type": "int8"}, AR, "model.language_model.layers.*.self_attn.q_proj.weight"),
        "different schemes",
    ),
    case(
        "a scheme without its parts",
        scheme({"type": "int8"}, AR, "model.language_model.layers.*.self_attn.o_proj.weight"),
        "lacks",
    ),
    case("no quantisation, quantised weights", left_out(DIT, "quantization_config"), "lacks"),
    case("a part of another scheme", whole_header("transformer", renamed(".weight.scale", ".weight.zero")), "lacks"),
    case("q of another sign", whole_header("transformer", retyped(".weight.q", "U8")), "is stored as U8, not I8"),
    case("int4 of another sign", whole_header(AR, retyped(".weight.q", "I8")), "is stored as I8, not U8"),
    case(
        "scale of another float",
        whole_header(AR, retyped("gate_up_proj.weight.scale", "F16")),
        "is stored as F16, not BF16",
    ),
    case("zero points of twice the bytes", whole_header(AR, retyped("gate_up_proj.weight.zero", "F32")), "has shape"),
    case("bias of bytes", whole_header("transformer", retyped("attn1.to_q.bias", "U8")), "has shape"),
    case(
        "a shard of another conversion",
        lambda f: shutil.copy(shard(f), f / "transformer" / "model-00001-of-00001.safetensors"),
        "2 sets of weights",
    ),
    case("a shard missing and not listed", lambda f: shard(f).unlink(), "shards, as"),
    case("a shard twice", lambda f: shutil.copy(shard(f), shard(f, number=2)), "holds already"),
    case("an empty shard", lambda f: shard(f).write_bytes(b""), "has 0 bytes"),
]
ENTRY = {"bytes": 1, "sha256": "0" * 64}
MANIFESTS = [
    case("no manifest", removed(MANIFEST), "the folder has no manifest.json"),
    case("manifest cut", content(MANIFEST, b"{"), "manifest.json is not valid JSON"),
    case("manifest is a list", content(MANIFEST, b"[]"), "manifest.json has []"),
    case("manifest linked out", linked(MANIFEST), "manifest.json is a link out"),
    case("manifest linked to nothing", linked(MANIFEST, "gone.json"), "manifest.json is missing"),
    case("manifest linked in a circle", linked(MANIFEST, MANIFEST), "manifest.json cannot be read"),
    case("manifest is a folder", a_folder_in_place_of(MANIFEST), "manifest.json is not a regular file"),
    case("newer format", config(MANIFEST, "format", value=2), "has format 2"),
    case("format 0", config(MANIFEST, "format", value=0), "in place of format 1"),
    case("format in a text", config(MANIFEST, "format", value="1"), "in place of format 1"),
    case(
        "path climbs out",
        config(MANIFEST, "files", "../outside.json", value=ENTRY),
        "'../outside.json' in place of the path",
    ),
    case("absolute path", config(MANIFEST, "files", "/etc/passwd", value=ENTRY), "'/etc/passwd' in place of the path"),
    case("deep path", config(MANIFEST, "files", "a/b/c.json", value=ENTRY), "in place of the path"),
    case("path climbs backwards", config(MANIFEST, "files", "vae\\..\\..\\x", value=ENTRY), "in place of the path"),
    case("path to a drive", config(MANIFEST, "files", "C:x", value=ENTRY), "in place of the path"),
    case("listed file missing", config(MANIFEST, "files", "vae/gone.json", value=ENTRY), "vae/gone.json is missing"),
    case("wrong size", config(MANIFEST, "files", VAE, "bytes", value=7), "not the 7 of its manifest.json"),
    case("negative size", config(MANIFEST, "files", VAE, "bytes", value=-1), "the size in bytes of"),
    case("no hash", config(MANIFEST, "files", VAE, "sha256", value="no hash"), "a proper 'sha256'"),
    case("nothing listed", config(MANIFEST, "files", value={}), "does not list model_index.json"),
    case("files are a list", config(MANIFEST, "files", value=[]), "manifest.json has []"),
    case("recipe of two lines", config(MANIFEST, "recipe", value="a\nb"), "a proper 'recipe'"),
    case("source is a path", config(MANIFEST, "source", "name", value="/home/someone"), "a proper 'name'"),
    case("config not listed", left_out(MANIFEST, "files", VAE), "does not list vae/config.json"),
    case(
        "weights not listed",
        lambda f: shutil.copy(shard(f), f / "transformer" / "x.safetensors"),
        "'transformer/x.safetensors' is not listed",
    ),
    case(
        "index not listed",
        lambda f: (f / "vae" / "x.safetensors.index.json").write_text("{}"),
        "index.json' is not listed",
    ),
    case("a shard missing", lambda f: shard(f).unlink(), "is missing in"),
    case(
        "a shard of another size", lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"), "of its manifest.json"
    ),
    case("a shard linked out", lambda f: linked(shard(f).relative_to(f).as_posix())(f), "is a link out"),
]


@pytest.mark.parametrize(("change", "complaint"), CONVERTED)
def test_a_malformed_converted_checkpoint_is_refused(converted: Path, change: Change, complaint: str) -> None:
    """The manifest fits what is there, as in a folder that was made so on purpose."""
    change(converted)
    renew_manifest(converted)
    assert_refused(converted, complaint)


@pytest.mark.parametrize(("change", "complaint"), MANIFESTS)
def test_a_folder_and_manifest_that_disagree_are_refused(converted: Path, change: Change, complaint: str) -> None:
    change(converted)
    assert_refused(converted, complaint)


# --- Nothing outside --------------------------------------------------------------------------------------------------

WATCH = """
import json, os, sys
from qruntime.checkpoint.reader import Checkpoint
from qruntime.errors import CheckpointError

EVENTS = ("open", "os.listdir", "os.scandir", "mmap.__new__", "socket.connect", "subprocess.Popen", "os.system")
touched, watching = [], False

def hook(event, arguments):
    if watching and event in EVENTS:
        path = arguments[0]
        touched.append([event, os.fsdecode(path) if isinstance(path, (str, bytes)) else repr(path)])

sys.addaudithook(hook)
good, *folders = sys.argv[1:]
Checkpoint.open(good)  # whatever Python itself loads late is loaded now
answers = []
for folder in folders:
    touched.clear()
    watching = True
    try:
        Checkpoint.open(folder)
        outcome = "opened"
    except CheckpointError as error:
        outcome = error.message
    watching = False
    answers.append([outcome, list(touched)])
print(json.dumps(answers))
"""


def watch(good: Path, *folders: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """Open folders in a process of their own: what came of each, and every (event, path) that Python reported."""
    ran = subprocess.run([sys.executable, "-c", WATCH, good, *folders], capture_output=True, text=True, check=True)
    return [(outcome, [(event, path) for event, path in touched]) for outcome, touched in json.loads(ran.stdout)]


def test_nothing_outside_the_folder_is_read(
    official: Callable[..., Path], converted_once: Path, tmp_path: Path
) -> None:
    """Good folders and those whose files lead out, watched while they are opened."""
    outward = [(param, official("narrow")) for param in (*ESCAPES, *CONFIGS)]
    outward += [(param, converted_once) for param in MANIFESTS]
    folders, expected = [], []
    for i, (param, source) in enumerate([(None, official("narrow")), (None, converted_once), *outward]):
        folder = shutil.copytree(source, tmp_path / f"{i}" / "GLM-Image")
        if param is not None:
            param.values[0](folder)
        folders.append(folder)
        expected.append("opened" if param is None else param.values[1])
    for folder, complaint, (outcome, touched) in zip(
        folders, expected, watch(official("narrow"), *folders), strict=True
    ):
        assert complaint in outcome
        assert {event for event, _ in touched} <= {"open", "os.listdir"}
        for _, path in touched:
            assert Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)), (complaint, path)
        if complaint == "opened":
            assert len(touched) > 15  # or nothing was watched


def test_the_watch_sees_what_is_read_outside(official: Callable[..., Path], tmp_path: Path) -> None:
    """In the hub's cache weights are links to blobs, which do lie outside the snapshot: the watch must report them."""
    snapshot = tmp_path / "models--zai-org--GLM-Image" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--zai-org--GLM-Image" / "blobs"
    shutil.copytree(official("narrow"), snapshot)
    blobs.mkdir()
    (snapshot / VAE_FILE).rename(blobs / "0123")
    try:
        (snapshot / VAE_FILE).symlink_to("../../../blobs/0123")
    except OSError:
        pytest.skip("cannot make links here")
    ((outcome, touched),) = watch(official("narrow"), snapshot)
    assert outcome == "opened"
    outside = [path for _, path in touched if not Path(os.path.realpath(path)).is_relative_to(snapshot.resolve())]
    assert [Path(path).name for path in outside] == ["diffusion_pytorch_model.safetensors"]


# --- Anything at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["folder", "converted"])
def test_random_damage_is_refused_or_harmless(which: str, request: pytest.FixtureRequest) -> None:
    """Bytes of JSON files and headers are changed at random: the folder opens or is refused, nothing else happens."""
    target: Path = request.getfixturevalue(which)
    draw = random.Random(0)
    paths = sorted(path for path in target.rglob("*") if path.suffix in (".json", ".safetensors"))
    refusals = []
    for _ in range(150):
        path = draw.choice(paths)
        before = path.read_bytes()
        after = bytearray(before)
        reach = len(before)
        if path.suffix == ".safetensors":
            reach = 8 + int.from_bytes(before[:8], "little")
        for _ in range(draw.randint(1, 4)):
            after[draw.randrange(reach)] = draw.choice(b'0123456789[]{}",:.-eE \n\0\xff')
        path.write_bytes(after)
        try:
            Checkpoint.open(target)
        except CheckpointError as error:
            refusals.append(str(error))
        path.write_bytes(before)
    assert len(refusals) > 50
    assert all(refusal.isprintable() for refusal in refusals)
    Checkpoint.open(target)
