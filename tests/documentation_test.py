"""The Python of the documentation runs as it stands."""

import re
from pathlib import Path

import pytest

import hydra_jax

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if BLOCK.search(path.read_text())
]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, smollm2, monkeypatch, tmp_path):
    """One block after another, with the names of those before it; the model is loaded once for all pages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hydra_jax, "load", lambda name: smollm2)
    names: dict = {}
    for number, block in enumerate(BLOCK.findall(page.read_text("utf-8")), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
