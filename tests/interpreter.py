"""Triton's interpreter, in about half the time, with the same results.

Most of what it takes is no arithmetic: at every call of a device function it goes through all of
`triton.language` for functions to replace, which are replaced already; for every tuple it makes the
type, which hardly anything reads; for every operation it makes a table of all dtypes.
"""

from __future__ import annotations

import inspect
from functools import cache, wraps
from types import ModuleType

import numpy
import triton
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Replace what takes long, in the Triton that this was written for; others run as they are."""
    if not triton.__version__.startswith("3.6."):
        return
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    tl.core.tuple.__init__ = _init_tuple
    tl.core.tuple.type = property(_type_of_tuple, _set_type_of_tuple)


def _once_a_launch(patch_lang):
    # Triton 3.5 takes nothing back at all.
    nothing_to_take_back = getattr(interpreter, "_LangPatchScope", lambda: None)

    @cache
    def languages(function) -> list[ModuleType]:
        modules = filter(inspect.ismodule, function.__globals__.values())
        return [module for module in modules if module in (tl, tl.core)]

    @wraps(patch_lang)
    def patched(function):
        if any(tl.core.is_builtin(language.load) for language in languages(function)):
            return patch_lang(function)
        return nothing_to_take_back()

    return patched


def _remembered(np_dtype):
    known: dict[str, numpy.dtype] = {}

    @wraps(np_dtype)
    def remembered(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = np_dtype(dtype)
        return known[name]

    return remembered


def _init_tuple(self, args, type=None) -> None:
    self.values = list(args)
    self._type = type


def _type_of_tuple(self):
    if self._type is None:
        self._type = tl.core._type_for_tuple_values(self.values)
    elif not isinstance(self._type, tl.core.tuple_type):
        self._type = tl.core.tuple_type(self._type)
    return self._type


def _set_type_of_tuple(self, type) -> None:
    self._type = type
