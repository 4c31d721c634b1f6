"""Triton's interpreter, faster: it replaces the language's functions at every call of a function within a kernel, which
is most of the time of small kernels. Within a kernel, once is enough. Its sort reduces element by element in Python;
numpy's takes its place."""

from __future__ import annotations

import os


def patch_once() -> None:
    """Lets a kernel replace the functions of each module of the language once. Another version of Triton, which has not
    these names, stays as it is."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter

        original, kind = interpreter._patch_lang, interpreter._LangPatchScope
        language = (interpreter.tl, interpreter.tl.core)
    except (ImportError, AttributeError):
        return
    replaced: set[int] = set()
    running: list[object] = []
    # id of a module's names -> the names, and the ids of the language's modules among them.
    known: dict[int, tuple[object, set[int]]] = {}

    class Outermost(kind):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            running.clear()
            replaced.clear()
            super().restore()

    def patch(function: object) -> object:
        names = function.__globals__  # type: ignore[attr-defined]
        if id(names) not in known:
            found = {id(value) for value in names.values() if any(value is each for each in language)}
            known[id(names)] = (names, found)
        seen = known[id(names)][1]
        if running and seen <= replaced:
            return kind()
        scope = original(function)
        replaced.update(seen)
        if not running:
            outer = Outermost()
            outer._changes = scope._changes
            running.append(outer)
            return outer
        return scope

    interpreter._patch_lang = patch
    interpreter.tl.sort = _sort


def _sort(x: object, dim: int | None = None, descending: bool = False) -> object:
    from triton.runtime import interpreter

    values = interpreter.np.sort(x.handle.data, axis=-1)  # type: ignore[attr-defined]
    assert not descending and dim in (None, len(values.shape) - 1)
    handle = interpreter.TensorHandle(values, x.handle.dtype)  # type: ignore[attr-defined]
    return interpreter.tl.core.tensor(handle, x.type)  # type: ignore[attr-defined]
