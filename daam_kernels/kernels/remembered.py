"""Results that are worked out once and held, as many as have a place, until what they were made of changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])
_CACHES: list[Any] = []


def remembered(most: int, typed: bool = False) -> Callable[[_Function], _Function]:
    """Of a function of hashable arguments, the ``most`` latest results; ``typed``: 1, 1.0 and True are not the same."""

    def of(function: _Function) -> _Function:
        held = lru_cache(most, typed)(function)
        _CACHES.append(held)
        return held

    return of


def forget_launches() -> None:
    """The next calls work out their launches anew."""
    for cache in _CACHES:
        cache.cache_clear()
