"""The words by which the command line chooses what is trained, and how.

    all | head | lora:RANK:LAYER,LAYER[:ALPHA] | NAME,NAME,...          what
    sgd | adam | adamw [:SETTING=NUMBER,...]                            how

Settings: those of the optimiser (`lr`, `momentum`; `beta1`, `beta2`, `epsilon`, `weight_decay`), `mu` for FedProx's
proximal term, `accumulate` for steps over several batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from umbel.errors import CannotCompile
from umbel_models.accumulation import Accumulated
from umbel_models.optimizers import SGD, Adam, Optimizer, Proximal
from umbel_models.trainable import Head, LoRA, Named, Trainable, every_weight

_ADAM: Final = ("lr", "beta1", "beta2", "epsilon")
_KINDS: Final[dict[str, tuple[Callable[..., Optimizer], tuple[str, ...]]]] = {
    "sgd": (SGD, ("lr", "momentum")),
    "adam": (Adam, _ADAM),
    "adamw": (lambda **settings: Adam(**{"weight_decay": 0.01, **settings}), (*_ADAM, "weight_decay")),
}
_AROUND: Final = ("mu", "accumulate")


def parse_trainable(text: str) -> Trainable:
    """What is trained, such as `all`, `head`, `lora:8:q,v`, `lora:4:layers.*.q:16` or `head.*,norm`.

    Raises:
        CannotCompile: not of that form.
    """
    if text == "all":
        return every_weight
    if text == "head":
        return Head()
    kind, _, rest = text.partition(":")
    if kind == "lora":
        return _lora(text, rest.split(":"))
    names = _names(text)
    if not names or ":" in text:
        raise CannotCompile(f"{text!r} doesn't say what is trained; write all, head, lora:RANK:LAYERS or names")
    return Named(names)


def _lora(text: str, parts: list[str]) -> LoRA:
    try:
        rank, targets, *alpha = parts
        if len(alpha) > 1:
            raise ValueError(f"{len(parts)} parts")
        return LoRA(int(rank), _names(targets), _number(text, alpha[0]) if alpha else None)
    except ValueError as error:
        raise CannotCompile(f"{text!r} isn't lora:RANK:LAYERS or lora:RANK:LAYERS:ALPHA, as lora:8:q,v is") from error


def parse_optimizer(text: str) -> Optimizer:
    """How it is trained, such as `sgd:lr=0.05,momentum=0.9` or `adamw:lr=0.001,mu=0.1,accumulate=4`.

    Raises:
        CannotCompile: not of that form, or a setting that this optimiser doesn't have.
    """
    kind, _, rest = text.partition(":")
    if kind not in _KINDS:
        raise CannotCompile(f"{kind!r} is no optimiser; choose {', '.join(_KINDS)}")
    build, known = _KINDS[kind]
    settings: dict[str, Any] = {}
    for entry in _names(rest):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals or name not in (*known, *_AROUND) or name in settings:
            raise CannotCompile(f"{entry!r} in {text!r}: {kind} takes {', '.join((*known, *_AROUND))}, each once")
        settings[name] = _number(text, value)
    mu, every = settings.pop("mu", None), settings.pop("accumulate", None)
    optimizer = build(**settings)
    optimizer = optimizer if mu is None else Proximal(optimizer, mu)
    return optimizer if every is None else Accumulated(optimizer, every)


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise CannotCompile(f"{value!r} in {text!r} is no number") from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
