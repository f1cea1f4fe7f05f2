"""A bundle proved again, on this machine: golden examples, and torch itself where the model is at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from umbel.bundle import Bundle
from umbel.runtime.named import runtime_named
from umbel.runtime.precision import fastest
from umbel.self_check import verify_golden

if TYPE_CHECKING:
    from umbel_models.parity import ParityReport
    from umbel_models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Checked:
    """How closely a bundle agrees, by the name of the runtime."""

    golden: Mapping[str, float]
    """The largest difference on the golden examples, as `verify_golden` tells it."""
    parity: Mapping[str, ParityReport]
    """Against torch; empty without a spec."""
    answers_in: Mapping[str, str]
    """The kind of numbers that answers come in here: that of the manifest, or float32 where it is too far off here."""


def check_bundle(
    bundle: Bundle, spec: ModelSpec | None = None, progress: Callable[[str], None] = lambda stage: None
) -> Checked:
    """Check a bundle with every runtime that it is made for.

    Args:
        bundle: opened, and so verified.
        spec: the model that it was compiled from, with the same weights; None leaves torch out.
        progress: told what is done next, once or twice for each runtime.

    Raises:
        GoldenMismatch: a golden example is answered otherwise here.
        ParityFailed: answers, metrics or training differ from torch.
        NotFound: a runtime of the bundle isn't installed.
    """
    golden: dict[str, float] = {}
    parity: dict[str, ParityReport] = {}
    answers_in: dict[str, str] = {}
    for name in sorted(bundle.manifest.graphs):
        runtime = runtime_named(name)
        progress(f"golden examples on {name}")
        golden[name] = verify_golden(runtime, bundle)
        _, answers_in[name] = fastest(runtime, bundle, bundle.weights())
        if spec is not None:
            from umbel_models.parity import check_parity

            progress(f"parity on {name}")
            parity[name] = check_parity(spec, bundle, runtime)
    return Checked(golden, parity, answers_in)
