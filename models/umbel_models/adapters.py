"""A choice of weights worked out for one module: which names are trained, and adapters put where LoRA wants them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from umbel.errors import CannotCompile
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head, LoRA, Named, every_weight
from umbel_models.vetting import copied

ADAPTER_SEED = 0
"""Fixed, so that equal specs give equal bundles."""


class Adapted(nn.Module):
    """A dense layer with its frozen weights and a low-rank adapter beside them."""

    def __init__(self, layer: nn.Linear, lora: LoRA, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        reach = 1.0 / math.sqrt(layer.in_features)
        first = torch.empty(lora.rank, layer.in_features).uniform_(-reach, reach, generator=generator)
        self.lora_a = nn.Parameter(first)
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, lora.rank))
        self.scale = lora.scale
        self.merged = False
        """Whether to answer with one matrix, which a runtime that folds constants then works out once per version."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's answer [..., out] to [..., in], with the adapter's added."""
        if self.merged:
            return F.linear(x, self.weight + self.scale * (self.lora_b @ self.lora_a), self.bias)
        # The scale goes on the small matrix, so that a runtime can add the second product to the first in one pass.
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_a), self.scale * self.lora_b)


def merge_adapters(module: nn.Module, merged: bool) -> None:
    """Let all adapters in a module answer with one matrix, or with two small ones beside the frozen one."""
    for part in module.modules():
        if isinstance(part, Adapted):
            part.merged = merged


def resolved(spec: ModelSpec) -> ModelSpec:
    """A spec whose choice of weights is a function of names; with LoRA, of a copy of the module that has adapters.

    Raises:
        CannotCompile: nothing goes by a name that was chosen, or a target of LoRA isn't a plain dense layer.
    """
    if isinstance(spec.trainable, Head):
        return replace(spec, trainable=_named(spec, Named((_last_layer(spec),))))
    if isinstance(spec.trainable, LoRA):
        return _with_adapters(spec, spec.trainable)
    if isinstance(spec.trainable, Named):
        return replace(spec, trainable=_named(spec, spec.trainable))
    if spec.trainable is every_weight:
        frozen = {name for name, weight in spec.module.named_parameters() if not weight.requires_grad}
        return replace(spec, trainable=lambda name: name not in frozen) if frozen else spec
    return spec


def _named(spec: ModelSpec, chosen: Named) -> Callable[[str], bool]:
    """Which weights are chosen; one that is tied may be chosen by any of its names."""
    names = [name for name, _ in spec.module.named_parameters(remove_duplicate=False)]
    for pattern in chosen.patterns:
        if not any(map(Named((pattern,)), names)):
            raise CannotCompile(f"{spec.name!r}: no weight goes by {pattern!r}; there are {', '.join(names)}")
    trained = {id(weight) for name, weight in spec.module.named_parameters(remove_duplicate=False) if chosen(name)}
    return {name for name, weight in spec.module.named_parameters() if id(weight) in trained}.__contains__


def _last_layer(spec: ModelSpec) -> str:
    """The path of the last module to run that has weights of its own."""
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
        for path, module in spec.module.named_modules()
        if path and any(True for _ in module.parameters(recurse=False))
    ]
    training = {module: module.training for module in spec.module.modules()}
    try:
        with torch.no_grad():
            spec.module.eval()(*spec.inputs.values())
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    if not ran:
        raise CannotCompile(f"{spec.name!r}: no module inside it has weights, so there is no head; name the weights")
    return ran[-1]


def _with_adapters(spec: ModelSpec, lora: LoRA) -> ModelSpec:
    module = copied(spec.module)
    generator = torch.Generator().manual_seed(ADAPTER_SEED)
    # A layer that stands in several places has one adapter, in all of them.
    places: dict[nn.Module, list[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        places.setdefault(part, []).append(path)
    chosen = {part: paths for part, paths in places.items() if any(path and lora.is_target(path) for path in paths)}
    if not chosen:
        dense = [path for path, part in module.named_modules() if type(part) is nn.Linear]
        raise CannotCompile(f"{spec.name!r}: no layer goes by {lora.targets}; dense layers are {', '.join(dense)}")
    for part, paths in chosen.items():
        # Torch's own attention reads the weights of its subclass of Linear without calling it.
        if type(part) is not nn.Linear:
            raise CannotCompile(
                f"{spec.name!r}: {paths[0]!r} is a {type(part).__name__}, and LoRA goes into nn.Linear; choose others, "
                "or write that layer with nn.Linear"
            )
        adapted = Adapted(part, lora, generator)
        for path in paths:
            above, _, name = path.rpartition(".")
            setattr(module.get_submodule(above), name, adapted)
    also = _named(replace(spec, module=module), Named(lora.also))
    trained = {f"{paths[0]}.{name}" for paths in chosen.values() for name in ("lora_a", "lora_b")}
    return replace(spec, module=module, trainable=lambda name: name in trained or also(name))
