"""`umbel models` and `umbel versions`."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from umbel.bundle import Bundle
from umbel.digests import Digest
from umbel.errors import AlreadyExists
from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.lineage import lineage_tree
from umbel_server.cli.verbs import Session, group, verb
from umbel_server.files import aside_of, read_file
from umbel_server.transfer import CHUNK_BYTES, BundleReceiver, FileStart, Step, send_bundle

MODELS: Final = group("models", "Models: lines of versions under one name.")
VERSIONS: Final = group("versions", "Versions: immutable, each with where it came from.")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="The model's name.")]
Number = Annotated[int, typer.Argument(metavar="VERSION", help="The version's number.", min=1)]
Limit = Annotated[int, typer.Option("--limit", help="At most so many.", min=1, max=10_000)]

_MODEL_COLUMNS: Final[list[output.Column]] = [
    ("model", lambda model: model.name),
    ("newest version", lambda model: str(model.newest_version)),
    ("created (UTC)", lambda model: output.instant(model.created_at_ms)),
]
_VERSION_COLUMNS: Final[list[output.Column]] = [
    ("version", lambda version: str(version.number)),
    ("state", lambda version: version.state),
    ("parent", lambda version: output.number(version.parent)),
    ("from", lambda version: _origin(version)),
    ("cohort", lambda version: output.number(version.cohort)),
    ("accuracy", output.share),
    ("strategy", lambda version: version.strategy or "–"),
    ("bundle", lambda version: version.bundle_digest[:12]),
    ("created (UTC)", lambda version: output.instant(version.created_at_ms)),
]
_RELEASE_COLUMNS: Final[list[output.Column]] = [
    ("model", lambda release: release.model),
    ("release", lambda release: str(release.number)),
    ("version", lambda release: str(release.version)),
    ("channel", lambda release: release.channel),
    ("issued (UTC)", lambda release: output.instant(release.issued_at_ms)),
]


@verb(MODELS, "add", "umbel models add build/smartwatch --name smartwatch", changes=True)
def add_model(
    session: Session,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE_DIR", help="A bundle, as `umbel-compile build` makes it.")],
    name: Annotated[str, typer.Option("--name", help="The model's name.")],
    parent: Annotated[int, typer.Option("--parent", help="Of a model that exists: the version it was made from.")] = 0,
) -> None:
    """Register a new model, the bundle as its version 1; or with --parent the next version of one that exists."""
    answer = session.stub.AddModel(
        _add_requests(pb.AddModelBegin(name=name, parent=parent, **session.call), Bundle.open(bundle))
    )
    _show_version(session, answer.version)


def _add_requests(begin: pb.AddModelBegin, bundle: Bundle) -> Iterator[pb.AddModelRequest]:
    yield pb.AddModelRequest(begin=begin)
    for step in send_bundle(bundle):
        match step:
            case FileStart(file_name, size):
                yield pb.AddModelRequest(file=pb.BundleFile(name=file_name, size=size))
            case bytes():
                yield pb.AddModelRequest(chunk=step)


@verb(MODELS, "add-holdout", "umbel models add-holdout holdout.safetensors", changes=True)
def add_holdout(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="safetensors, by the names of the model's manifest.")],
) -> None:
    """Keep held-out examples; a task's `validation.holdout` names them by the digest that is printed."""
    answer = session.stub.AddHoldout(_holdout_requests(read_file(file), session.call))
    session.show(answer, lambda: answer.digest)


def _holdout_requests(data: bytes, call: Mapping[str, Any]) -> Iterator[pb.AddHoldoutRequest]:
    yield pb.AddHoldoutRequest(**call)
    for start in range(0, len(data), CHUNK_BYTES):
        yield pb.AddHoldoutRequest(chunk=data[start : start + CHUNK_BYTES])


@verb(MODELS, "list", "umbel models list")
def list_models(session: Session) -> None:
    """List the models."""
    answer = session.stub.ListModels(pb.ListModelsRequest())
    session.rows("", answer, answer.models, _MODEL_COLUMNS)


