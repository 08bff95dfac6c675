"""Pictures: what is taken, what is refused, what the model is shown (against stock processors), what is saved."""

from __future__ import annotations

import io
import json
import math
import os
import random
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil, smart_resize

from qruntime import media
from qruntime.errors import CheckpointError, InputError, QruntimeError
from qruntime.media import (
    EXIF_ORIENTATION,
    PictureLimits,
    check_output,
    fit_source,
    fitted_size,
    load_picture,
    parameters_text,
    read_metadata,
    save_png,
    to_pil,
    to_uint8,
    to_vae_input,
    to_vision_patches,
)
from qruntime.request import GenerateRequest

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def assert_one_line(error: QruntimeError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 300
    assert not error.message.endswith(".")


# Pictures in: forms, modes, orientation


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_a_picture_is_the_same_in_every_form(tmp_path: Path, kind: str) -> None:
    image = noise_picture(33, 21)
    path = tmp_path / "picture"
    path.write_bytes(encoded(image, kind))
    with path.open("rb") as file:
        forms = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), file, image]
        for form in forms:
            loaded = load_picture(form)
            assert (loaded.mode, loaded.size) == ("RGB", (33, 21))
            assert loaded.tobytes() == image.tobytes()


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
def test_lossy_formats_are_read(kind: str, options: dict[str, Any]) -> None:
    image = Image.linear_gradient("L").convert("RGB")
    loaded = load_picture(encoded(image, kind, **options))
    assert np.abs(np.int16(np.asarray(loaded)) - np.asarray(image)).max() < 20


def test_the_callers_picture_is_left_alone() -> None:
    image = noise_picture(8, 8)
    image.info["comment"] = "mine"
    before = image.tobytes()
    loaded = load_picture(image)
    loaded.paste(RED, (0, 0, 8, 8))
    assert image.tobytes() == before
    assert image.info == {"comment": "mine"}


def test_nothing_but_pixels_is_kept() -> None:
    image = noise_picture(8, 8)
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "secret")
    loaded = load_picture(encoded(image, "PNG", exif=exif, pnginfo=text, icc_profile=b"x" * 200))
    assert loaded.info == {}
    assert not loaded.getexif()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_are_those_of_pillow(orientation: int, kind: str) -> None:
    image = Image.new("RGB", (48, 32), WHITE)
    image.paste(RED, (0, 0, 24, 16))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encoded(image, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert load_picture(data).tobytes() == expected.tobytes()
    assert load_picture(Image.open(io.BytesIO(data))).tobytes() == expected.tobytes()


def test_a_broken_exif_tag_is_ignored() -> None:
    image = noise_picture(8, 8)
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40,
    ):
        assert load_picture(encoded(image, "PNG", exif=exif)).tobytes() == image.tobytes()


def palette(transparency: int | bytes | None) -> Image.Image:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


MODES: dict[str, tuple[Image.Image, tuple[int, int, int]]] = {  # the colour of pixel (1, 0)
    "1": (Image.new("1", (4, 2), 1), WHITE),
    "L": (Image.new("L", (4, 2), 77), (77, 77, 77)),
    "LA": (Image.new("LA", (4, 2), (0, 51)), (204, 204, 204)),
    "RGB": (Image.new("RGB", (4, 2), (1, 2, 3)), (1, 2, 3)),
    "RGBA clear": (Image.new("RGBA", (4, 2), (9, 9, 9, 0)), WHITE),
    "RGBA half": (Image.new("RGBA", (4, 2), (255, 0, 0, 51)), (255, 204, 204)),
    "RGBA full": (Image.new("RGBA", (4, 2), (1, 2, 3, 255)), (1, 2, 3)),
    "P": (palette(None), GREEN),
    "P with a clear index": (palette(1), WHITE),
    "P with alpha": (palette(b"\xff\x00"), WHITE),
    "CMYK": (Image.new("CMYK", (4, 2), (0, 255, 255, 0)), RED),
    "YCbCr": (Image.new("RGB", (4, 2), WHITE).convert("YCbCr"), WHITE),
    "HSV": (Image.new("RGB", (4, 2), RED).convert("HSV"), RED),
    "I;16": (Image.fromarray(np.full((2, 4), 0x8080, np.uint16)), (128, 128, 128)),
    "I;16 full": (Image.fromarray(np.full((2, 4), 0xFFFF, np.uint16)), WHITE),
    "I": (Image.fromarray(np.full((2, 4), 0x4040, np.int32)), (64, 64, 64)),
    "I beyond": (Image.fromarray(np.full((2, 4), 10**6, np.int32)), WHITE),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name: str) -> None:
    image, colour = MODES[name]
    loaded = load_picture(image)
    assert (loaded.mode, loaded.size) == ("RGB", (4, 2))
    assert loaded.getpixel((1, 0)) == colour
    if image.mode not in ("CMYK", "YCbCr", "HSV", "I"):  # PNG stores no such modes, or clips them
        assert load_picture(encoded(image, "PNG")).getpixel((1, 0)) == colour


