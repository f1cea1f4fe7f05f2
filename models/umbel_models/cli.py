"""`umbel-compile`: build a bundle from a torch model, look into one, check one on this machine.

Results go to standard output (tables, or JSON with `--json`), messages to standard error. Exit code 0 means it is
done and all agrees, 2 that Umbel refused and said why.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f"umbel-compile needs {missing.name}: pip install 'umbel[compile]'") from missing

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, UmbelError
from umbel.golden import verify_golden
from umbel.manifest import TensorSpec
from umbel.runtime.named import runtime_named

if TYPE_CHECKING:
    from umbel_models.spec import ModelSpec

app = typer.Typer(
    help="Make bundles that devices run and train without torch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
BundleFolder = Annotated[Path, typer.Argument(help="Folder of a bundle.", metavar="BUNDLE")]
SpecName = Annotated[
    str, typer.Argument(help="A ModelSpec, or a function that returns one.", metavar="PACKAGE.MODULE:SPEC")
]
TrainableChoice = Annotated[
    str | None,
    typer.Option(
        "--trainable", help="In place of the spec's choice: all, head, lora:RANK:LAYERS, or names of weights."
    ),
]
OptimizerChoice = Annotated[
    str | None,
    typer.Option("--optimizer", help="In place of the spec's choice: sgd:lr=0.05,momentum=0.9, adam:..., adamw:..."),
]


def main() -> None:
    """The program's entry point."""
    app()


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn a refusal into a line on standard error and exit code 2."""
    try:
        yield
    except UmbelError as error:
        message = f"[bold red]{error.code}[/]: {escape(str(error))}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@app.command()
def build(
    spec: SpecName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the bundle into.")],
    runtime: Annotated[
        str, typer.Option("--runtime", help="Runtimes to compile for, with commas between: onnx, litert.")
    ] = "onnx",
    trainable: TrainableChoice = None,
    optimizer: OptimizerChoice = None,
    as_json: AsJson = False,
) -> None:
    """Compile a torch model into a bundle; nothing is written unless it does what torch does.

    Example: `umbel-compile build umbel_models.zoo.digits:mlp -o build/digits --runtime onnx,litert`

    Example: `umbel-compile build umbel_models.zoo.shakespeare:spec -o build/lora --trainable lora:8:q,v`
    """
    with _refusals():
        model = load_spec(spec, trainable, optimizer)
        from umbel_models.compile import compile_model  # torch takes a second to import; `inspect` needs none

        compiled = compile_model(model, output, _names(runtime))
        report = {"bundle": str(output), "digest": compiled.bundle.manifest.digest}
        _show(
            {
                **report,
                **describe(compiled.bundle),
                "parity": {name: asdict(found) for name, found in compiled.parity.items()},
            },
            as_json,
        )


@app.command()
def inspect(bundle: BundleFolder, as_json: AsJson = False) -> None:
    """Tell what a bundle takes, gives and is made of, after verifying each of its files.

    Example: `umbel-compile inspect build/digits`
    """
    with _refusals():
        opened = Bundle.open(bundle)
        _show({"bundle": str(bundle), "digest": opened.manifest.digest, **describe(opened)}, as_json)


@app.command()
def check(
    bundle: BundleFolder,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Also compare answers and training with this torch ModelSpec."),
    ] = None,
    trainable: TrainableChoice = None,
    optimizer: OptimizerChoice = None,
    as_json: AsJson = False,
) -> None:
    """Run a bundle's golden examples on this machine, and on demand compare it with its torch model.

    The torch model must hold the weights of the bundle, as it does right after `build`; name again what `build` was
    told to train, and how.

    Example: `umbel-compile check build/digits --against umbel_models.zoo.digits:mlp`
    """
    with _refusals():
        opened = Bundle.open(bundle)
        runtimes = {name: runtime_named(name) for name in sorted(opened.manifest.graphs)}
        result: dict[str, Any] = {
            "bundle": str(bundle),
            "golden_difference": {name: verify_golden(runtime, opened) for name, runtime in runtimes.items()},
            "golden_tolerance": opened.manifest.golden_tolerance,
        }
        if against is not None:
            model = load_spec(against, trainable, optimizer)
            from umbel_models.parity import check_parity

            result["parity"] = {
                name: asdict(check_parity(model, opened, runtime)) for name, runtime in runtimes.items()
            }
        _show(result, as_json)


def _names(runtimes: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in runtimes.split(",") if name.strip()))


def load_spec(name: str, trainable: str | None = None, optimizer: str | None = None) -> ModelSpec:
    """Import `package.module:attribute`, from the working directory too.

    Args:
        name: a ModelSpec, or a function without arguments that gives one.
        trainable: what is trained in place of what the spec says, as `umbel_models.choices` reads it.
        optimizer: the same for the optimiser.

    Raises:
        CannotCompile: there is no such thing, it isn't a ModelSpec, or a choice can't be read.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise CannotCompile(f"{name!r} doesn't name a spec; write package.module:spec")
    if importlib.util.find_spec("torch") is None:
        raise CannotCompile("torch isn't installed here: pip install 'umbel[compile]'")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise CannotCompile(f"can't load {name!r}: {error}") from error
    from umbel_models.spec import ModelSpec

    made = found() if callable(found) else found
    if not isinstance(made, ModelSpec):
        raise CannotCompile(f"{name!r} is a {type(made).__name__}; it must be a ModelSpec or return one")
    from umbel_models.choices import parse_optimizer, parse_trainable

    made = made if trainable is None else replace(made, trainable=parse_trainable(trainable))
    return made if optimizer is None else replace(made, optimizer=parse_optimizer(optimizer))


def describe(bundle: Bundle) -> dict[str, Any]:
    """What a bundle takes, gives and is made of, as plain data."""
    manifest = bundle.manifest
    return {
        "model": manifest.model,
        "description": manifest.description,
        "inputs": [_tensor(spec) for spec in manifest.inputs],
        "targets": [_tensor(spec) for spec in manifest.targets],
        "outputs": [_tensor(spec) for spec in manifest.outputs],
        "labels": list(manifest.labels),
        "weights": {role: _size(getattr(manifest, role)) for role in ("trainable", "buffers", "frozen")},
        "hyperparameters": dict(manifest.hyperparameters),
        "metrics": list(manifest.metrics),
        "runtimes": sorted(manifest.graphs),
        "files": {name: ref.size for name, ref in sorted(manifest.files.items())},
        "graph_bytes": {
            name: sum(manifest.files[file].size for file in files.values()) for name, files in manifest.graphs.items()
        },
    }


def _tensor(spec: TensorSpec) -> str:
    sizes = ", ".join("batch" if size is None else str(size) for size in spec.shape)
    return f"{spec.name}: {spec.dtype} [{sizes}]"


def _size(specs: tuple[TensorSpec, ...]) -> int:
    total = 0
    for spec in specs:
        count = 1
        for size in spec.fixed_shape:
            count *= size
        total += count
    return total


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.items():
        table.add_row(f"[bold]{name.replace('_', ' ')}[/]", escape(_plain(value)))
    Console().print(table, highlight=False)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
