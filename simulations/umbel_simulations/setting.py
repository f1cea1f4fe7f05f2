"""What every engine begins with: a scenario's bundle and its federation, once they are known to fit together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from numpy.typing import NDArray

from umbel.bundle import MANIFEST_FILE, Bundle, write_bundle
from umbel.digests import digest_of
from umbel.errors import InputMismatch, NotFound
from umbel.home import in_home
from umbel.manifest import TensorSpec
from umbel.version import VERSION
from umbel_client.examples import Examples
from umbel_client.predictor import require_labels
from umbel_models.zoo import bundle_path
from umbel_simulations.data import ClientData, Federation, load
from umbel_simulations.scenario import Scenario

if TYPE_CHECKING:
    from umbel_models.spec import ModelSpec

COMPILED: Final = {
    "digits-cnn": "umbel_models.zoo.digits:cnn",
    "residual": "umbel_models.zoo.residual:spec",
    "shakespeare": "umbel_models.zoo.shakespeare:spec",
    "shakespeare-adam": "umbel_models.zoo.shakespeare:adam",
    "shakespeare-lstm": "umbel_models.zoo.shakespeare_lstm:spec",
}
"""Models of the zoo whose bundles don't come with the package: compiled when they are first asked for."""


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """A model, and the users who have examples for it."""

    bundle: Bundle
    federation: Federation
    spec: ModelSpec | None = None
    """The model itself, where torch trains it; its bundle has no graphs then."""


def prepare(scenario: Scenario) -> Setting:
    """Open the bundle and load the data.

    Raises:
        NotFound: no such bundle, or a package isn't installed.
        CannotCompile: a bundle that has to be compiled first, without torch.
        InputMismatch: the data aren't what the model takes.
        UmbelError: the bundle or the data are refused.
    """
    if scenario.algorithm.backend == "torch":
        bundle, spec = _uncompiled(scenario.model)
        return Setting(bundle, fitted(load(scenario.data, scenario.seed), bundle), spec)
    bundle = Bundle.open(bundle_folder(scenario.model))
    return Setting(bundle, fitted(load(scenario.data, scenario.seed), bundle))


def bundle_folder(model: str) -> Path:
    """Where a scenario's bundle lies: a folder, a bundle of the package, or one compiled into the user's cache.

    Raises:
        NotFound: none of the three.
        CannotCompile: torch, which compiling needs, isn't installed.
    """
    if (Path(model) / MANIFEST_FILE).is_file():
        return Path(model)
    if model not in COMPILED:
        try:
            return bundle_path(model)
        except NotFound as error:
            more = ", ".join(COMPILED)
            raise NotFound(f"{error}; these are compiled when torch is installed: {more}; or name a folder") from None
    return _compiled(model)


def _zoo_cache() -> Path:
    root = os.environ.get("UMBEL_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return in_home(root) / "umbel" / "zoo"


def _uncompiled(model: str) -> tuple[Bundle, ModelSpec]:
    """A model as its author wrote it, and a bundle of it without graphs."""
    from umbel_models.cli import load_spec

    spec = load_spec(COMPILED.get(model, model))
    from umbel_models.eager import uncompiled

    manifest, files = uncompiled(spec)
    folder = _zoo_cache() / f"uncompiled-{manifest.digest[:12]}"
    written = Bundle.open(folder) if (folder / MANIFEST_FILE).is_file() else write_bundle(folder, manifest, files)
    return written, spec


def _compiled(model: str) -> Path:
    # Another version, or another text of the model's module, is another bundle.
    source = find_spec(COMPILED[model].partition(":")[0])
    text = Path(source.origin).read_bytes() if source and source.origin else b""
    folder = _zoo_cache() / f"{model}-{VERSION}-{digest_of(text)[:12]}"
    if not (folder / MANIFEST_FILE).is_file():
        from umbel_models.cli import load_spec

        spec = load_spec(COMPILED[model])
        from umbel_models.compile import compile_model

        compile_model(spec, folder)
    return folder


def fitted(federation: Federation, bundle: Bundle) -> Federation:
    """The federation with its arrays in the shapes that the model takes, such as images for pixels in a row.

    Raises:
        InputMismatch: other names, types or sizes; or labels that the model doesn't have.
    """
    manifest = bundle.manifest
    specs = {spec.name: spec for spec in (*manifest.inputs, *manifest.targets)}
    found = {**federation.central.inputs, **federation.central.targets}
    if set(specs) != set(found):
        raise InputMismatch(f"{manifest.model} takes {sorted(specs)}, and {federation.name} has {sorted(found)}")
    clients = tuple(
        ClientData(client.name, _shaped(client.training, specs), _shaped(client.held_back, specs))
        for client in federation.clients
    )
    for client in clients:
        try:
            for examples in (client.training, client.held_back):
                require_labels(manifest, examples.targets)
        except InputMismatch as error:
            raise InputMismatch(f"{client.name}: {error}") from error
    return Federation(federation.name, clients, _shaped(federation.central, specs))


def _shaped(examples: Examples, specs: Mapping[str, TensorSpec]) -> Examples:
    inputs, targets = (
        {name: _reshaped(name, array, specs[name]) for name, array in arrays.items()}
        for arrays in (examples.inputs, examples.targets)
    )
    return Examples(inputs, targets, examples.count)


def _reshaped(name: str, array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    shape = tuple(size if size is not None else -1 for size in spec.shape)
    if array.dtype.name != spec.dtype:
        raise InputMismatch(f"{name!r} is {array.dtype.name}, and the model takes {spec.dtype}")
    if array.shape[1:] == shape[1:]:
        return array
    try:
        shaped = array.reshape(shape)
    except ValueError:
        shaped = array[:0]
    if len(shaped) != len(array):
        raise InputMismatch(f"{name!r} is {list(array.shape[1:])} for each example, and the model takes {shape[1:]}")
    return shaped