def test_a_printers_jpeg_is_read() -> None:
    red, green, blue = load_picture(encoded(MODES["CMYK"][0], "JPEG", quality=95)).getpixel((1, 0))
    assert red > 240 > 15 > max(green, blue)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    loaded = np.asarray(load_picture(encoded(Image.fromarray(ramp), "PNG")))[..., 0]
    assert np.abs(loaded - ramp / 257).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert load_picture(data).getpixel((3, 3)) == RED


def test_a_phones_multi_picture_jpeg_gives_its_first_picture() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, GREEN)]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    for source in (data, Image.open(io.BytesIO(data))):
        red, green, blue = load_picture(source).getpixel((3, 3))
        assert red > 240 > 15 > max(green, blue)


# Pictures in: refusals

GOOD_PNG = encoded(noise_picture(64, 64), "PNG")
GOOD_JPEG = encoded(noise_picture(64, 64), "JPEG")
GOOD_WEBP = encoded(noise_picture(64, 64), "WEBP", lossless=True)
GOOD_BMP = encoded(noise_picture(64, 64), "BMP")


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def bmp(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(%pipe%touch hacked) (r) file\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'

DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x89",
    "text": b"this is no picture",
    "zeros": bytes(1000),
    "a page that says 404": b"<!DOCTYPE html><html><body>404</body></html>",
    "PostScript": EPS,
    "SVG": SVG,
    "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "Photoshop": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(100),
    "GIF": encoded(Image.new("P", (8, 8)), "GIF"),
    "TIFF": encoded(Image.new("RGB", (8, 8)), "TIFF"),
    "ICO": encoded(Image.new("RGB", (16, 16)), "ICO"),
    "PNG signature alone": GOOD_PNG[:8],
    "PNG without pixels": GOOD_PNG[:33],
    "PNG cut in half": GOOD_PNG[: len(GOOD_PNG) // 2],
    "PNG with a wrong checksum": GOOD_PNG[:50] + bytes([GOOD_PNG[50] ^ 255]) + GOOD_PNG[51:],
    "PNG with too little data": png(64, 64, b"\0" * 100),
    "PNG of no width": png(0, 10),
    "PNG of no height": png(10, 0),
    "PNG of unknown colours": png(4, 4, bytes(52), colour=5),
    "PNG of unknown depth": png(4, 4, bytes(52), depth=7),
    "PNG of 65 million pixels": png(8125, 8000),
    "PNG of 100 million pixels": png(10_000, 10_000),
    "PNG of 4 billion pixels": png(65_535, 65_535),
    "PNG of a quintillion pixels": png(2**31 - 1, 2**31 - 1),
    "PNG with a text bomb": png(4, 4, bytes(52), png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000)))),
    "PNG with a colour bomb": png(4, 4, bytes(10), png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
    "PNG with a broken pixel stream": png(4, 4).replace(zlib.compress(b""), b"\xff" * 8),
    "JPEG start alone": GOOD_JPEG[:2],
    "JPEG header alone": GOOD_JPEG[:20],
    "JPEG cut in half": GOOD_JPEG[: len(GOOD_JPEG) // 2],
    "JPEG of no height": GOOD_JPEG.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 0, 64)),
    "JPEG of 4 billion pixels": GOOD_JPEG.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 65_500, 65_500)),
    "WEBP header alone": GOOD_WEBP[:16],
    "WEBP cut in half": GOOD_WEBP[: len(GOOD_WEBP) // 2],
    "WEBP of random bytes": b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8L" + random.Random(0).randbytes(92),
    "BMP header alone": GOOD_BMP[:14],
    "BMP cut in half": GOOD_BMP[: len(GOOD_BMP) // 2],
    "BMP of 4 billion pixels": bmp(65_535, 65_535),
    "BMP of no width": bmp(0, 5),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_malformed_pictures_are_refused_in_one_line(
    tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "source.png"
    path.write_bytes(DAMAGED[case])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for source in (path, DAMAGED[case]):
            with pytest.raises(InputError) as refused:
                load_picture(source)
            assert_one_line(refused.value)
            assert refused.value.exit_code == 2
    assert "source.png" in str(_refusal(path))
    assert not warned
    assert capfd.readouterr() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.png"]


def _refusal(source: Any) -> InputError:
    with pytest.raises(InputError) as refused:
        load_picture(source)
    return refused.value


def test_the_number_that_mattered_is_named() -> None:
    assert "10000 x 10000" in _refusal(DAMAGED["PNG of 100 million pixels"]).message
    assert "64 million" in _refusal(DAMAGED["PNG of 100 million pixels"]).tip
    assert "damaged" in _refusal(DAMAGED["PNG cut in half"]).message
    assert "PNG, JPEG, WEBP or BMP" in _refusal(DAMAGED["GIF"]).message


def test_pixels_are_counted_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(image: Image.Image) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", decode)
    assert "pixels" in _refusal(DAMAGED["PNG of 65 million pixels"]).message


def test_the_pixel_limit_is_inclusive() -> None:
    image = noise_picture(10, 10)
    assert load_picture(image, PictureLimits(max_pixels=100)).size == (10, 10)
    for source in (image, encoded(image, "PNG")):
        with pytest.raises(InputError, match="10 x 10"):
            load_picture(source, PictureLimits(max_pixels=99))


def test_the_byte_limit_is_inclusive(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(GOOD_PNG)
    for source in (path, GOOD_PNG, io.BytesIO(GOOD_PNG)):
        with pytest.raises(InputError, match="larger than"):
            load_picture(source, PictureLimits(max_bytes=len(GOOD_PNG) - 1))
    assert load_picture(path, PictureLimits(max_bytes=len(GOOD_PNG))).size == (64, 64)


def test_a_callers_own_pixel_limit_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "pixels" in _refusal(GOOD_PNG).message


class _Closed(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError("the disk is gone")


NO_PICTURES: dict[str, Callable[[Path], Any]] = {
    "None": lambda folder: None,
    "a number": lambda folder: 5,
    "an array": lambda folder: np.zeros((8, 8, 3)),
    "a missing file": lambda folder: folder / "missing.png",
    "a folder": lambda folder: folder,
    "an address": lambda folder: "https://example.org/cat.png",
    "a file address": lambda folder: "file:///etc/hostname",
    "no name": lambda folder: "",
    "a NUL in the name": lambda folder: str(folder / "a\0.png"),
    "a name past the limit": lambda folder: str(folder / ("a" * 5000)),
    "a name of two lines": lambda folder: str(folder / "a\nb.png"),
    "a text file object": lambda folder: io.StringIO("x"),
    "a failing file object": lambda folder: _Closed(),
    "a picture of no pixels": lambda folder: Image.new("RGB", (0, 5)),
    "a picture of floats": lambda folder: Image.new("F", (5, 5)),
    "an opened GIF": lambda folder: Image.open(io.BytesIO(DAMAGED["GIF"])),
    "an opened PostScript file": lambda folder: Image.open(io.BytesIO(EPS)),
    "an opened half": lambda folder: Image.open(io.BytesIO(DAMAGED["JPEG cut in half"])),
}


@pytest.mark.parametrize("case", NO_PICTURES)
def test_what_is_no_picture_is_refused(tmp_path: Path, case: str) -> None:
    assert_one_line(_refusal(NO_PICTURES[case](tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a file" in _refusal(tmp_path / "pipe.png").message


@settings(max_examples=150, deadline=None)
@given(
    data=st.sampled_from([GOOD_PNG, GOOD_JPEG, GOOD_WEBP, GOOD_BMP]),
    place=st.floats(0, 1),
    junk=st.binary(min_size=1, max_size=8),
    cut=st.floats(0, 1),
)
def test_no_damage_gets_past_as_another_error(data: bytes, place: float, junk: bytes, cut: float) -> None:
    at = int(place * len(data))
    data = (data[:at] + junk + data[at + len(junk) :])[: int((0.5 + cut) * len(data))]
    try:
        loaded = load_picture(data, PictureLimits(max_pixels=1_000_000))
    except InputError:
        return
    assert loaded.mode == "RGB"


# Fitting


def assert_fitted(size: tuple[int, int], low: int, high: int) -> tuple[int, int]:
    """Checks every rule for a source of `size`, and returns the size at which it is used."""
    width, height = fitted_size(size, low * low, high * high)
    assert width % 32 == height % 32 == 0
    assert low <= min(width, height)
    assert max(width, height) <= high
    halved = smart_resize(height, width, 16, low * low, high * high)
    assert halved == (height // 2, width // 2)
    return width, height


def test_fitted_pictures_are_never_rescaled_again() -> None:
    """The official range; sizes small and large, random, with every aspect up to 4:1."""
    rng = random.Random(0)
    for _ in range(20_000):
        short = int(math.exp(rng.uniform(math.log(8), math.log(700))))
        long = rng.randint(short, 4 * short)
        size = (short, long) if rng.random() < 0.5 else (long, short)
        width, height = assert_fitted(size, 512, 2048)
        stretch = (width / height) / (size[0] / size[1])
        assert 1 / 1.04 < stretch < 1.04  # half a multiple of 32 in 512, a little more at the corners of the range


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.floats(1, 4), st.integers(2, 6), st.integers(0, 20), st.booleans())
def test_fitting_obeys_any_range(short: int, aspect: float, low_cells: int, span: int, tall: bool) -> None:
    long = min(int(short * aspect), 4 * short)
    low = 32 * low_cells
    assert_fitted((short, long) if tall else (long, short), low, low + 32 * span)


@pytest.mark.parametrize("size", [(512, 512), (2048, 2048), (2048, 512), (512, 2048), (1024, 768), (544, 1600)])
def test_a_legal_picture_is_not_touched(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    assert fit_source(image) is image


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((1000, 1000), (992, 992)),  # the nearest, at the same aspect
        ((511, 511), (512, 512)),
        ((100, 100), (512, 512)),
        ((3000, 4000), (1536, 2048)),
        ((4000, 1000), (2048, 512)),
        ((1920, 1080), (1920, 1088)),
        ((640, 480), (672, 512)),
    ],
)
def test_fitted_sizes(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fitted_size(size) == fitted


def test_fitting_resamples_bicubically_and_once() -> None:
    image = noise_picture(700, 530)
    fitted = fit_source(image)
    assert fitted.tobytes() == image.resize(fitted.size, Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize("size", [(401, 100), (100, 401), (1, 5)])
def test_long_pictures_are_refused_as_the_stock_processor_does(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]}") as refused:
        fit_source(Image.new("RGB", size))
    assert_one_line(refused.value)
    with pytest.raises(ValueError, match="smaller than 4"):
        smart_resize(size[1] * 16, size[0] * 16)


def test_a_range_without_a_legal_side_is_the_checkpoints_fault() -> None:
    with pytest.raises(CheckpointError, match="no side"):
        fit_source(Image.new("RGB", (100, 100)), 97 * 97, 127 * 127)


# What the model is shown


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 256), (224, 160)])
@pytest.mark.parametrize(
    ("patch", "mean", "std"),
    [(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), (8, (0.481, 0.457, 0.408), (0.268, 0.261, 0.275))],
)
def test_vision_patches_equal_the_stock_processor(
    size: tuple[int, int], patch: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> None:
    image = noise_picture(*size)
    stock = GlmImageImageProcessorPil(
        min_pixels=64**2,
        max_pixels=256**2,
        patch_size=patch,
        temporal_patch_size=1,
        merge_size=1,
        image_mean=list(mean),
        image_std=list(std),
    )
    expected = stock(image, return_tensors="pt")
    ours = to_vision_patches(image, patch, mean, std)
    assert torch.equal(ours, expected["pixel_values"])
    assert ours.dtype == torch.float32
    assert expected["image_grid_thw"].tolist() == [[1, size[1] // (2 * patch), size[0] // (2 * patch)]]


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_vae_input_equals_diffusers(size: tuple[int, int]) -> None:
    image = noise_picture(*size)
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(image, height=size[1], width=size[0])
    assert torch.equal(to_vae_input(image), expected)


def test_every_byte_value_maps_as_in_diffusers() -> None:
    ramp = Image.fromarray(np.arange(256 * 3, dtype=np.uint32).astype(np.uint8).reshape(16, 16, 3))
    expected = VaeImageProcessor(vae_scale_factor=8).preprocess(ramp, height=16, width=16)
    assert torch.equal(to_vae_input(ramp), expected)


# Pictures out


def test_pictures_round_as_in_diffusers() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 40, 24, generator=generator)
    halves = (torch.arange(256)[:, None, None] + 0.5) / 255  # where rounding to even shows
    pictures[0].view(-1)[:256] = halves.flatten().clamp(max=1)
    expected = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures))
    ours = to_pil(pictures)
    assert [p.tobytes() for p in ours] == [p.tobytes() for p in expected]
    assert [p.size for p in ours] == [(24, 40)] * 2
    assert torch.equal(to_uint8(pictures), torch.from_numpy(np.stack([np.asarray(p) for p in expected])))


def test_pictures_of_bfloat16_and_beyond_the_range() -> None:
    pictures = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.7, 0.25], dtype=torch.bfloat16).view(1, 3, 1, 2)
    assert to_uint8(pictures)[0, 0].tolist() == [[0, 128, 255], [0, 255, 64]]


SETTINGS = {
    **GenerateRequest("a “cat”, 新年 👩‍🚀\nsecond line", seed=7, width=512).settings(),
    "model": "zai-org/GLM-Image",
    "recipe": "balanced",
    "dtype": "bfloat16",
    "version": "0.1.0",
}
MADE_WITH = ("model", "recipe", "dtype", "version")


def test_a_saved_picture_reads_back_with_its_settings(tmp_path: Path) -> None:
    image = noise_picture(20, 10)
    path = save_png(image, tmp_path / "out.png", SETTINGS)
    assert path == tmp_path / "out.png"
    with Image.open(path) as saved:
        assert saved.tobytes() == image.tobytes()
        assert saved.text["parameters"] == parameters_text(SETTINGS)
    read = read_metadata(path)
    assert read["qruntime"] == SETTINGS
    wanted = GenerateRequest("a “cat”, 新年 👩‍🚀\nsecond line", seed=7, width=512)
    again = {key: value for key, value in read["qruntime"].items() if key not in MADE_WITH}
    assert GenerateRequest(**again) == wanted


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="cannot be written"):
        media.check_output(tmp_path / "out.png")


def test_the_parameters_text_is_the_one_picture_browsers_show() -> None:
    assert parameters_text(SETTINGS) == (
        "a “cat”, 新年 👩‍🚀\nsecond line\n"
        "Steps: 50, CFG scale: 1.5, Seed: 7, Size: 512x1024, Model: zai-org/GLM-Image, Recipe: balanced, "
        "Dtype: bfloat16, Version: qruntime 0.1.0"
    )
    assert 'Model: "my, odd: model"' in parameters_text({**SETTINGS, "model": "my, odd: model"})
    assert parameters_text({"prompt": "a", "seed": 0}) == "a\nSeed: 0"


def test_plain_prompts_are_stored_where_old_readers_look(tmp_path: Path) -> None:
    data = save_png(noise_picture(4, 4), tmp_path / "out.png", {"prompt": "a cat"}).read_bytes()
    assert b"tEXtparameters\0a cat" in data
    assert b"iTXtqruntime\0\0\0" in data  # UTF-8, not compressed


def test_without_settings_there_is_no_text(tmp_path: Path) -> None:
    data = save_png(noise_picture(4, 4), tmp_path / "out.png").read_bytes()
    assert b"tEXt" not in data
    assert b"iTXt" not in data


def test_saving_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "out.png").write_bytes(b"mine")
    (tmp_path / "out_2.png").mkdir()
    names = [save_png(noise_picture(4, 4), tmp_path / "out.png").name for _ in range(3)]
    assert names == ["out_1.png", "out_3.png", "out_4.png"]
    assert (tmp_path / "out.png").read_bytes() == b"mine"


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_saving_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "out.png").symlink_to(tmp_path / "elsewhere.png")
    assert save_png(noise_picture(4, 4), tmp_path / "out.png").name == "out_1.png"
    assert not (tmp_path / "elsewhere.png").exists()


