"""A signature as a flat ATen graph of forward-style operators, whose only open size is the batch.

`torch.export` can't trace `torch.func.grad`; `make_fx` can. Its inputs are made fake by hand, so that the batch is a
symbol and every other size is a number. A batch size that gets pinned while tracing would be silent, so it is
looked for afterwards.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.distributions import Distribution
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import transformer

from umbel.errors import CannotCompile, OperatorNotSupported, UmbelError
from umbel_models.rewrites import Rewrites
from umbel_models.signatures import Signature
from umbel_models.vetting import innermost

_SIZES: Final = (1, 2, 3, 5, 8, 16, 33, 64, 100, 256, 1000, 4097, 1 << 20)
"""Batches for which a trace has to hold."""
_MANY_LAYERS: Final = 32
"""Modules from which on torch's cache of fake tensors pays: where few layers repeat, its entries cost more."""

Decompositions = Mapping[Any, Callable[..., Any]]
"""ATen operator -> the same in simpler ones."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A traced signature."""

    signature: Signature
    graph: fx.GraphModule
    outputs: tuple[str, ...]
    sizes: ShapeEnv
    each: Lowered | None = None
    """What is done before for each example; see `Signature.each`."""

    def require_open_batch(self, stage: str) -> None:
        """Raise `CannotCompile` if the batch size became a number."""
        pinned = {str(s): int(v) for s, v in self.sizes.replacements.items() if v.is_number}
        if pinned:
            raise CannotCompile(
                f"{self.signature.name!r}: {stage} fixed the batch size to {sorted(pinned.values())}; the module reads "
                "it as a number somewhere (int(x.shape[0]), a Python loop over examples): use tensor operations"
            )
        for condition in {guard.expr for guard in self.sizes.guards}:
            symbols = condition.free_symbols
            other = [size for size in _SIZES if not bool(condition.subs(dict.fromkeys(symbols, size)))]
            if other:
                raise CannotCompile(
                    f"{self.signature.name!r}: {stage} took one way of several that hang on the batch's size, a "
                    f"wrong one for a batch of {other[0]} ({condition}): use tensor operations that do for any"
                )

    def require_batch_of_outputs(self) -> None:
        """Raise `CannotCompile` unless each answer of `infer` has one row for each example, and no other open size."""
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        for name, value in zip(self.outputs, output.args[0], strict=True):
            shape = value.meta["val"].shape if isinstance(value, fx.Node) else ()
            if shape and [isinstance(size, torch.SymInt) for size in shape] != [True, *[False] * (len(shape) - 1)]:
                raise CannotCompile(
                    f"{self.signature.name!r}: output {name!r} has sizes {[str(size) for size in shape]}; the first "
                    "one, and no other, must be the batch's"
                )

    def require_own_tensors(self) -> None:
        """Raise `CannotCompile` if a tensor came into the trace by another way than as an input or a constant."""
        for node in self.graph.graph.nodes:
            value = attrgetter(str(node.target))(self.graph) if node.op == "get_attr" else None
            if isinstance(value, nn.Parameter) and value.requires_grad:
                raise CannotCompile(
                    f"{self.signature.name!r}: a weight of shape {list(value.shape)} is read that isn't one of the "
                    f"module's own {module_of(node)}; it would never be trained. Register it (nn.ParameterList), let "
                    "the module return what the loss needs of its weights, or say requires_grad_(False) of a constant"
                )
            if isinstance(value, FakeTensor):
                raise CannotCompile(
                    f"{self.signature.name!r}: a tensor of an earlier call is read {module_of(node)}; keep it in a "
                    "buffer"
                )


def _as_it_was_said(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Whether a mask is causal."""
    del mask, size
    return bool(is_causal)


@contextmanager
def _tracing(fake: FakeTensorMode) -> Iterator[None]:
    """Everything that must hold while tracing."""
    with ExitStack() as stack:
        stack.enter_context(fake)
        # Without the Python dispatcher C++ composites (linear, lstm, padding) read sizes and pin the batch.
        stack.enter_context(enable_python_dispatcher())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        # It asks for batches of 16 or more.
        stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        # Modules that ask (`torch.compiler.is_exporting`) leave out what hangs on the numbers of a tensor.
        stack.enter_context(_compiling_state_context())
        stack.callback(Distribution.set_default_validate_args, Distribution._validate_args)
        Distribution.set_default_validate_args(False)
        # Stacks of layers would ask whether a mask is the causal one; it is added to the scores in any case.
        stack.callback(setattr, transformer, "_detect_is_causal_mask", transformer._detect_is_causal_mask)
        transformer._detect_is_causal_mask = _as_it_was_said
        yield


def _fake_input(fake: FakeTensorMode, tensor: Tensor, batched: bool) -> Tensor:
    sizes = [DimDynamic.DUCK if batched and i == 0 else DimDynamic.STATIC for i in range(tensor.dim())]
    return fake.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


@contextmanager
def _noting_modules(module: nn.Module) -> Iterator[None]:
    """Let each node of the trace remember the path of the module whose forward made it."""
    open_notes: list[AbstractContextManager[None]] = []
    handles = []

    def enter(path: str) -> Any:
        def hook(*_: Any) -> None:
            note = traceback.annotate({"module": path})
            note.__enter__()
            open_notes.append(note)

        return hook

    def leave(*_: Any) -> None:
        open_notes.pop().__exit__(None, None, None)

    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(enter(path), prepend=True))
        handles.append(child.register_forward_hook(leave))
    try:
        with traceback.preserve_node_meta():
            yield
    finally:
        for handle in handles:
            handle.remove()
        while open_notes:  # a forward raised
            leave()


_READS_VALUES: Final = (
    "the module asks what number a tensor holds (an if on it, int(...), .item(), a selection by a mask); "
    "use torch.where"
)


_KNOWN: Final = {
    "setup_context": "an autograd.Function keeps what it needs in its forward; do that in a setup_context",
    "saved tensor hooks": "gradients are worked out by checkpoints; switch that off for the compiler",
}
"""Part of what torch says -> what it means here."""


def _where(module: nn.Module, error: Exception) -> str:
    """The innermost module that failed, for messages."""
    path = innermost(module, error)
    return "" if path is None else f" (in module {path!r})" if path else " (in the module's own forward)"


_FORWARD: Final = {"index_put": "index", "scatter": "max", "scatter_add": "gather"}
"""Operators that are the gradients of others, where the name doesn't say so."""


def module_of(node: fx.Node) -> str:
    """Where in the module a node comes from, for messages; of a gradient, the modules that use what it is of."""
    path = node.meta.get("custom", {}).get("module")
    if path is not None:
        return f"(in module {path!r})" if path else "(in the module's own forward)"
    name = _name_of(node).removesuffix("_backward").removeprefix("_unsafe_")
    name = _FORWARD.get(name, name)
    notes = [n.meta.get("custom", {}) for n in node.graph.nodes if name in _name_of(n)]
    found = [note["module"] for note in notes if "module" in note]
    if not name or not found:
        return "(in the loss, a gradient or the optimiser)"
    return f"(the gradient of {name} in module {', '.join(map(repr, dict.fromkeys(found)))})"


def _name_of(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))