@verb(MODELS, "show", "umbel models show smartwatch")
def show_model(session: Session, model: Model) -> None:
    """Show a model by its newest versions."""
    answer = session.stub.ListVersions(pb.ListVersionsRequest(model=model, limit=10))
    session.rows(f"Model {model}, newest versions", answer, answer.versions, _VERSION_COLUMNS)


@verb(VERSIONS, "list", "umbel versions list smartwatch --limit 20")
def list_versions(session: Session, model: Model, limit: Limit = 100) -> None:
    """List a model's versions, newest first."""
    answer = session.stub.ListVersions(pb.ListVersionsRequest(model=model, limit=limit))
    session.rows("", answer, answer.versions, _VERSION_COLUMNS)


@verb(VERSIONS, "show", "umbel versions show smartwatch 3")
def show_version(session: Session, model: Model, number: Number) -> None:
    """Show one version: its state, where it came from and what was measured."""
    _show_version(session, session.stub.GetVersion(pb.GetVersionRequest(model=model, number=number)).version)


@verb(VERSIONS, "lineage", "umbel versions lineage smartwatch 3")
def show_lineage(session: Session, model: Model, number: Number) -> None:
    """Tell a version from end to end: data, round, releases, rollouts, approvals; then its parent, and so on."""
    answer = session.stub.GetLineage(pb.GetLineageRequest(model=model, number=number))
    session.show(answer, lambda: lineage_tree(model, answer))


@verb(VERSIONS, "publish", "umbel versions publish smartwatch 3 --channel stable", changes=True)
def publish(
    session: Session,
    model: Model,
    number: Number,
    channel: Annotated[str, typer.Option("--channel", help="Devices of this channel get it.")] = "stable",
) -> None:
    """Release an accepted version on a channel; an older one too, which is how to go back."""
    answer = session.stub.Publish(pb.PublishRequest(model=model, version=number, channel=channel, **session.call))
    session.rows("", answer, [answer.release], _RELEASE_COLUMNS)


@verb(VERSIONS, "export", "umbel versions export smartwatch 3 build/smartwatch-3")
def export(
    session: Session,
    model: Model,
    number: Number,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
) -> None:
    """Write a version's bundle into a new folder, verified."""
    if folder.exists():
        raise AlreadyExists(f"{folder} exists; name a folder that doesn't")
    answers = session.stub.ExportVersion(pb.ExportVersionRequest(model=model, version=number))
    digest = _received(itertools.chain([next(answers)], answers), folder)
    facts = {"model": model, "version": number, "folder": str(folder), "bundle_digest": digest}
    if session.as_json:
        output.print_json(facts)
    else:
        output.console().print(f"Wrote {model} {number} to {folder} (bundle {digest[:12]}).")


def _received(answers: Iterable[pb.ExportVersionResponse], folder: Path) -> Digest:
    """Have the folder hold a whole bundle, or not be there: whoever is cut off may simply ask again."""
    aside = aside_of(folder)
    aside.mkdir(parents=True)
    receiver = BundleReceiver(aside)
    try:
        for answer in answers:
            receiver.take(_step(answer))
        receiver.finish()
        digest = Bundle.open(aside).manifest.digest
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        receiver.close()
    return digest


def _step(answer: pb.ExportVersionResponse) -> Step:
    return FileStart(answer.file.name, answer.file.size) if answer.HasField("file") else answer.chunk


def _show_version(session: Session, version: pb.Version) -> None:
    session.facts(
        version,
        [
            ("model", version.model),
            ("version", str(version.number)),
            ("state", version.state),
            ("parent", output.number(version.parent)),
            ("from", _origin(version)),
            ("cohort", f"{version.cohort} devices, {version.weight:g} examples" if version.cohort else "–"),
            ("strategy", version.strategy or "–"),
            ("verdict", version.verdict or "–"),
            ("accuracy", output.share(version)),
            ("metrics", output.metrics(version.metrics)),
            ("bundle", version.bundle_digest),
            ("created (UTC)", output.instant(version.created_at_ms)),
        ],
    )


def _origin(version: pb.Version) -> str:
    return f"{version.task}, round {version.round}" if version.task else f"added by {version.registered_by}"
