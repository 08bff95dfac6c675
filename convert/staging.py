"""Where a conversion grows until it is whole: a folder `OUT.partial` beside the folder it will become.

OUT itself appears by one rename, so nobody ever sees half a checkpoint under that name. What may be lying around when
a conversion starts, because an earlier one was killed, is put in order here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qruntime.checkpoint.manifest import MANIFEST
from qruntime.errors import InputError

from .journal import FILE_NAME, Journal


def partial_folder(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _replaced_folder(out: Path) -> Path:
    """Where an OUT that is being replaced stands between two renames."""
    return out.with_name(out.name + ".replaced-by-conversion")


def occupied_folders(out: Path) -> tuple[Path, ...]:
    """Every folder that a conversion into `out` may make, rename or remove."""
    return out, partial_folder(out), _replaced_folder(out)


def check_out(out: Path, overwrite: bool) -> None:
    """Raise `InputError` unless nothing is there, or something that a conversion may replace."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise InputError(f"{out} exists", "choose another name, or add --overwrite")
    is_folder = out.is_dir() and not out.is_symlink()
    if not is_folder or (any(out.iterdir()) and not _is_checkpoint(out)):
        raise InputError(f"{out} is not a checkpoint, so it is not overwritten", "choose another name, or remove it")


def _is_checkpoint(folder: Path) -> bool:
    return (folder / "model_index.json").exists()


class Staging:
    """The open `OUT.partial`: `folder`, and its `journal`, which no other process can open meanwhile."""

    def __init__(self, out: Path, journal: Journal, *, overwrite: bool, worth_keeping: bool) -> None:
        self.out = out
        self.folder = partial_folder(out)
        self.journal = journal
        self.worth_keeping = worth_keeping
        """Whether there is something in it that a later run would otherwise have to do again."""
        self._overwrite = overwrite

    def publish(self) -> None:
        """Make it OUT, in place of an older one if that was allowed. Nothing can be resumed any more."""
        check_out(self.out, self._overwrite)
        replaces = self.out.exists()
        path = self.folder / FILE_NAME
        with contextlib.suppress(PermissionError):  # Windows removes no open file; elsewhere it must go while locked
            path.unlink()
        self.journal.close()
        path.unlink(missing_ok=True)
        if replaces:
            self.out.rename(_replaced_folder(self.out))
        self.folder.rename(self.out)
        if replaces:
            shutil.rmtree(_replaced_folder(self.out))


@contextlib.contextmanager
def staging(out: Path, *, resume: bool, overwrite: bool) -> Iterator[Staging]:
    """Open the staging folder of `out`; unless published, it is removed again when it holds nothing worth keeping.

    Raises `InputError` when OUT or a left-over of it is in the way, or another process is converting into it.
    """
    folder = partial_folder(out)
    if os.path.lexists(folder) and not _is_staging(folder):
        raise InputError(f"{folder} is in the way: it is not what a conversion left", "rename it or remove it")
    left_over = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}", "choose another place for OUT") from None
    journal = _lock(folder, out)
    opened = Staging(out, journal, overwrite=overwrite, worth_keeping=left_over)
    try:
        _undo_half_a_replacement(out)
        check_out(out, overwrite)
        if left_over and not (resume or overwrite):
            raise InputError(
                f"{folder} is left over from a conversion that did not finish",
                "add --resume to go on with it, or --overwrite to start again",
            )
        if left_over and not resume:
            journal.clear()
            _empty(folder)
            opened.worth_keeping = False
        yield opened
    finally:
        journal.close()
        if not opened.worth_keeping and folder.exists():
            shutil.rmtree(folder)


def _lock(folder: Path, out: Path) -> Journal:
    busy = InputError(f"another process is converting into {out}", "wait for it, or choose another name")
    try:
        journal = Journal(folder / FILE_NAME)
    except (BlockingIOError, FileNotFoundError):  # the other one has it, or has just renamed the folder
        raise busy from None
    if not journal.in_place:
        journal.close()
        raise busy
    return journal


def _is_staging(folder: Path) -> bool:
    """Whether a conversion made this folder: its journal is the first thing in it and is replaced by the manifest."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or FILE_NAME in names or MANIFEST in names


def _undo_half_a_replacement(out: Path) -> None:
    """A process killed while it replaced OUT left the older one under another name: put it back, or remove it."""
    replaced = _replaced_folder(out)
    if not _is_checkpoint(replaced):
        return
    if out.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(out)


def _empty(folder: Path) -> None:
    """Remove everything but the journal, which is locked."""
    for path in folder.iterdir():
        if path.name == FILE_NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
