"""docs/own_adapters.md, typed as it stands: its commands run, and print what it shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers_commands import ENVIRONMENT, ROOT, repository_copy

PAGE = (ROOT / "docs" / "own_adapters.md").read_text("utf-8")
BLOCKS = re.findall(r"```(bash|text)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path):
    """Who follows a page whose third command fails, or prints something else, goes elsewhere."""
    repository_copy(tmp_path)
    here = Path(sys.executable).parent
    environment = ENVIRONMENT | {"PATH": f"{here}:{os.environ['PATH']}", "PYTHONPATH": ""}
    printed = None
    seen = 0
    for language, text in BLOCKS:
        if language == "text":
            assert printed == text
            seen += 1
            continue
        line = ["bash", "-e", "-c", text]
        done = subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, (text, done.stderr)
        printed = done.stdout
    assert seen == 3
    for name in ("mixed", "mixed-8"):
        assert (tmp_path / name / "adapter_config.json").exists()
    assert (tmp_path / "merged" / "config.json").exists()
    assert (tmp_path / "my-pool" / "gates" / "meteora_top2.safetensors").exists()
