"""Which characters are written without spaces between words."""

from __future__ import annotations

import re

_HAN = r"\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = r"\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
HAN, KANA = re.compile(f"[{_HAN}]"), re.compile(f"[{_KANA}]")
CJK = re.compile(f"[{_HAN}{_KANA}]")
"""Chinese and Japanese. Korean has spaces."""
