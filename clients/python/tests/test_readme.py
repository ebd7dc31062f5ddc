"""The tutorial of README.md: its Python code runs, in one session, against a real server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import PACKAGE, Server

SERVER = "http://127.0.0.1:50051"


def test_the_tutorial_runs(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (PACKAGE / "README.md").read_text()
    blocks = [(m.start(), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", page, re.M | re.S)]
    assert len(blocks) > 10
    assert sum(SERVER in block for _, block in blocks) == 4
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    for start, block in blocks:
        # Errors name the line of the page.
        code = "\n" * page[:start].count("\n") + "\n" + block.replace(SERVER, server.target)
        exec(compile(code, "README.md", "exec"), session)
    said = capsys.readouterr().out
    assert "8 of 8 rows are usable" in said
    assert "models/tiny llama" in said
    assert "training_job.dpo.beta" in said
    assert "adapter_model.safetensors" in said
    assert (tmp_path / "colours-adapter/adapter_config.json").is_file()
