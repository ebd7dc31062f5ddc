"""Writes the files of a download."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import BinaryIO

from bradley.errors import protocol_error
from bradley.v1 import checkpoint_pb2

_UNFINISHED = ".part"


class FileWriter:
    """Writes the files of a download, one after the other, within a `with` block.

    A file has its name only once it is complete.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file: BinaryIO | None = None
        self._path, self._missing = folder, 0
        self.paths: list[Path] = []

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        # Only the file of a download that failed is still open.
        if self._file is not None:
            self._file.close()
            _unfinished(self._path).unlink(missing_ok=True)

    def take(self, part: checkpoint_pb2.DownloadCheckpointResponse) -> None:
        """Takes the next part: the name of a file, or its next bytes."""
        if part.WhichOneof("part") == "file":
            self.finish()
            self._path = _inside(self._folder, part.file.path)
            self._missing = part.file.size_bytes
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _unfinished(self._path).open("wb")
        elif self._file is None:
            raise protocol_error("a download began without the name of a file")
        else:
            self._file.write(part.chunk)
            self._missing -= len(part.chunk)

    def finish(self) -> list[Path]:
        """Completes the last file. Returns the paths of all files."""
        if self._file is not None:
            if self._missing != 0:
                raise protocol_error(f"{self._path.name} has not the size that the server named")
            self._file.close()
            self._file = None
            _unfinished(self._path).replace(self._path)
            self.paths.append(self._path)
        return self.paths


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + _UNFINISHED)


def _inside(folder: Path, name: str) -> Path:
    """Returns the path of a downloaded file, which must lie in the folder or one below it."""
    parts = PurePosixPath(name).parts
    safe = all(not p.startswith(".") and "\\" not in p and ":" not in p for p in parts)
    if not 1 <= len(parts) <= 2 or not safe or name.startswith("/"):
        raise protocol_error(f"the file name {name!r} is not allowed")
    return folder / name
