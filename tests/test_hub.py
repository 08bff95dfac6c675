"""From a name to a folder, with a hub made of paper: no test here touches a network."""

from __future__ import annotations

import errno
import inspect
import shutil
import socket
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from qruntime.checkpoint.hub import (
    Sizes,
    is_hub_id,
    is_wanted,
    locate,
    needed_bytes,
    readable_size,
    require_free,
    require_room,
)
from qruntime.errors import InputError, QruntimeError

MODEL = "zai-org/GLM-Image"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOT_FETCHED = (".gitattributes", "README.md")
OFFICIAL_FILES = (
    *NOT_FETCHED,
    "model_index.json",
    *(
        f"processor/{n}"
        for n in ("chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
    ),
    "scheduler/scheduler_config.json",
    *(f"text_encoder/{n}" for n in ("config.json", "model.safetensors")),
    *(f"tokenizer/{n}" for n in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")),
    *(f"transformer/diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    *(f"transformer/{n}" for n in ("config.json", "diffusion_pytorch_model.safetensors.index.json")),
    *(f"vae/{n}" for n in ("config.json", "diffusion_pytorch_model.safetensors")),
    *(f"vision_language_encoder/model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)),
    *(
        f"vision_language_encoder/{n}"
        for n in ("config.json", "generation_config.json", "model.safetensors.index.json")
    ),
)
REQUEST = httpx.Request("GET", "https://huggingface.co/api/models/zai-org/GLM-Image")
REAL_DOWNLOAD, REAL_API = huggingface_hub.snapshot_download, huggingface_hub.HfApi
Usage = namedtuple("Usage", "total used free")


@dataclass
class PaperHub:
    """A hub with one model of the official files, 1 GB each weight file and 1 kB any other, and a cache."""

    cache: Path
    files: dict[str, int | None] = field(
        default_factory=lambda: {name: 10**9 if name.endswith("safetensors") else 1000 for name in OFFICIAL_FILES}
    )
    error: Exception | None = None
    download_error: Exception | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def repository(self) -> Path:
        return self.cache / "models--zai-org--GLM-Image"

    @property
    def snapshot(self) -> Path:
        return self.repository / "snapshots" / COMMIT

    def model_info(self, name: str, *, revision: str | None, files_metadata: bool) -> object:
        assert name == MODEL
        assert files_metadata
        if self.error:
            raise self.error
        siblings: list[dict[str, Any]] = []  # as they stand in the server's answer
        for i, (file, size) in enumerate(self.files.items()):
            siblings.append({"rfilename": file, "size": size, "blobId": f"blob-{i}"})
            if file.endswith("safetensors"):
                siblings[-1]["lfs"] = {"size": size, "sha256": f"sha-{i}", "pointerSize": 134}
        return huggingface_hub.ModelInfo(id=MODEL, sha=COMMIT, siblings=siblings or None)

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.calls.append({"name": name, **options})
        if options["local_files_only"]:
            if not self.snapshot.exists():
                raise errors.LocalEntryNotFoundError("nothing\nis cached")
        elif self.download_error:
            raise self.download_error
        return str(self.snapshot)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperHub]:
    paper = PaperHub(tmp_path / "cache")

    def no_network(*_: object) -> None:
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: paper)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", paper.snapshot_download)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**13, 0, 10**12))
    return paper


def fetched(hub: PaperHub, model: str = MODEL, **options: Any) -> tuple[Path, list[str]]:
    """Where `locate` says the model is, and what it announced."""
    said: list[str] = []
    return locate(model, announce=said.append, cache_dir=hub.cache, **options), said


def test_a_local_folder_is_itself(hub: PaperHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zai-org" / "GLM-Image").mkdir(parents=True)
    for model in (tmp_path, str(tmp_path), MODEL):
        folder, said = fetched(hub, model)
        assert folder == Path(model)
        assert said == []
    assert hub.calls == []


def test_the_hub_is_not_loaded_for_a_local_folder(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from qruntime.checkpoint.hub import locate, needed_bytes; "
        "locate(sys.argv[1], announce=print); needed_bytes(sys.argv[1]); print('huggingface_hub' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_home_is_known(hub: PaperHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "GLM-Image").mkdir()
    assert fetched(hub, "~/GLM-Image") == (tmp_path / "GLM-Image", [])


@pytest.mark.parametrize(
    "model",
    [
        "GLM-Image",
        "./zai-org/GLM-Image",
        "../zai-org/GLM-Image",
        "/zai-org/GLM-Image",
        "~/zai-org/GLM-Image",
        "C:\\zai-org\\GLM-Image",
        "zai-org\\GLM-Image",
        "a/b/c",
        "zai-org/",
        "/GLM-Image",
        "zai-org/..",
        "../GLM-Image",
        "zai-org/GLM--Image",
        "zai-org/GLM..Image",
        "zai-org/GLM Image",
        "zai-org/GLM-Image\n",
        "https://huggingface.co/zai-org/GLM-Image",
        "",
        Path("zai-org/GLM-Image"),
    ],
)
def test_what_is_no_hub_id_must_be_a_folder(hub: PaperHub, model: str | Path) -> None:
    assert not is_hub_id(model)
    if model == "":
        return  # the folder one is in
    with pytest.raises(InputError, match="there is no folder") as refused:
        locate(model, announce=print, cache_dir=hub.cache)
    assert refused.value.tip
    assert hub.calls == []


def test_a_file_is_no_folder(hub: PaperHub, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="is a file"):
        locate(tmp_path / "model_index.json", announce=print)


def test_only_a_checkpoints_files_are_fetched(hub: PaperHub) -> None:
    hub.files.update(
        {
            "model.py": 1,
            "transformer/modeling.py": 1,
            "transformer/pytorch_model.bin": 10**12,
            "vae/model.ckpt": 1,
            "vae/model.pickle": 1,
            "vae/deeper/model.safetensors": 1,
            "assets/picture.png": 1,
            "extra/config.json": 1,
            "model.safetensors": 1,
            "../outside.json": 1,
            "vae/../../outside.json": 1,
            "/etc/config.json": 1,
            "vae/*.json": 1,
            "vae/.hidden.json": 1,
            "tokenizer/spiece.model": 1,
            "tokenizer/vocab.txt": 1,
            "manifest.json": 1,
            "quant_report.json": 1,
        }
    )
    folder, _ = fetched(hub)
    assert folder == hub.snapshot
    (call,) = hub.calls
    added = ["tokenizer/spiece.model", "tokenizer/vocab.txt", "manifest.json", "quant_report.json"]
    assert sorted(call["allow_patterns"]) == sorted([*(set(OFFICIAL_FILES) - set(NOT_FETCHED)), *added])
    assert call["name"] == MODEL
    assert call["cache_dir"] == hub.cache
    assert call["revision"] is None
    assert not call["local_files_only"]


def test_every_official_file_that_matters_is_wanted() -> None:
    assert {name for name in OFFICIAL_FILES if not is_wanted(name)} == set(NOT_FETCHED)
    assert is_wanted("processor/processor_config.json")


def test_size_and_place_are_told_before_the_download(hub: PaperHub) -> None:
    hub.download_error = ConnectionError("cut")
    said: list[str] = []
    with pytest.raises(QruntimeError):
        locate(MODEL, announce=said.append, cache_dir=hub.cache)
    assert said == [f"fetching {MODEL}: 9.0 GB of 9.0 GB, into {hub.cache}"]


def test_what_the_cache_has_is_not_counted(hub: PaperHub) -> None:
    """By the name of the blob, whatever snapshot it came with, or by the file itself, where the cache has no links."""
    weights = [i for i, name in enumerate(OFFICIAL_FILES) if name.endswith("safetensors")]
    (hub.repository / "blobs").mkdir(parents=True)
    (hub.repository / "blobs" / f"sha-{weights[0]}").touch()
    (hub.repository / "blobs" / f"sha-{weights[1]}.incomplete").touch()
    (hub.snapshot / "vae").mkdir(parents=True)
    (hub.snapshot / "vae" / "diffusion_pytorch_model.safetensors").touch()
    _, said = fetched(hub)
    assert said == [f"fetching {MODEL}: 7.0 GB of 9.0 GB, into {hub.cache}"]
    total = sum(size for name, size in hub.files.items() if name not in NOT_FETCHED)
    assert needed_bytes(MODEL, cache_dir=hub.cache) == Sizes(total, total - 2 * 10**9)


def test_a_whole_cache_is_used_in_silence(hub: PaperHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    for name in OFFICIAL_FILES:
        (hub.snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.snapshot / name).touch()
    assert fetched(hub) == (hub.snapshot, [])


def test_a_revision_is_handed_on(hub: PaperHub) -> None:
    fetched(hub, revision="refs/pr/1")
    assert hub.calls[0]["revision"] == "refs/pr/1"


def test_a_full_disk_is_told_before_the_first_byte(hub: PaperHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(10**12, 10**12, 8 * 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(InputError, match=r"needs 9\.0 GB in .*, where 8\.0 GB are free") as refused:
        fetched(hub)
    assert refused.value.tip
    assert hub.calls == []
    assert asked == [hub.cache.parent]  # the nearest folder that exists: the cache itself is not made yet


def test_needed_bytes_fetches_nothing(hub: PaperHub) -> None:
    sizes = needed_bytes(MODEL, cache_dir=hub.cache)
    assert sizes.missing_bytes == sizes.total_bytes > 9 * 10**9
    assert hub.calls == []
    assert not hub.cache.exists()


def test_needed_bytes_of_a_folder(hub: PaperHub, tmp_path: Path) -> None:
    for name, size in (
        ("model_index.json", 10),
        ("vae/config.json", 100),
        ("vae/a.bin", 1000),
        ("notes/a.json", 10000),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "vae" / "folder.json").mkdir()
    assert needed_bytes(tmp_path) == Sizes(110, 0)


OFFLINE = [
    httpx.ConnectError("[Errno -2] Name or service not known", request=REQUEST),
    httpx.ReadTimeout("timed out", request=REQUEST),
    ConnectionError("refused"),
    errors.OfflineModeIsEnabled("offline mode is enabled"),
    errors.HfHubHTTPError("502 Bad Gateway\nand more", response=httpx.Response(502, request=REQUEST)),
]


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
def test_without_a_hub_the_cache_is_used(hub: PaperHub, error: Exception) -> None:
    hub.error = error
    (hub.snapshot / "vae").mkdir(parents=True)
    (hub.snapshot / "vae" / "config.json").write_bytes(bytes(5))
    folder, said = fetched(hub)
    assert folder == hub.snapshot
    assert said == [f"the hub cannot be reached: using {MODEL} as it was last fetched"]
    assert [call["local_files_only"] for call in hub.calls] == [True]
    assert needed_bytes(MODEL, cache_dir=hub.cache) == Sizes(5, 0)


def test_the_library_itself_finds_what_was_fetched(hub: PaperHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's real function, asked for its cache only, over a cache as the library lays it out."""
    hub.error = OFFLINE[0]
    (hub.repository / "refs").mkdir(parents=True)
    (hub.repository / "refs" / "main").write_text(COMMIT)
    hub.snapshot.mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", REAL_DOWNLOAD)
    assert fetched(hub)[0] == hub.snapshot
    shutil.rmtree(hub.repository)
    with pytest.raises(QruntimeError, match="could not be fetched: ConnectError"):
        fetched(hub)


def test_the_library_has_the_options_that_are_used(hub: PaperHub) -> None:
    fetched(hub)
    (call,) = hub.calls
    assert call.keys() - {"name"} <= inspect.signature(REAL_DOWNLOAD).parameters.keys()
    assert {"revision", "files_metadata"} <= inspect.signature(REAL_API.model_info).parameters.keys()


@pytest.mark.parametrize("error", OFFLINE, ids=lambda error: type(error).__name__)
def test_without_a_hub_and_a_cache(hub: PaperHub, error: Exception) -> None:
    hub.error = error
    with pytest.raises(QruntimeError, match=f"{MODEL} could not be fetched: {type(error).__name__}") as refused:
        fetched(hub)
    assert not isinstance(refused.value, InputError)
    assert "connection" in refused.value.tip
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (errors.GatedRepoError("x", response=httpx.Response(403, request=REQUEST)), "accepted its terms"),
        (errors.RepositoryNotFoundError("x", response=httpx.Response(404, request=REQUEST)), "neither a folder here"),
        (errors.RevisionNotFoundError("x", response=httpx.Response(404, request=REQUEST)), "no revision v9"),
        (errors.HFValidationError("x"), "is no name"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_user_got_wrong(hub: PaperHub, error: Exception, complaint: str) -> None:
    """Told as it is, even when an older copy lies in the cache."""
    hub.error = error
    hub.snapshot.mkdir(parents=True)
    with pytest.raises(InputError, match=complaint) as refused:
        fetched(hub, revision="v9")
    assert refused.value.exit_code == 2
    assert refused.value.tip
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), f"the disk was full before {MODEL} was fetched"),
        (httpx.ReadError("cut off", request=REQUEST), "could not be fetched: ReadError: cut off"),
        (RuntimeError("Data processing error:\nhash"), "could not be fetched: RuntimeError: Data processing error:"),
        (OSError(), "could not be fetched: OSError"),
    ],
)
def test_a_download_that_breaks_off(hub: PaperHub, error: Exception, complaint: str) -> None:
    hub.download_error = error
    with pytest.raises(QruntimeError, match=complaint) as refused:
        fetched(hub)
    assert refused.value.exit_code == 1
    assert refused.value.message.endswith(complaint[-7:])
    assert str(refused.value).isprintable()


def test_an_interrupt_is_not_swallowed(hub: PaperHub) -> None:
    hub.download_error = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        fetched(hub)


def test_another_model_is_not_fetched(hub: PaperHub) -> None:
    for files in ({"config.json": 10, "model.safetensors": 10**9}, {}):
        hub.files = files
        with pytest.raises(InputError, match=r"has no model_index\.json"):
            fetched(hub)
    assert hub.calls == []


def test_files_of_unknown_size_count_nothing(hub: PaperHub) -> None:
    """The hub's library may leave a size out."""
    hub.files = {"model_index.json": 10, "vae/config.json": None}
    assert needed_bytes(MODEL, cache_dir=hub.cache) == Sizes(10, 10)


def test_the_cache_is_the_librarys_own(hub: PaperHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    locate(MODEL, announce=lambda _: None)
    assert hub.calls[0]["cache_dir"] == hub.cache


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0.0 MB"), (35_800_000_000, "35.8 GB"), (10**9, "1.0 GB"), (999_900_000, "999.9 MB")]
)
def test_sizes_read_well(size_bytes: int, text: str) -> None:
    assert readable_size(size_bytes) == text


def test_room_is_enough_when_it_is_just_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 5, 5))
    require_free(tmp_path / "to" / "be", 5, "this")
    with pytest.raises(InputError, match=r"this needs 0\.0 MB"):
        require_free(tmp_path / "to" / "be", 6, "this")


@pytest.mark.parametrize(("free", "fits"), [(14 * 10**9, True), (13 * 10**9, False)])
def test_a_conversion_that_would_not_fit_is_refused_before_its_download(
    hub: PaperHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, fits: bool
) -> None:
    """Download and half of it again, on one disk: nine weight files of 1 GB."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.cache))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
    if fits:
        require_room(MODEL, tmp_path / "out", 0.5)
    else:
        with pytest.raises(InputError, match="the download and its conversion needs"):
            require_room(MODEL, tmp_path / "out", 0.5)
    require_room(tmp_path, tmp_path / "out", 1e9)  # a local folder is not downloaded
    assert not [call for call in hub.calls if "cache_dir" in call]
