"""Writing into a part of a tensor, `x[:, 0] = y` or `x[:, 0] += y`, as what can stand in a graph: the whole tensor, put
together anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PURE: Final[dict[Any, Callable[..., Tensor]]] = {
    Tensor.add_: torch.add,
    Tensor.clamp_: torch.clamp,
    Tensor.copy_: lambda x, source, non_blocking=False: source.expand(x.shape),
    Tensor.div_: torch.div,
    Tensor.fill_: torch.full_like,
    Tensor.masked_fill_: torch.masked_fill,
    Tensor.mul_: torch.mul,
    Tensor.sub_: torch.sub,
    Tensor.zero_: torch.zeros_like,
}
"""What writes into its first argument -> what gives the same anew. `x[...] += y` is one, then an assignment."""


class Parts:
    """What was cut out of tensors by `x[...]`, and what has been written there since."""

    def __init__(self) -> None:
        self._cut: dict[int, tuple[Tensor, Tensor, Any]] = {}
        """By identity: the part (held, so that no other gets its identity), the tensor it is of, and where it is."""
        self._now: dict[int, Tensor] = {}
        """By identity: what a tensor holds now that was written into."""
        self._kept: list[Tensor] = []

    def current(self, args: Any) -> Any:
        """Arguments, with what parts hold now."""
        return pytree.tree_map(lambda arg: self._now.get(id(arg), arg), args) if self._now else args

    def cut(self, x: Tensor, key: Any) -> Tensor:
        """`Tensor.__getitem__`."""
        part: Tensor = self.current(x)[key]
        if part._is_view():
            self._cut[id(part)] = part, x, key
        return part

    def put(self, x: Tensor, key: Any, value: Any) -> None:
        """`Tensor.__setitem__` by places, slices and a mask; whatever else is left to torch."""
        _, of, at = self._cut.get(id(value), (None, None, None))
        if of is x and at is key:
            return  # the second half of `x[...] += y`: it is there already
        held = self.current(x)
        new = _assigned(held, key if isinstance(key, tuple) else (key,), value)
        if new is None:
            held[key] = value
        elif not self.write(x, lambda: new):
            if held.requires_grad or new.requires_grad:
                # Autograd may need what was there.
                self._kept.append(x)
                self._now[id(x)] = new
            else:
                held.copy_(new)
            self._show(x)

    def _show(self, x: Tensor) -> None:
        """Let whatever was cut out of a tensor hold what is there now."""
        for part, of, key in list(self._cut.values()):
            if of is x:
                self._now[id(part)] = self.current(x)[key]
                self._show(part)

    def write(self, part: Tensor, made: Callable[[], Tensor]) -> bool:
        """Let a part hold something else, and what it was cut out of too; False if it is no part."""
        if id(part) not in self._cut:
            return False
        _, of, key = self._cut[id(part)]
        new = made().to(part.dtype)
        self.put(of, key, new)
        self._now[id(part)] = new
        self._cut[id(new)] = new, of, key
        return True


def _assigned(x: Tensor, keys: tuple[Any, ...], value: Any) -> Tensor | None:
    """The tensor with the value at these places; None for places that aren't told by numbers alone."""
    if len(keys) == 1 and isinstance(keys[0], Tensor) and keys[0].dtype == torch.bool:
        return _where(x, keys[0], value)
    if any(isinstance(key, Tensor) for key in keys) and all(_whole(key) or _by_number(key) for key in keys):
        index = [None if _whole(key) else key for key in keys]
        return torch.ops.aten.index_put(x, index, torch.as_tensor(value, dtype=x.dtype))  # type: ignore[no-any-return]
    places = _places(x, keys)
    if places is None:
        return None
    given = torch.as_tensor(value, dtype=x.dtype).expand(x[keys].shape)
    sizes = [len(places[dim]) if dim in places else size for dim, size in enumerate(x.shape)]
    return _joined(x, sorted(places.items()), given.reshape(sizes))


def _whole(key: Any) -> bool:
    return isinstance(key, slice) and key in (slice(None), slice(0, None))


def _by_number(key: Any) -> bool:
    return isinstance(key, Tensor) and not key.is_floating_point() and key.dtype != torch.bool


def _where(x: Tensor, mask: Tensor, value: Any) -> Tensor | None:
    """A mask over the first dimensions, and a value that is the same wherever it says yes."""
    given, rest = torch.as_tensor(value, dtype=x.dtype), x.dim() - mask.dim()
    if given.dim() > rest:
        return None
    return torch.where(mask.reshape([*mask.shape, *[1] * rest]), given, x)


def _places(x: Tensor, keys: tuple[Any, ...]) -> dict[int, range] | None:
    """Which places along each dimension of which not all are written."""
    if not all(key is ... or (isinstance(key, (int, slice)) and not isinstance(key, bool)) for key in keys):
        return None
    named = [key for key in keys if key is not ...]
    if len(named) < len(keys):
        at = keys.index(...)
        named[at:at] = [slice(None)] * (x.dim() - len(named))
    found = {}
    for dim, key in enumerate(named):
        if _whole(key):
            continue
        size = x.shape[dim]
        if not isinstance(size, int):
            return None
        chosen = range(size)[key] if isinstance(key, slice) else range(size)[key : key + 1 or None]
        if not chosen:
            return None
        if chosen != range(size):
            found[dim] = chosen
    return found


def _joined(x: Tensor, places: list[tuple[int, range]], part: Tensor) -> Tensor:
    """A tensor with a part at these places, one dimension after the other."""
    if not places:
        return part
    (dim, chosen), *others = places
    size, start, end = int(x.shape[dim]), chosen.start, chosen.stop
    if chosen.step == 1:
        middle = _joined(x.narrow(dim, start, end - start), others, part)
        around = [x.narrow(dim, 0, start), middle, x.narrow(dim, end, size - end)]
        return torch.cat([piece for piece in around if piece.shape[dim]], dim)
    order = [size + chosen.index(at) if at in chosen else at for at in range(size)]
    picked = _joined(torch.index_select(x, dim, torch.tensor([*chosen])), others, part)
    return torch.index_select(torch.cat([x, picked], dim), dim, torch.tensor(order))
