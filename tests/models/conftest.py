from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("gguf") else ["test_gguf.py"]
