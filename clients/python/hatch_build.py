"""Generates the protobuf and gRPC modules from the proto files while a wheel is built.

They go to src/bradley/v1, with type stubs whose docstrings are the comments of the proto files.
The proto files are those of the repository, or the copy in the sdist.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "bradley/v1"


class GenerateStubs(BuildHookInterface):  # type: ignore[misc]
    """The build hook of pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generates the modules, for wheels and editable installations."""
        if self.target_name == "wheel":
            generate(Path(self.root))


def generate(root: Path) -> None:
    """Generates the modules into src/bradley/v1 of the package at `root`."""
    protos = proto_folder(root)
    files = sorted(str(path.relative_to(protos)) for path in (protos / PACKAGE).glob("*.proto"))
    with tempfile.TemporaryDirectory() as out:
        outputs = ["python", "grpc_python", "mypy", "mypy_grpc"]
        command = [
            sys.executable,
            "-m",
            "grpc_tools.protoc",
            f"-I{protos}",
            *(f"--{name}_out={out}" for name in outputs),
            *files,
        ]
        # protoc finds the plugins of mypy-protobuf in PATH. The build environment need not be
        # active.
        scripts = sysconfig.get_path("scripts")
        environment = {**os.environ, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"protoc failed for {protos}:\n{done.stderr}")
        target = root / "src" / PACKAGE
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(Path(out) / PACKAGE, target)
        (target / "__init__.py").write_text('"""Generated from proto/bradley/v1."""\n')


def proto_folder(root: Path) -> Path:
    """Returns the folder of the proto files: the sdist's copy, or the repository's."""
    for folder in (root / "proto", root.parent.parent / "proto"):
        if (folder / PACKAGE).is_dir():
            return folder
    raise RuntimeError(f"no proto files: build in the repository or from an sdist, not in {root}")


if __name__ == "__main__":
    # Generates the modules for mypy and for tests of the source tree.
    generate(Path(__file__).resolve().parent)