def test_writers_at_the_same_time_get_different_names(tmp_path: Path) -> None:
    taken: list[Path] = []
    start = threading.Barrier(8)

    def write(seed: int) -> None:
        start.wait()
        for i in range(5):
            taken.append(save_png(noise_picture(8, 8, seed * 10 + i), tmp_path / "out.png"))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(taken)) == 40
    assert sorted(tmp_path.iterdir()) == sorted(taken)
    assert len({path.read_bytes() for path in taken}) == 40


@pytest.mark.skipif(sys.platform == "win32", reason="file modes are POSIX's")
def test_a_saved_picture_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    saved = save_png(noise_picture(4, 4), tmp_path / "out.png")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["save", "fsync", "replace"])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    owner = Image.Image if step == "save" else os
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(QruntimeError, match="No space left on device") as failed:
            save_png(noise_picture(4, 4), tmp_path / "out.png", SETTINGS)
    assert_one_line(failed.value)
    assert failed.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    assert save_png(noise_picture(4, 4), tmp_path / "out.png") == tmp_path / "out.png"


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_png(noise_picture(4, 4), tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "advised"),
    [
        ("out", "use out.png"),
        ("out.jpg", "use out.png"),
        ("out.png.txt", "use out.png.png"),
        ("", ".png"),
        (".png", "use .png.png"),
        ("missing/out.png", "create it first"),
        ("file.txt/out.png", "create it first"),
        ("a\0.png", "another name"),
    ],
)
def test_bad_outputs_are_refused_before_any_work(tmp_path: Path, name: str, advised: str) -> None:
    (tmp_path / "file.txt").write_bytes(b"")
    for refuse in (check_output, lambda path: save_png(noise_picture(4, 4), path)):
        with pytest.raises(InputError) as refused:
            refuse(str(tmp_path / name))
        assert advised in refused.value.tip
        assert_one_line(refused.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_name_past_the_limit_fails_cleanly(tmp_path: Path) -> None:
    with pytest.raises(QruntimeError) as failed:
        save_png(noise_picture(4, 4), tmp_path / ("a" * 400 + ".png"))
    assert "\n" not in str(failed.value)
    assert list(tmp_path.iterdir()) == []


def test_upper_case_suffixes_are_png_too(tmp_path: Path) -> None:
    assert check_output(tmp_path / "OUT.PNG") == tmp_path / "OUT.PNG"


# Reading settings


def with_text(**texts: str) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    return encoded(noise_picture(4, 4), "PNG", pnginfo=info)


BAD_METADATA: dict[str, bytes] = {
    "no file": b"",
    "a JPEG": GOOD_JPEG,
    "no settings": GOOD_PNG,
    "half a PNG": with_text(qruntime="{}")[:40],
    "no JSON": with_text(qruntime="{'prompt': 5}"),
    "half the JSON": with_text(qruntime='{"prompt": "a'),
    "a list": with_text(qruntime="[1, 2]"),
    "a number": with_text(qruntime="5"),
    "a deep nest": with_text(qruntime="[" * 100_000),
    "a number of many digits": with_text(qruntime='{"seed": ' + "9" * 10_000 + "}"),
    "a text bomb": png(
        4, 4, bytes(52), png_chunk(b"iTXt", b"qruntime\0\x01\0\0\0" + zlib.compress(b" " * 200_000_000))
    ),
    "a long text": png(4, 4, bytes(52), png_chunk(b"iTXt", b"qruntime\0\0\0\0\0" + b'"' + b"a" * 2_000_000 + b'"')),
}


@pytest.mark.parametrize("case", BAD_METADATA)
def test_bad_settings_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "in.png"
    path.write_bytes(BAD_METADATA[case])
    with pytest.raises(InputError) as refused:
        read_metadata(path)
    assert "in.png" in refused.value.message
    assert_one_line(refused.value)


def test_foreign_settings_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "a1111.png"
    path.write_bytes(with_text(parameters="a cat\nSteps: 20"))
    assert read_metadata(path) == {"parameters": "a cat\nSteps: 20"}


def test_settings_cannot_steer_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil.png"
    path.write_bytes(with_text(parameters="a\x1b]0;owned\x07 cat\x9b31m\u202e新年\n\tend"))
    assert read_metadata(path) == {"parameters": "a\ufffd]0;owned\ufffd cat\ufffd31m\ufffd新年\n\tend"}
    assert json.dumps(read_metadata(path)).isascii()
