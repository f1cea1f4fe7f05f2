"""A torch module into a bundle: trace, translate, pass the gate, write."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from umbel.bundle import Bundle, file_refs, write_bundle
from umbel.errors import CannotCompile, GoldenMismatch, ParityFailed
from umbel.golden import GoldenExamples
from umbel.histograms import Histogram
from umbel.manifest import GOLDEN_FILE, QUANTISED, SIGNATURES, WEIGHTS_FILE, FileRef, Manifest, Precision, TensorSpec
from umbel.runtime import onnx
from umbel.self_check import verify_golden
from umbel.weights import Weights
from umbel_models.adapters import resolved
from umbel_models.backends import Backend, backend
from umbel_models.cache import GraphCache, fingerprint
from umbel_models.histograms import Asked, histogram_of
from umbel_models.onnx.graph import numpy_dtype
from umbel_models.parity import ParityReport, check_parity, to_numpy
from umbel_models.quantising import Quantise, quantise
from umbel_models.signatures import Signature, State, signatures
from umbel_models.spec import ModelSpec
from umbel_models.threads import one_torch_thread
from umbel_models.vetting import own_copy, require_sound, without_fast_path

GOLDEN_COUNT: Final = 8


@dataclass(frozen=True, slots=True)
class Compiled:
    """A bundle that has passed the gate, and how closely."""

    bundle: Bundle
    parity: Mapping[str, ParityReport]
    """By the name of the runtime."""
    from_cache: tuple[str, ...] = ()
    """The runtimes whose graphs were in the cache."""


def compile_model(
    spec: ModelSpec,
    directory: Path,
    runtimes: Sequence[str] = (onnx.NAME,),
    cache: GraphCache | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    quantised: Quantise | None = None,
) -> Compiled:
    """Compile a model into a folder. Equal specs give equal graphs in float32, byte for byte.

    Args:
        spec: what the model is.
        directory: where the bundle goes.
        runtimes: which runtimes it is for, by name; each passes the gate by itself.
        cache: where graphs are looked for, and kept; None makes them anew.
        progress: told what is done next, once, and at most five times for each runtime.
        quantised: what is asked of graphs in fewer bits, which answer where they are faster and accurate enough; the
            manifest tells what was measured on this machine. None asks for none.

    Raises:
        OperatorNotSupported: the module uses an operator that can't be lowered.
        ParityFailed: the graphs don't do what the module does; nothing is written.
        CannotCompile: the spec contradicts itself, its loss or metrics aren't what they should be, or the module can't
            be traced.
    """
    if not runtimes:
        raise CannotCompile(f"{spec.name!r}: no runtime to compile for; name one or more")
    with one_torch_thread(), without_fast_path():
        spec = own_copy(spec)
        require_sound(spec)
        spec = resolved(spec)
        return _compile(spec, directory, [backend(name) for name in runtimes], cache, progress, quantised)


def _compile(
    spec: ModelSpec,
    directory: Path,
    backends: Sequence[Backend],
    cache: GraphCache | None,
    progress: Callable[[str], None],
    quantised: Quantise | None,
) -> Compiled:
    state = State(spec)
    weights = Weights({name: tensor.numpy() for name, tensor in state.weights.items()})
    traced = signatures(spec, state, _tracing_size(spec, state))
    files: dict[str, bytes] = {}
    found = []
    if cache is not None:
        progress("fingerprint")
        key = fingerprint(spec, state, traced)
    for target in backends:
        make = partial(_graphs, target, spec, traced, weights, progress)
        if cache is None:
            graphs, known = make(), False
        else:
            graphs, known = cache.graphs(f"{target.name}-{key}", make)
        files |= graphs
        found += [target.name] if known else []
    golden = golden_of(spec)
    files |= {WEIGHTS_FILE: weights.to_bytes(), GOLDEN_FILE: golden.to_bytes()}
    manifest = manifest_of(spec, state, golden, file_refs(files), backends)
    with tempfile.TemporaryDirectory(prefix="umbel-compile-") as scratch:
        draft = write_bundle(Path(scratch), manifest, files)
        parity = {target.name: _gate(target, spec, draft, progress) for target in backends}
        if quantised is not None:
            for target in backends:
                progress(f"fewer bits on {target.name}")
                precision, narrow = quantise(spec, draft, target.runtime(), quantised)
                manifest, files = _with_precision(manifest, files, target, precision, narrow)
    return Compiled(write_bundle(directory, manifest, files), parity, tuple(found))


def _with_precision(
    manifest: Manifest, files: Mapping[str, bytes], target: Backend, precision: Precision, graph: bytes | None
) -> tuple[Manifest, dict[str, bytes]]:
    graphs, files = dict(manifest.graphs), dict(files)
    if graph is not None:
        name = f"{QUANTISED}.{target.suffix}"
        files[name], graphs[target.name] = graph, {**graphs[target.name], QUANTISED: name}
    told = {**manifest.precision, target.name: precision}
    return replace(manifest, graphs=graphs, files=file_refs(files), precision=told), files


def _graphs(
    target: Backend,
    spec: ModelSpec,
    traced: Sequence[Signature],
    weights: Weights,
    progress: Callable[[str], None],
) -> dict[str, bytes]:
    graphs = {}
    for signature in traced:
        progress(f"{signature.name} for {target.name}")
        graphs[f"{signature.name}.{target.suffix}"] = target.graph(spec, signature, weights)
    return graphs


def _gate(target: Backend, spec: ModelSpec, draft: Bundle, progress: Callable[[str], None]) -> ParityReport:
    progress(f"parity on {target.name}")
    runtime = target.runtime()
    report = check_parity(spec, draft, runtime)
    try:
        verify_golden(runtime, draft)
    except GoldenMismatch as error:
        raise ParityFailed(f"{spec.name!r}: no device would take this bundle, for here already {error}") from error
    return report


def _tracing_size(spec: ModelSpec, state: State) -> int:
    """A batch size that equals no other size, so that no other size is taken for the batch."""
    inputs, targets = spec.batch(2)
    tensors = [*inputs.values(), *targets.values(), *state.weights.values(), *state.constants.values()]
    taken = {int(size) for tensor in tensors for size in tensor.shape}
    return next(size for size in range(7, 10_000) if size not in taken)


def golden_of(spec: ModelSpec) -> GoldenExamples:
    """Torch's own answers: what every runtime has to come to."""
    inputs, _ = spec.batch(min(GOLDEN_COUNT, spec.example_count))
    with torch.no_grad():
        outputs = spec.answers(spec.module.eval()(*inputs.values()))
    return GoldenExamples(to_numpy(inputs), to_numpy(dict(zip(spec.outputs, outputs, strict=True))))


