"""What every translator of a lowered graph needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from umbel.errors import OperatorNotSupported
from umbel_models.lowering import Lowered, module_of, require_no_write_through

_CHANCE: Final = "dropout, or noise that is given as an input"
_COMPARED: Final = "a sum of comparisons with each bound"
_EVERYWHERE: Final = "torch.where over the whole tensor"
INSTEAD: Final = {
    "_fft_r2c": "a product with a fixed matrix",
    "_local_scalar_dense": "tensors throughout, without .item()",
    "_unique2": _EVERYWHERE,
    "bucketize": _COMPARED,
    "cumprod": "the exp of a cumsum of logarithms",
    "grid_sampler_2d": "F.interpolate, or a product with a fixed matrix",
    "index": "an embedding, or index_select along one dimension",
    "index_put": "an embedding, or index_select along one dimension",
    "logcumsumexp": "the log of a cumsum of exps",
    "masked_select": _EVERYWHERE,
    "median": "the median along a dimension",
    "mode": "torch.sort, and comparisons of neighbours",
    "multinomial": _CHANCE,
    "nonzero": _EVERYWHERE,
    "normal": _CHANCE,
    "randint": _CHANCE,
    "searchsorted": _COMPARED,
}
"""Operator -> what does in its place."""
_ANYTHING: Final = "operators of docs/reference/what-compiles.md, or give what it comes to as an input"


Handler = Callable[..., Any]
"""(writer, node, *args, **kwargs) -> what stands for the node's value in a writer's graph, or a list of such."""


def registering(handlers: dict[Any, Handler]) -> Callable[..., Callable[[Handler], Handler]]:
    """A decorator that takes ATen operators, and puts what translates them into a runtime's table."""

    def translates(*targets: Any) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            handlers.update(dict.fromkeys(targets, handler))
            return handler

        return register

    return translates


def handler_of(node: fx.Node, handlers: Mapping[Any, Handler]) -> Handler | None:
    """What translates a node, or the pure form of one that writes into its first argument."""
    return handlers.get(node.target) or handlers.get(not_in_place(node.target))


def translated(
    lowered: Lowered, writer: Any, node: fx.Node, handlers: Mapping[Any, Handler], to: str = "", hint: str = ""
) -> Any:
    """What a call becomes in a writer's graph.

    Args:
        lowered: what the node is of.
        writer: of a runtime.
        node: a call of an ATen operator.
        handlers: the runtime's.
        to: where to, for messages.
        hint: what to do where there is no such operator, beside using others.

    Raises:
        OperatorNotSupported: the operator, or the way in which it is used, has no translation.
    """
    handler, name = handler_of(node, handlers), lowered.signature.name
    if handler is None:
        raise OperatorNotSupported(
            f"{name!r}: no translation{to} for {node.target} {module_of(node)}; "
            f"write that part with {instead_of(node)}{hint}"
        )
    try:
        if writes_in_place(node):
            require_no_write_through(node)
        return handler(writer, node, *node.args, **node.kwargs)
    except (TypeError, OperatorNotSupported) as error:
        raise OperatorNotSupported(
            f"{name!r}: {node.target} {module_of(node)} is used in a way that has no translation{to}: "
            f"{in_words(error, node)}"
        ) from error


def instead_of(node: fx.Node) -> str:
    """What an author may use in place of an operator that has no translation."""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    return INSTEAD.get(name, _ANYTHING)


def in_words(error: Exception, node: fx.Node) -> str:
    """Why a translator didn't take a node, and what to use instead: its own refusals say so themselves."""
    return str(error) if isinstance(error, OperatorNotSupported) else f"{error}; write it with {instead_of(node)}"


def not_in_place(target: Any) -> Any:
    """The pure form of an operator that writes into its first argument: `add_` becomes `add`."""
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    if not name.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, None)


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node writes into its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def meeting_dtype(node: fx.Node, *operands: Any) -> torch.dtype:
    """The dtype in which operands meet: the result's, unless that only says yes or no; 2.5 turns whole numbers into
    floating ones there too."""
    dtype: torch.dtype = node.meta["val"].dtype
    if dtype != torch.bool:
        return dtype
    values = [value.meta["val"] if isinstance(value, fx.Node) else value for value in operands]
    return torch.result_type(*(0 if isinstance(value, torch.SymInt) else value for value in values))


def attribute_of(graph: fx.GraphModule, path: str) -> np.ndarray[Any, Any]:
    """A constant that the trace holds."""
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return np.asarray(value.detach().numpy())


_VIEWS: Final = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.alias.default,
)
"""Operators that only say the shape anew."""


def unviewed(node: fx.Node) -> tuple[fx.Node, bool]:
    """What a view is a view of, through all others, and whether that has the view's own shape."""
    shape, found = _sizes(node), _source(node)
    while _sizes(found) != shape:
        if found.target not in _VIEWS:
            return found, False
        found = _source(found)
    return found, True


def dropped(view: fx.Node, source: fx.Node) -> list[int] | None:
    """The dimensions that a view drops, if they are those of a sum that nothing else hangs on."""
    if source.target is not torch.ops.aten.sum.dim_IntList or len(source.users) != 1:
        return None
    summed: Any = source.args[1]
    sizes = _sizes(source)
    axes = sorted(dim % len(sizes) for dim in summed)
    left = [size for dim, size in enumerate(sizes) if dim not in axes]
    return axes if axes and left == _sizes(view) else None


def _source(node: fx.Node) -> fx.Node:
    source: Any = node.args[0]
    found: fx.Node = source
    return found


def _sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape]
