"""Translated graphs, kept by what they are made from, so that a model that hasn't changed compiles in no time.

Tracing a gradient and taking it apart is most of a compilation. A fingerprint needs only the forward pass: it is the
digest of what the module, the loss and the metrics do (their traced operators with all settings, shapes and
constants), of the optimiser's own trace, of the names in the graph, and of the versions and sources that translate.
Whatever the cache gives still has to pass the parity gate.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.numpy
import torch
from numpy import frombuffer, uint8
from torch import fx

from umbel.digests import Digest, digest_of, verify_digest
from umbel.errors import DigestMismatch, NotFound
from umbel.home import in_home
from umbel.version import VERSION
from umbel_models.accumulation import COUNT
from umbel_models.lowering import trace
from umbel_models.signatures import Named, Signature, State, training_pass
from umbel_models.spec import ModelSpec

KEEP: Final = 256
"""How many models' graphs are kept; those that weren't asked for the longest go first."""
DIGEST_CHARS: Final = 64
"""At the head of each file, of all that follows."""
_PART: Final = ".part"
_LONGEST_WRITE: Final = 3600.0
_TRACED: Final = {"module", "loss", "inputs", "targets", "metrics", "histograms", "count", "trainable", "optimizer"}
"""Fields of a spec that are known by their traces, shapes or names."""
_NO_PART: Final = {"labels", "calibration", "golden_tolerance", "description"}
"""Fields of a spec that are no part of any graph."""


def _last_asked_for(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process made room
        return 0.0


@dataclass(frozen=True, slots=True)
class GraphCache:
    """A folder of translated graphs. Any number of processes may share it: what is there is whole."""

    directory: Path

    @classmethod
    def default(cls) -> GraphCache | None:
        """The user's own, under `$XDG_CACHE_HOME` or `~/.cache`; None for a user without a home."""
        try:
            return cls(in_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "umbel" / "graphs")
        except NotFound:
            return None

    def graphs(self, key: str, make: Callable[[], Mapping[str, bytes]]) -> tuple[dict[str, bytes], bool]:
        """The graphs by file name under this key, made if they aren't there; and whether they were.

        A cache that can't be read or written is as good as none.
        """
        path = self.directory / f"{key}.safetensors"
        try:
            content = path.read_bytes()
            # Cut off by a lost power, or rotten: as good as not there.
            verify_digest(content[DIGEST_CHARS:], Digest(content[:DIGEST_CHARS].decode()))
            stored = safetensors.numpy.load(content[DIGEST_CHARS:])
            os.utime(path)
        except (OSError, ValueError, DigestMismatch, safetensors.SafetensorError):
            made = dict(make())
            self._store(path, made)
            return made, False
        return {name: array.tobytes() for name, array in stored.items()}, True

    def _store(self, path: Path, files: Mapping[str, bytes]) -> None:
        data = safetensors.numpy.save({name: frombuffer(content, uint8) for name, content in files.items()})
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(_PART, dir=self.directory)
            part = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(digest_of(data).encode() + data)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            self._make_room(path.stat().st_mtime)
        except OSError:
            return

    def _make_room(self, now: float) -> None:
        stored = sorted(self.directory.glob("*.safetensors"), key=_last_asked_for)
        # What was being written an hour ago was left by a process that was killed.
        left = [part for part in self.directory.glob(f"*{_PART}") if _last_asked_for(part) < now - _LONGEST_WRITE]
        for old in (*stored[:-KEEP], *left):
            old.unlink(missing_ok=True)


def fingerprint(spec: ModelSpec, state: State, traced: tuple[Signature, ...]) -> str:
    """What a model's graphs hang on, for whatever runtime, as a digest.

    Args:
        spec: as `umbel_models.adapters.resolved` gave it.
        state: its tensors.
        traced: its signatures.

    Raises:
        CannotCompile: the module can't be traced.
    """
    digest = hashlib.sha256(f"{_translator()}\n".encode())
    for field in dataclasses.fields(spec):
        if field.name not in _TRACED | _NO_PART:
            digest.update(f"{field.name}={getattr(spec, field.name)!r}\n".encode())
    for signature in traced:
        digest.update(_interface(signature).encode())
    evaluate = next(signature for signature in traced if signature.name == "evaluate")
    batch = int(evaluate.inputs[next(iter(spec.inputs))].shape[0])
    for signature, training in ((evaluate, False), (training_pass(spec, state, batch), True)):
        spec.module.train(training)
        digest.update("\n".join(_lines(trace(signature, spec.module, {}).graph)).encode())
    for shape in sorted({tuple(tensor.shape) for tensor in state.trainable.values()}):
        step = trace(_one_step(spec, state, shape), spec.module, {})
        digest.update("\n".join((f"step {shape}", *_lines(step.graph))).encode())
    return digest.hexdigest()


@cache
def _translator() -> str:
    """Versions and sources that a graph hangs on beside the model."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    parts = [
        f"umbel {VERSION}",
        f"torch {torch.__version__}",
        digest_of(b"".join(file.read_bytes() for file in sources)),
    ]
    for package in ("onnx", "ai-edge-litert", "flatbuffers"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _interface(signature: Signature) -> str:
    sizes = [(name, tuple(t.shape), str(t.dtype), name in signature.batched) for name, t in signature.inputs.items()]
    return f"{signature.name} {sizes} {sorted(signature.weights)}\n"


def _one_step(spec: ModelSpec, state: State, shape: tuple[int, ...]) -> Signature:
    """The optimiser on one weight of this shape."""
    optimizer = spec.optimizer
    inputs = {name: torch.zeros(shape) for name in ("weight", "gradient", *optimizer.slots)}
    inputs |= {f"scalar {name}": torch.zeros(()) for name in optimizer.scalars}
    inputs |= {name: torch.ones(()) for name in (*state.hyperparameters, COUNT)}

    def step(named: Named) -> Named:
        scalars = optimizer.advance({name: named[f"scalar {name}"] for name in optimizer.scalars}, named)
        slots = {name: named[name] for name in optimizer.slots}
        factor = optimizer.factor(named)
        gradient = named["gradient"] if factor is None else named["gradient"] * factor
        weight, changed = optimizer.update(named["weight"], gradient, slots, scalars, named)
        return {"weight": weight, **changed, **{f"scalar {name}": value for name, value in scalars.items()}}

    return Signature("step", step, inputs, frozenset(), frozenset())


def _lines(graph: fx.GraphModule) -> Iterator[str]:
    """A traced graph as text: all that it does, and on which shapes."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        shape = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else str(value)
        content = ""
        if node.op == "get_attr":
            constant: Any = graph
            for part in str(node.target).split("."):
                constant = getattr(constant, part)
            content = digest_of(constant.detach().contiguous().numpy().tobytes())
        yield f"{node.name} {node.op} {node.target} {node.args} {node.kwargs} {shape} {content}"
