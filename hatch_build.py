"""Build hook: compile `protos/umbel/*/*.proto`, so that generated code is never committed and never stale.

Runs for wheels and for `pip install -e .` alike; `python hatch_build.py` (or `make protos`) does it by hand after an
edit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def compile_protos(root: Path) -> None:
    """Write `*_pb2.py`, `*_pb2_grpc.py` and their stubs beside each proto under `root`/protos/umbel."""
    import grpc_tools
    from grpc_tools import protoc

    source = root / "protos"
    protos = [str(path) for path in sorted((source / "umbel").glob("*/*.proto"))]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    # Run by hand, outside an activated environment, protoc finds its plugins beside the interpreter.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    outputs = [f"--{kind}_out={source}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    code = protoc.main(["protoc", f"-I{source}", f"-I{well_known}", *outputs, *protos])
    if code != 0:
        raise SystemExit(f"protoc failed with exit code {code}; its own message stands above")


class ProtoBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compile the protos before files are collected."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Hatch calls this for every target but the sdist, which carries the protos alone."""
        del version, build_data
        if self.target_name != "sdist":
            compile_protos(Path(self.root))


if __name__ == "__main__":
    compile_protos(Path(__file__).resolve().parent)
    sys.stdout.write("compiled protos/umbel/*/*.proto\n")
