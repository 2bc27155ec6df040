"""How deep JSON may be nested here: less than the strictest parser that it meets on its way still reads (200)."""

from __future__ import annotations

from typing import Any

MAX_DEPTH = 100


def is_too_deep(value: Any, *, allowed: int = MAX_DEPTH) -> bool:
    """Whether objects and lists stand in each other more than `allowed` deep."""
    if not isinstance(value, dict | list | tuple):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return not allowed or any(is_too_deep(part, allowed=allowed - 1) for part in inner)
