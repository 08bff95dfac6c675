"""Pictures in, hardened, and pictures out, with the settings that drew them.

A source picture is a stranger's file: its format must be on a short list, its size is judged from the header before a
pixel is decoded, and whatever the decoder trips over becomes one sentence. It is then resized *once*, to sides the
model's image processor leaves alone, so that the draft's codes and the diffusion transformer's latents cover the same
grid. TIFF, GIF and the many other formats Pillow reads are left out: each is another parser in the path of untrusted
bytes, and any program that opens one can save a PNG.

A finished picture is written beside its destination and moved there in one step. It never replaces a file, and a
failure leaves none behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import os
import secrets
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any

import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .errors import CheckpointError, InputError, QruntimeError
from .request import MAX_ASPECT, SIZE_MULTIPLE

SOURCE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What cameras, browsers and editors write. A phone's multi-picture JPEG (MPO) opens as JPEG, at its first picture."""
OPENED_FORMATS = (None, *SOURCE_FORMATS, "MPO")
"""Formats of Pillow pictures we accept from a caller; None: made in memory."""
MAX_METADATA_CHARS = 1_000_000
"""A hundred times the longest prompt; Pillow itself stops at 1 MB a text chunk."""
MAX_NUMBERED_NAMES = 10_000
"""How many names `out_1.png`, `out_2.png`, ... are tried before giving up on a folder."""
EXIF_ORIENTATION = 0x0112
EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
CONVERTIBLE_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
ALPHA_MODES = ("LA", "PA", "RGBA", "RGBa")

PictureSource = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image


@dataclass(frozen=True)
class PictureLimits:
    """How large a source picture may be, judged before it is decoded."""

    max_pixels: int = 64_000_000
    """More than any phone's default picture; decoded it takes 0.19 GB, and the model sees 4 million pixels at most."""
    max_bytes: int = 256_000_000
    """That many pixels, uncompressed, with transparency."""


DEFAULT_LIMITS = PictureLimits()


# Pictures in


def load_picture(source: PictureSource, limits: PictureLimits = DEFAULT_LIMITS) -> Image.Image:
    """The picture as a new RGB image: turned upright by its EXIF tag, transparency on white, the first of an animation.

    `source` is a path, the bytes of a file, an open binary file, or a Pillow image. Raises `InputError` when it is
    missing, too large, of another format, damaged or empty.
    """
    if isinstance(source, Image.Image):
        return _decode(source, "the picture", limits)
    data, name = _read_source(source, limits.max_bytes)
    if not data:
        raise InputError(f"{name} is empty", "check how the file was saved")
    with _quiet():
        try:
            image = Image.open(io.BytesIO(data), formats=SOURCE_FORMATS)
        except Image.DecompressionBombError:
            raise InputError(f"{name} has too many pixels", _smaller(limits)) from None
        except Exception:  # a plugin meets hostile bytes with whatever it trips over
            raise InputError(
                f"{name} is not a {', '.join(SOURCE_FORMATS[:-1])} or {SOURCE_FORMATS[-1]} picture",
                "save it as PNG or JPEG",
            ) from None
        with image:
            return _decode(image, name, limits)


def fit_source(
    image: Image.Image, min_pixels: int = 512 * 512, max_pixels: int = 2048 * 2048, factor: int = SIZE_MULTIPLE
) -> Image.Image:
    """Resize a source picture to `fitted_size`, once and bicubically; one that is legal already comes back as it is."""
    size = fitted_size(image.size, min_pixels, max_pixels, factor)
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def fitted_size(
    size: tuple[int, int], min_pixels: int = 512 * 512, max_pixels: int = 2048 * 2048, factor: int = SIZE_MULTIPLE
) -> tuple[int, int]:
    """The (width, height) at which a source picture is used, so that no later stage resizes it again.

    Sides become multiples of `factor` in the range sqrt(min_pixels) to sqrt(max_pixels) of the checkpoint's processor,
    with the aspect kept as well as multiples allow. Raises `InputError` where one side is over 4 times the other.
    """
    width, height = size
    if max(size) > MAX_ASPECT * min(size):
        raise InputError(f"a source picture of {width} x {height} is longer than {MAX_ASPECT}:1", "crop it first")
    low = math.ceil(round(math.sqrt(min_pixels)) / factor) * factor
    high = round(math.sqrt(max_pixels)) // factor * factor
    if low > high:
        raise CheckpointError(
            f"the processor's range, {min_pixels} to {max_pixels} pixels, holds no side that is a multiple of {factor}",
            "download the checkpoint again",
        )
    return _nearest_size(size, low, high, factor)


def to_vision_patches(
    image: Image.Image, patch: int = 16, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> Tensor:
    """What the vision tower reads: RGB halved by bicubic, normalised, cut in patches, [rows*columns, 3*patch*patch].

    float32, patches row by row, each as channel, row, column, computed as transformers' GlmImageImageProcessorPil does.
    """
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    # One table entry a byte value: rescaling rounds from float64 there, and only 256 values exist.
    scale = torch.tensor([value * (1 / 255) for value in range(256)], dtype=torch.float32)
    pixels = _pixels(half).long()
    tables = (scale[:, None] - torch.tensor(mean, dtype=torch.float32)) / torch.tensor(std, dtype=torch.float32)
    channels = torch.stack([tables[:, c][pixels[..., c]] for c in range(3)])
    rows, columns = half.height // patch, half.width // patch
    cut = channels.reshape(3, rows, patch, columns, patch)
    return cut.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3 * patch * patch)


