"""Runtimes by name; each is imported only when somebody asks for it."""

from __future__ import annotations

from umbel.errors import NotFound
from umbel.runtime import Runtime


def runtime_named(name: str, threads: int = 1) -> Runtime:
    """The runtime that goes by this name in manifests: "onnx" or "litert".

    Raises:
        NotFound: no runtime goes by that name, or its package isn't installed.
        OutOfBounds: no thread.
    """
    if name == "onnx":
        from umbel.runtime.onnx import OnnxRuntime

        return OnnxRuntime(threads)
    if name != "litert":
        raise NotFound(f"no runtime goes by {name!r}; known are onnx and litert")
    try:
        from umbel.runtime.litert import LiteRTRuntime
    except ModuleNotFoundError as missing:
        raise NotFound(f"runtime 'litert' needs {missing.name}: pip install 'umbel[litert]'") from missing
    return LiteRTRuntime(threads)
