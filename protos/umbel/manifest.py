"""What a bundle holds: one manifest per version, whose digest names the whole bundle.

A bundle is a manifest and the files it lists by content: the graphs (the same for every version of an
architecture), the weights and the golden examples (new with each version). A device that holds the graphs already
fetches only what changed.

Graph tensors go by role: `p_…` trainable weights, `b_…` buffers that training moves (running statistics), `f_…`
frozen weights, `s_…` optimiser slots, then the model's own inputs (`x`), targets (`y`), the example mask `w` where a
runtime needs a fixed batch, and scalar hyper-parameters (`lr`, …). Signatures:

* `infer`:    p, b, f, inputs                           -> outputs
* `evaluate`: p, b, f, inputs, targets                  -> metrics, as sums over the batch
* `train`:    p, b, f, s, inputs, targets, scalars      -> p, b, s, loss

A fourth one, `infer_quantised`, is `infer` in fewer bits; `precision` says for which runtimes there is one, and why.

What `train` gives back is named `next_…` after what it replaces (`next_p_…`), as a graph may not use a name twice.
Slots start at zero. Those named `s_anchor_…` are the exception: `s_anchor_w` holds the value of `p_w` that training
started from and is never given back; FedProx's proximal term pulls towards it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

from umbel import fields
from umbel.digests import Digest, digest_of, parse_digest
from umbel.errors import BundleInvalid, MalformedMessage
from umbel.histograms import Histogram

FORMAT: Final = 1
WEIGHTS_FILE: Final = "weights.safetensors"
GOLDEN_FILE: Final = "golden.safetensors"
ANCHOR_PREFIX: Final = "s_anchor_"
NEXT_PREFIX: Final = "next_"
ACCUMULATE: Final = "accumulate"
"""The scalar input of `train`, where a model has it, that says how many batches make one step of the optimiser."""
SIGNATURES: Final = ("infer", "evaluate", "train")
QUANTISED: Final = "infer_quantised"
"""The signature that some bundles have beside those."""
FLOAT32: Final = "float32"
MAX_MANIFEST_BYTES: Final = 4 << 20
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tabs and line ends."""
DTYPES: Final = ("float32", "float16", "int32", "int64", "uint8", "bool")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor: its dtype and shape; a `None` in the shape is the batch."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @property
    def fixed_shape(self) -> tuple[int, ...]:
        """The shape of a tensor without a batch dimension.

        Raises:
            BundleInvalid: there is a batch dimension.
        """
        sizes = tuple(size for size in self.shape if size is not None)
        if len(sizes) != len(self.shape):
            raise BundleInvalid(f"tensor {self.name!r} may not depend on the batch, its shape is {self.shape}")
        return sizes


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of a bundle, by content."""

    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Precision:
    """What a runtime answers in, as the compiler measured it."""

    kind: str
    """"float32", or that of the `infer_quantised` graph: "int8", "float16"."""
    reason: str
    """Why, in words: how much faster and how much less accurate, or what was against it."""
    tolerance: float = 0.0
    """How far the quantised graph's answers may be off, relative to the largest number of an output."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of one version of one model: what it takes, gives, and is made of."""

    model: str
    inputs: tuple[TensorSpec, ...]
    targets: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    trainable: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    frozen: tuple[TensorSpec, ...]
    slots: tuple[TensorSpec, ...]
    hyperparameters: Mapping[str, float]
    """Scalar inputs of `train`, with the values used where a plan names none."""
    metrics: tuple[str, ...]
    """Outputs of `evaluate`, each a sum over the batch; the first is the loss, `examples` is the count."""
    graphs: Mapping[str, Mapping[str, str]]
    """Runtime name -> signature -> file name."""
    files: Mapping[str, FileRef]
    labels: tuple[str, ...] = ()
    """Class names, for models that answer with one score per class."""
    golden_tolerance: float = 1e-4
    """Largest difference of an output on golden examples that counts as the same answer, relative to that output's
    largest number, or to 1 where that is less."""
    description: str = ""
    precision: Mapping[str, Precision] = field(default_factory=dict)
    """By runtime; empty where nobody asked for fewer bits."""
    histograms: tuple[Histogram, ...] = ()
    """Which of the metrics are the bins of histograms, and where their edges lie."""
    format: int = field(default=FORMAT)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """What devices and coordinator exchange: trainable weights and buffers, name -> shape, sorted."""
        specs = sorted((*self.trainable, *self.buffers), key=lambda spec: spec.name)
        return {spec.name: spec.fixed_shape for spec in specs}

    @property
    def shared_numbers(self) -> int:
        """How many numbers a delta has."""
        return sum(math.prod(shape) for shape in self.shared_shapes.values())

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """All that stands in the weights file: what is shared, and what is frozen."""
        frozen = {spec.name: spec.fixed_shape for spec in self.frozen}
        return dict(sorted((self.shared_shapes | frozen).items()))

    @property
    def common_files(self) -> dict[str, FileRef]:
        """The files that every machine needs, whatever it runs graphs with."""
        bound = {file for graphs in self.graphs.values() for file in graphs.values()}
        return {name: ref for name, ref in self.files.items() if name not in bound}

    def files_for(self, runtime: str) -> dict[str, FileRef]:
        """The files that a machine with one runtime needs: the common ones and that runtime's graphs.

        Raises:
            BundleInvalid: the bundle has no graphs for this runtime.
        """
        if runtime not in self.graphs:
            raise BundleInvalid(f"the bundle has graphs for {sorted(self.graphs)}, this machine runs {runtime!r}")
        wanted = {*self.common_files, *self.graphs[runtime].values()}
        return {name: ref for name, ref in self.files.items() if name in wanted}

    @property
    def digest(self) -> Digest:
        """The name of the bundle."""
        return digest_of(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Canonical JSON (sorted keys, no blanks, UTF-8): equal manifests have equal bytes."""
        tree = _to_tree(self)
        return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            MalformedMessage: not JSON of a manifest's form.
            BundleInvalid: a manifest of a newer format, or one that contradicts itself.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise MalformedMessage(f"a manifest of {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}")
        return _read(data)


@lru_cache(maxsize=8)
def _read(data: bytes) -> Manifest:
    # The same few manifests are read again and again: thrice on a visit that trains, at each check-in of a deployment.
    try:
        tree = json.loads(data)
        if tree["format"] != FORMAT:
            raise BundleInvalid(f"manifest format {tree['format']} is not known here; update umbel")
        return _from_tree(tree)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise MalformedMessage(f"not a manifest: {type(error).__name__}: {error}") from error


_SPEC_FIELDS: Final = ("inputs", "targets", "outputs", "trainable", "buffers", "frozen", "slots")


def _to_tree(manifest: Manifest) -> dict[str, Any]:
    tree: dict[str, Any] = {
        name: [[spec.name, spec.dtype, list(spec.shape)] for spec in getattr(manifest, name)] for name in _SPEC_FIELDS
    }
    tree |= {
        "format": manifest.format,
        "model": manifest.model,
        "hyperparameters": dict(manifest.hyperparameters),
        "metrics": list(manifest.metrics),
        "graphs": {runtime: dict(files) for runtime, files in manifest.graphs.items()},
        "files": {name: [ref.digest, ref.size] for name, ref in manifest.files.items()},
        "labels": list(manifest.labels),
        "golden_tolerance": manifest.golden_tolerance,
        "description": manifest.description,
    }
    if manifest.precision:  # absent, not empty: bundles without it keep their names
        tree["precision"] = {
            runtime: [one.kind, one.reason, one.tolerance] for runtime, one in manifest.precision.items()
        }
    if manifest.histograms:  # likewise
        tree["histograms"] = [[one.name, list(one.edges), one.of_answers] for one in manifest.histograms]
    return tree


def _from_tree(tree: dict[str, Any]) -> Manifest:
    specs = {name: tuple(_spec(*entry) for entry in tree[name]) for name in _SPEC_FIELDS}
    return Manifest(
        model=_text(tree["model"]),
        hyperparameters={_text(name): float(value) for name, value in tree["hyperparameters"].items()},
        metrics=tuple(_text(name) for name in tree["metrics"]),
        graphs={
            _text(runtime): {_text(signature): _text(file) for signature, file in files.items()}
            for runtime, files in tree["graphs"].items()
        },
        files={
            _text(name): FileRef(parse_digest(_text(digest)), _size(size))
            for name, (digest, size) in tree["files"].items()
        },
        labels=tuple(_text(label) for label in tree["labels"]),
        golden_tolerance=float(tree["golden_tolerance"]),
        description=_text(tree["description"]),
        precision={
            _text(runtime): Precision(_text(kind), _text(reason), float(tolerance))
            for runtime, (kind, reason, tolerance) in tree.get("precision", {}).items()
        },
        histograms=tuple(
            Histogram(_text(name), tuple(float(edge) for edge in edges), _flag(of_answers))
            for name, edges, of_answers in tree.get("histograms", [])
        ),
        inputs=specs["inputs"],
        targets=specs["targets"],
        outputs=specs["outputs"],
        trainable=specs["trainable"],
        buffers=specs["buffers"],
        frozen=specs["frozen"],
        slots=specs["slots"],
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r:.80}")
    value.encode()  # a lone surrogate, which JSON can spell, could not be written again
    if _CONTROL.search(value):
        raise ValueError(f"control characters, which could rewrite a terminal or a log, in {value!r:.80}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"expected true or false, got {value!r:.80}")
    return value


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"expected a size, got {value!r:.80}")
    return value


def _spec(name: object, dtype: object, shape: list[object]) -> TensorSpec:
    sizes = tuple(None if size is None else _size(size) for size in shape)
    return TensorSpec(_text(name), _text(dtype), sizes)


def _check(manifest: Manifest) -> None:
    names = [spec.name for name in _SPEC_FIELDS for spec in getattr(manifest, name)]
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise BundleInvalid(f"tensor names must be unique, these are not: {repeated[:20]}")
    for spec in (spec for name in _SPEC_FIELDS for spec in getattr(manifest, name)):
        if spec.dtype not in DTYPES:
            raise BundleInvalid(f"tensor {spec.name!r} has dtype {spec.dtype!r}; known are {', '.join(DTYPES)}")
    for prefix, role in (("p_", "trainable"), ("b_", "buffers"), ("f_", "frozen"), ("s_", "slots")):
        for spec in getattr(manifest, role):
            if not spec.name.startswith(prefix):
                raise BundleInvalid(f"{role} tensor {spec.name!r} must start with {prefix!r}")
            _ = spec.fixed_shape
    _check_numbers(manifest)
    for required in (WEIGHTS_FILE, GOLDEN_FILE):
        if required not in manifest.files:
            raise BundleInvalid(f"the bundle lists no {required}")
    for name in manifest.files:
        if not fields.is_name(name):
            raise BundleInvalid(
                f"{name[:80]!r} is not a plain file name: letters, digits, '.', '_' and '-', at most 100"
            )
    if len({name.lower() for name in manifest.files}) < len(manifest.files):
        raise BundleInvalid("two files differ only in upper and lower case, which not every machine can tell apart")
    _check_precision(manifest)
    _check_histograms(manifest)
    for runtime, files in manifest.graphs.items():
        for signature, file in files.items():
            if signature not in (*SIGNATURES, QUANTISED):
                raise BundleInvalid(f"{runtime} has an unknown signature {signature!r}")
            if file not in manifest.files:
                raise BundleInvalid(f"{runtime} {signature} stands in {file!r}, which the bundle doesn't list")


def _check_precision(manifest: Manifest) -> None:
    for runtime, one in manifest.precision.items():
        if (one.kind != FLOAT32) != (QUANTISED in manifest.graphs.get(runtime, {})):
            raise BundleInvalid(f"{runtime!r} is said to answer in {one.kind}, and its graphs say otherwise")
        if not math.isfinite(one.tolerance) or one.tolerance < 0:
            raise BundleInvalid(f"the tolerance of {one.kind} on {runtime!r} is {one.tolerance}; it must be 0 or more")
    for runtime, files in manifest.graphs.items():
        if QUANTISED in files and runtime not in manifest.precision:
            raise BundleInvalid(f"{runtime!r} has a graph in fewer bits, and nothing says how far it may be off")


def _check_histograms(manifest: Manifest) -> None:
    bins = [name for histogram in manifest.histograms for name in histogram.bins]
    missing = sorted(set(bins) - set(manifest.metrics))
    if missing or len(set(bins)) < len(bins):
        raise BundleInvalid(f"histograms must have different names, and each bin is a metric; not so: {missing[:20]}")


def _check_numbers(manifest: Manifest) -> None:
    for spec in (*manifest.inputs, *manifest.targets, *manifest.outputs):
        if not spec.shape or spec.shape[0] is not None or None in spec.shape[1:]:
            raise BundleInvalid(f"tensor {spec.name!r} has shape {spec.shape}; the batch comes first, and only there")
    weights = {spec.name: spec.shape for spec in manifest.trainable}
    for spec in (*manifest.trainable, *manifest.buffers, *manifest.frozen, *manifest.slots):
        if spec.dtype != "float32":
            raise BundleInvalid(f"tensor {spec.name!r} is {spec.dtype}; weights and slots are float32")
        if spec.name.startswith(ANCHOR_PREFIX):
            anchored = "p_" + spec.name.removeprefix(ANCHOR_PREFIX)
            if weights.get(anchored) != spec.shape:
                raise BundleInvalid(f"slot {spec.name!r} anchors {anchored!r}, which has another shape or isn't there")
    for name, value in manifest.hyperparameters.items():
        if not math.isfinite(value):
            raise BundleInvalid(f"hyper-parameter {name!r} is {value}; it must be finite")
    if not math.isfinite(manifest.golden_tolerance) or manifest.golden_tolerance < 0:
        raise BundleInvalid(f"golden_tolerance is {manifest.golden_tolerance}; it must be a number that isn't negative")
    if not manifest.metrics or "examples" not in manifest.metrics:
        raise BundleInvalid("metrics must begin with the loss and contain 'examples', the count")
