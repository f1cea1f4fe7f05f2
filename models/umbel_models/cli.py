"""`umbel-compile`: build a bundle from a torch model, look into one, check and measure one on this machine.

Results go to standard output (tables, or JSON with `--json`), messages to standard error. Exit code 0 means it is
done and all agrees, 2 that Umbel refused and said why.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import click
    import typer
    from rich.console import Console
    from rich.markup import escape
    from typer.main import get_command
except ModuleNotFoundError as missing:
    raise SystemExit(f"umbel-compile needs {missing.name}: pip install 'umbel[compile]'") from missing

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, UmbelError
from umbel.program import take_streams
from umbel.runtime.named import runtime_named
from umbel.version import VERSION
from umbel_models.checking import check_bundle
from umbel_models.describing import describe
from umbel_models.measure import measure, tell_speeds
from umbel_models.printing import show, stages

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
ClipChoice = Annotated[
    float | None,
    typer.Option("--clip-examples", help="The largest norm of one example's gradient, for DP-SGD."),
]


def program() -> click.Command:
    """The whole command line."""
    return click.version_option(VERSION, message=f"umbel-compile {VERSION}")(get_command(app))


def main() -> None:
    """The program's entry point."""
    take_streams()
    program()()


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn a refusal into a line on standard error and exit code 2; what a model's author prints goes there too."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (UmbelError, OSError) as error:
        code = error.code if isinstance(error, UmbelError) else "not-readable-or-writable"
        message = f"[bold red]{code}[/]: {escape(str(error))}"
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
    clip_examples: ClipChoice = None,
    quantised: Annotated[
        str | None,
        typer.Option("--quantise", help="Also try to answer in fewer bits: int8, float16, with commas between."),
    ] = None,
    largest_drop: Annotated[
        float, typer.Option("--largest-drop", help="How much accuracy fewer bits may cost on the spec's calibration.")
    ] = 0.01,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Make graphs anew, and keep none.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compile a torch model into a bundle; nothing is written unless it does what torch does.

    Example: `umbel-compile build umbel_models.zoo.digits:mlp -o build/digits --runtime onnx,litert`

    Example: `umbel-compile build umbel_models.zoo.shakespeare:spec -o build/lora --trainable lora:8:q,v`
    """
    with _refusals():
        model = load_spec(spec, trainable, optimizer, clip_examples)
        from umbel_models.cache import GraphCache  # torch takes a second to import; `inspect` needs none
        from umbel_models.compile import compile_model
        from umbel_models.quantising import Quantise

        wish = None if quantised is None else Quantise(_names(quantised), largest_drop)
        runtimes, began = _names(runtime), time.perf_counter()
        with stages(1 + (4 if wish is None else 5) * len(runtimes)) as progress:
            kept = None if no_cache else GraphCache.default()
            compiled = compile_model(model, output, runtimes, kept, progress, wish)
        result = {"bundle": str(output), "digest": compiled.bundle.manifest.digest, **describe(compiled.bundle)}
        result["parity"] = {name: asdict(found) for name, found in compiled.parity.items()}
        result["seconds"] = round(time.perf_counter() - began, 2)
        result["graphs_from_cache"] = list(compiled.from_cache)
    show(result, as_json)


@app.command()
def inspect(bundle: BundleFolder, as_json: AsJson = False) -> None:
    """Tell what a bundle takes, gives and is made of, after verifying each of its files.

    Example: `umbel-compile inspect build/digits`
    """
    with _refusals():
        opened = Bundle.open(bundle)
        result = {"bundle": str(bundle), "digest": opened.manifest.digest, **describe(opened)}
    show(result, as_json)


@app.command()
def check(
    bundle: BundleFolder,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Also compare answers and training with this torch ModelSpec."),
    ] = None,
    trainable: TrainableChoice = None,
    optimizer: OptimizerChoice = None,
    clip_examples: ClipChoice = None,
    as_json: AsJson = False,
) -> None:
    """Run a bundle's golden examples on this machine, and on demand compare it with its torch model.

    The torch model must hold the weights of the bundle, as it does right after `build`; name again what `build` was
    told to train, and how.

    Example: `umbel-compile check build/digits --against umbel_models.zoo.digits:mlp`
    """
    with _refusals():
        opened = Bundle.open(bundle)
        model = None if against is None else load_spec(against, trainable, optimizer, clip_examples)
        with stages(len(opened.manifest.graphs) * (1 if model is None else 2)) as progress:
            checked = check_bundle(opened, model, progress)
        result: dict[str, Any] = {
            "bundle": str(bundle),
            "golden_difference": dict(checked.golden),
            "golden_tolerance": opened.manifest.golden_tolerance,
            "answers_in": dict(checked.answers_in),
        }
        if model is not None:
            result["parity"] = {name: asdict(found) for name, found in checked.parity.items()}
    show(result, as_json)


@app.command()
def bench(
    bundle: BundleFolder,
    against: Annotated[
        str | None, typer.Option("--against", help="Also measure this torch ModelSpec, and tell how it compares.")
    ] = None,
    batches: Annotated[
        str, typer.Option("--batches", help="Numbers of examples in a call, with commas between.")
    ] = "1,16,32",
    turns: Annotated[int, typer.Option("--turns", help="How often each way is measured.", min=1)] = 9,
    trainable: TrainableChoice = None,
    optimizer: OptimizerChoice = None,
    clip_examples: ClipChoice = None,
    as_json: AsJson = False,
) -> None:
    """Measure training steps and answers of a bundle on one thread of this machine, by runtime and batch.

    Microseconds of the processor for one call, the median of turns; with `--against` also how many times as fast as
    torch eager that is.

    Example: `umbel-compile bench build/digits --against umbel_models.zoo.digits:mlp`
    """
    with _refusals():
        opened = Bundle.open(bundle)
        model = None if against is None else load_spec(against, trainable, optimizer, clip_examples)
        sizes = _sizes(batches)
        runtimes = [runtime_named(name) for name in sorted(opened.manifest.graphs)]
        with stages(len(sizes) * turns) as progress:
            speeds = measure(opened, runtimes, model, sizes, turns, lambda done, of: progress(f"turn {done} of {of}"))
    show({"bundle": str(bundle), **tell_speeds(speeds)}, as_json)


def _sizes(batches: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in batches.split(","))
    except ValueError:
        raise CannotCompile(f"{batches!r} are no batches; write numbers with commas between, such as 1,16,32") from None


def _names(runtimes: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in runtimes.split(",") if name.strip()))


def load_spec(
    name: str, trainable: str | None = None, optimizer: str | None = None, clip_examples: float | None = None
) -> ModelSpec:
    """Import `package.module:attribute`, from the working directory too.

    Args:
        name: a ModelSpec, or a function without arguments that gives one.
        trainable: what is trained in place of what the spec says, as `umbel_models.choices` reads it.
        optimizer: the same for the optimiser.
        clip_examples: the same for the largest norm of one example's gradient.

    Raises:
        CannotCompile: there is no such thing, it raises, it isn't a ModelSpec, or a choice can't be read.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise CannotCompile(f"{name!r} doesn't name a spec; write package.module:spec")
    if importlib.util.find_spec("torch") is None:
        raise CannotCompile("torch isn't installed here: pip install 'umbel[compile]'")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    from umbel_models.spec import ModelSpec

    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
        made = found() if callable(found) else found
    except UmbelError:
        raise
    except (Exception, SystemExit) as error:  # an author's code raises anything at all
        raise CannotCompile(f"can't load {name!r}: {type(error).__name__}: {error}{_line_of(error)}") from error
    if not isinstance(made, ModelSpec):
        raise CannotCompile(f"{name!r} is a {type(made).__name__}; it must be a ModelSpec or return one")
    from umbel_models.choices import parse_optimizer, parse_trainable

    made = made if trainable is None else replace(made, trainable=parse_trainable(trainable))
    made = made if optimizer is None else replace(made, optimizer=parse_optimizer(optimizer))
    return made if clip_examples is None else replace(made, clip_examples=clip_examples)


def _line_of(error: BaseException) -> str:
    """The line that raised, if somebody wrote it to a file of his own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        "" if last.filename == __file__ or last.filename.startswith("<") else f" ({last.filename}, line {last.lineno})"
    )