def manifest_of(
    spec: ModelSpec,
    state: State,
    golden: GoldenExamples,
    files: Mapping[str, FileRef],
    backends: Sequence[Backend],
) -> Manifest:
    """What stands in the manifest of a model with graphs for some runtimes, or for none."""
    return Manifest(
        model=spec.name,
        inputs=_batched(spec.inputs),
        targets=_batched(spec.targets),
        outputs=tuple(
            TensorSpec(name, array.dtype.name, (None, *array.shape[1:])) for name, array in golden.outputs.items()
        ),
        trainable=_fixed(state.trainable),
        buffers=_fixed(state.buffers),
        frozen=_fixed(state.frozen),
        slots=_fixed(state.slots),
        hyperparameters=state.hyperparameters,
        metrics=("loss", *spec.metrics, *spec.bins, "examples"),
        histograms=tuple(_histograms(spec, golden)),
        graphs={target.name: {name: f"{name}.{target.suffix}" for name in SIGNATURES} for target in backends},
        files=files,
        labels=spec.labels,
        golden_tolerance=spec.golden_tolerance,
        description=spec.description,
    )


def _histograms(spec: ModelSpec, golden: GoldenExamples) -> Iterator[Histogram]:
    """What is counted, and whether the model's answers are asked for it."""
    inputs, targets = spec.batch(min(GOLDEN_COUNT, spec.example_count))
    for name, counting in spec.histograms.items():
        answers = Asked({output: torch.from_numpy(array) for output, array in golden.outputs.items()})
        counting.values(inputs, answers, targets)
        yield histogram_of(name, counting, answers.any)


def _batched(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, numpy_dtype(tensor.dtype).name, (None, *tensor.shape[1:])) for name, tensor in tensors.items()
    )


def _fixed(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(name, numpy_dtype(tensor.dtype).name, tuple(tensor.shape))
        for name, tensor in sorted(tensors.items())
    )