def require_no_write_through(node: fx.Node) -> None:
    """Raise `OperatorNotSupported` for a write into a tensor of which a part, or which as a part of another, is read
    again: no graph can say that."""
    part: Any = node.args[0]
    if any(_is_view(view) and any(node < user for user in view.users) for view in part.users if view < node):
        raise OperatorNotSupported("writing into a tensor of which a part is read again; cut it out after that")
    while isinstance(part, fx.Node) and _is_view(part):
        part = part.args[0]
        if any(node < user for user in part.users):
            raise OperatorNotSupported("writing into a part of a tensor; join parts by torch.cat, or use torch.where")


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def lower(signature: Signature, module: nn.Module, table: Decompositions, kept: Collection[Any] = ()) -> Lowered:
    """Trace a signature of this module down to operators that a translator knows.

    Args:
        signature: what to trace.
        module: whose parts messages name.
        table: the decompositions that a runtime wants.
        kept: backward operators that its translator knows.

    Raises:
        OperatorNotSupported: an operator of the module, or its gradient, has no decomposition here.
        CannotCompile: the module can't be traced, or its batch size got pinned.
    """
    lowered = trace(signature, module, table)
    _require_forward_style(lowered, kept)
    lowered.graph.graph.eliminate_dead_code()
    each = None if signature.each is None else lower(signature.each, module, table, kept)
    return replace(lowered, each=each)


def trace(signature: Signature, module: nn.Module, table: Decompositions) -> Lowered:
    """Trace a signature with these decompositions, whatever operators are left; otherwise as `lower`."""
    sizes = ShapeEnv()
    fake = FakeTensorMode(shape_env=sizes, allow_non_fake_inputs=True)
    fake.cache_enabled = sum(1 for _ in module.modules()) >= _MANY_LAYERS
    names = list(signature.inputs)
    examples = [_fake_input(fake, t, name in signature.batched) for name, t in signature.inputs.items()]
    outputs: list[str] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        with Rewrites():
            named = signature.function(dict(zip(names, tensors, strict=True)))
        outputs[:] = named
        return tuple(named.values())

    logging.getLogger("torch.fx.experimental.symbolic_shapes").setLevel(logging.ERROR)
    try:
        with _tracing(fake), _noting_modules(module):
            graph = make_fx(flat, decomposition_table=dict(table))(*examples)
    except UmbelError as error:
        raise type(error)(f"{signature.name!r}: {error}{_where(module, error)}") from error
    except DataDependentOutputException as error:
        raise CannotCompile(f"{signature.name!r}: {_READS_VALUES}{_where(module, error)}") from error
    except Exception as error:  # torch raises anything at all from inside a user's module
        known = [instead for words, instead in _KNOWN.items() if words in str(error)]
        what = known[0] if known else f"{type(error).__name__}: {error}"
        what = _READS_VALUES if isinstance(error, GuardOnDataDependentSymNode) else what
        raise CannotCompile(f"{signature.name!r}: tracing failed: {what}{_where(module, error)}") from error
    lowered = Lowered(signature, graph, tuple(outputs), sizes)
    lowered.require_open_batch("tracing")
    lowered.require_own_tensors()
    if signature.name == "infer":
        lowered.require_batch_of_outputs()
    return lowered


def _require_forward_style(lowered: Lowered, kept: Collection[Any]) -> None:
    nodes = [node for node in lowered.graph.graph.nodes if node.op == "call_function"]
    left = {str(n.target): module_of(n) for n in nodes if n.target not in kept and "backward" in str(n.target)}
    if left:
        raise OperatorNotSupported(
            f"{lowered.signature.name!r}: no decomposition for {', '.join(map(' '.join, sorted(left.items())))}; "
            "replace the layer that needs it, or freeze its inputs"
        )