def to_vae_input(image: Image.Image) -> Tensor:
    """What the VAE's encoder reads: float32 [1, 3, H, W] in -1..1, as diffusers' VaeImageProcessor makes it."""
    return 2.0 * (_pixels(image).permute(2, 0, 1)[None].contiguous().float() / 255.0) - 1.0


# Pictures out


def to_uint8(pictures: Tensor) -> Tensor:
    """Bytes of pictures in 0..1: [B, 3, H, W] float to [B, H, W, 3] uint8 on the CPU, halves rounded to even."""
    return (pictures.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """Pillow pictures of a float tensor [B, 3, H, W] in 0..1."""
    made = []
    for picture in to_uint8(pictures):
        height, width, _ = picture.shape
        data = ctypes.string_at(picture.data_ptr(), picture.numel())  # numpy would do it, and is no dependency
        made.append(Image.frombytes("RGB", (width, height), data))
    return made


def check_output(path: str | os.PathLike[str]) -> Path:
    """The path a picture may be saved under, checked before any work is done for it: a .png in a folder that can be
    written to."""
    output = Path(path)
    if "\0" in str(output):
        raise InputError("the output's name holds a NUL character", "choose another name")
    if output.suffix.lower() != ".png":
        raise InputError(
            f"{_short(output.name)} is not the name of a .png file", f"use {_short(output.stem or 'out')}.png"
        )
    if not output.parent.is_dir():
        raise InputError(f"there is no folder {_short(output.parent)}", "create it first")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{_short(output.parent)} is a folder that cannot be written to", "choose another")
    return output


def save_png(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> Path:
    """Write `image` as PNG and return where: `path`, or `path` with _1, _2, ... added when that is taken.

    `metadata` is kept in the file twice: as A1111's `parameters` text and as JSON that replays the run; its keys are
    those of `GenerateRequest.settings`, with `model`, `recipe`, `dtype` and `version`. Nothing is overwritten. Raises
    `InputError` where the path is wrong and `QruntimeError` where writing fails, and leaves no file behind.
    """
    output = check_output(path)
    info = PngInfo()
    if metadata:
        info.add_text("parameters", parameters_text(metadata))
        info.add_itxt("qruntime", json.dumps(dict(metadata), ensure_ascii=False, allow_nan=False))
    temporary = output.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with _removed_on_failure(temporary):
            with open(temporary, "xb") as file:
                image.save(file, format="PNG", pnginfo=info)
                file.flush()
                os.fsync(file.fileno())
            taken = _claim(output)
            with _removed_on_failure(taken):
                os.replace(temporary, taken)
    except OSError as error:
        reason = error.strerror or error
        raise QruntimeError(f"cannot write {_short(output)}: {reason}", "check the folder and its disk") from None
    return taken


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """The settings as the text AUTOMATIC1111's web UI writes, which most picture browsers show."""
    fields = {
        "Steps": metadata.get("num_inference_steps"),
        "CFG scale": metadata.get("guidance_scale"),
        "Seed": metadata.get("seed"),
        "Size": f"{metadata['width']}x{metadata['height']}" if {"width", "height"} <= metadata.keys() else None,
        "Model": metadata.get("model"),
        "Recipe": metadata.get("recipe"),
        "Dtype": metadata.get("dtype"),
        "Version": f"qruntime {metadata['version']}" if "version" in metadata else None,
    }
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items() if value is not None)
    return f"{metadata.get('prompt', '')}\n{line}"


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a PNG says of its making: `parameters` (text) and `qruntime` (the JSON object), each only where present.

    Raises `InputError` when the file is no PNG, holds neither, or holds what is no JSON object. Control characters of
    the text are replaced: it is meant for a terminal, and anyone may have written it.
    """
    data, name = _read_source(path, DEFAULT_LIMITS.max_bytes)
    with _quiet():
        try:
            with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                chunks = {key: image.info.get(key) for key in ("parameters", "qruntime")}
        except Exception:  # as in load_picture
            raise InputError(f"{name} is not a PNG picture", "give a picture saved by qruntime") from None
    found = {key: str(text) for key, text in chunks.items() if isinstance(text, str)}
    if not found:
        raise InputError(f"{name} holds no settings", "give a picture saved by qruntime")
    if any(len(text) > MAX_METADATA_CHARS for text in found.values()):
        raise InputError(f"{name} holds over {MAX_METADATA_CHARS} characters of settings", "they are not from qruntime")
    result: dict[str, Any] = {}
    if "parameters" in found:
        result["parameters"] = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in found["parameters"])
    if "qruntime" in found:
        try:
            result["qruntime"] = json.loads(found["qruntime"])
        except (ValueError, RecursionError):
            raise InputError(f"{name} holds settings that are not JSON", "they are not from qruntime") from None
        if not isinstance(result["qruntime"], dict):
            raise InputError(f"{name} holds settings that are no JSON object", "they are not from qruntime")
    return result


# How


def _read_source(source: object, max_bytes: int) -> tuple[bytes, str]:
    """The bytes of a file, and what to call it in an error."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source[: max_bytes + 1]), "the picture"
    elif isinstance(source, (str, os.PathLike)):
        name = _short(Path(source).name or source)
        data = _read_file(Path(source), name, max_bytes)
    elif hasattr(source, "read"):
        name = "the picture"
        try:
            data = source.read(max_bytes + 1)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            raise InputError(f"the picture cannot be read: {error}", "pass an open binary file") from None
        if not isinstance(data, bytes):
            raise InputError("the picture's file is open as text", "open it in mode 'rb'")
    else:
        raise InputError(
            f"a source picture is of type {type(source).__name__}", "give a path, bytes, a file or a Pillow picture"
        )
    if len(data) > max_bytes:
        raise InputError(f"{name} is larger than {max_bytes / 1e6:g} MB", "give a smaller file")
    return data, name


def _read_file(path: Path, name: str, max_bytes: int) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait forever
            raise InputError(f"{name} is not a file", "give the path of a picture")
        if status.st_size > max_bytes:
            raise InputError(f"{name} is larger than {max_bytes / 1e6:g} MB", "give a smaller file")
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except FileNotFoundError:
        raise InputError(f"there is no file {name}", "check the path; addresses are not fetched") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(
            f"{name} cannot be read: {getattr(error, 'strerror', None) or error}", "check the path"
        ) from None


def _decode(image: Image.Image, name: str, limits: PictureLimits) -> Image.Image:
    """RGB pixels of an opened picture whose header is checked first."""
    if isinstance(image, ImageFile.ImageFile) and image.format not in OPENED_FORMATS:
        raise InputError(f"{name} is a {image.format} picture", "convert it to RGB before it is passed")
    width, height = image.size
    if not width or not height:
        raise InputError(f"{name} has no pixels", "give a picture of at least one pixel")
    if width * height > limits.max_pixels:
        raise InputError(f"{name} has {width} x {height} pixels", _smaller(limits))
    with _quiet():
        try:
            image.load()
            upright = _turn_upright(image)
            rgb = _to_rgb(upright)
        except InputError:
            raise
        except Exception:  # a decoder meets hostile bytes with whatever it trips over
            raise InputError(f"{name} is damaged or incomplete", "save it again, or give another") from None
    if rgb is image:
        rgb = image.copy()
    rgb.info = {}  # a colour profile or a thumbnail has no place in what we make of it
    return rgb


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        turn = EXIF_TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a broken tag is no broken picture
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in SIXTEEN_BIT_MODES:
        # Pillow would clip at 255; a scanner's 16 bits are worth their upper half.
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    if image.mode not in CONVERTIBLE_MODES:
        raise InputError(f"a source picture has mode {image.mode}", "convert it to RGB before it is passed")
    return image.convert("RGB")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large pictures and odd tags; we judge the former ourselves and take the latter as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _short(name: object) -> str:
    """A path or file name for an error: one line of at most 200 characters, whatever it is called."""
    text = " ".join(str(name).replace("\0", " ").split())
    return text if len(text) <= 200 else "..." + text[-197:]


def _smaller(limits: PictureLimits) -> str:
    return f"give one of at most {limits.max_pixels / 1e6:g} million pixels"


def _nearest_size(size: tuple[int, int], low: int, high: int, factor: int) -> tuple[int, int]:
    """The (width, height) in multiples of `factor` between `low` and `high` that changes aspect, then area, least."""
    scale = max(1.0, low / min(size))
    if max(size) * scale > high:
        scale = high / max(size)
    options = []
    for side in size:
        below = math.floor(side * scale / factor) * factor
        options.append({min(max(option, low), high) for option in (below, below + factor)})

    def cost(candidate: tuple[int, int]) -> tuple[float, float, tuple[int, int]]:
        stretch = math.log(candidate[0] / size[0]) - math.log(candidate[1] / size[1])
        growth = math.log(candidate[0] * candidate[1] / (size[0] * size[1] * scale * scale))
        return round(abs(stretch), 9), abs(growth), candidate  # rounded, so that equal aspects count as equal

    legal = [(w, h) for w, h in product(*options) if max(w, h) <= MAX_ASPECT * min(w, h)]
    return min(legal, key=cost)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 [H, W, 3] of an RGB picture."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def _claim(output: Path) -> Path:
    """The first free name of `output`, `output_1`, ..., taken by creating it: two programs never get the same one."""
    for number in range(MAX_NUMBERED_NAMES):
        candidate = output if number == 0 else output.with_name(f"{output.stem}_{number}{output.suffix}")
        try:
            open(candidate, "xb").close()
        except FileExistsError:
            continue
        return candidate
    raise InputError(f"{MAX_NUMBERED_NAMES} files are named like {_short(output.name)}", "choose another name")


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _quoted(value: object) -> str:
    """A value of the settings line; one that holds the line's own marks is written as a JSON string."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
