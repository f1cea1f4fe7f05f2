"""`umbel releases list|show|publish|prepare|hold|lift`; how they are listed and signed stands in `listing`."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.models import Limit, Model, Number
from umbel_server.cli.notes import note_channel, note_population
from umbel_server.cli.rollouts import Reason
from umbel_server.cli.verbs import Session, group, verb

RELEASES: Final = group("releases", "Releases: signed publications of versions, by channel.")
Channel = Annotated[str, typer.Option("--channel", help="Devices of this channel.")]
Population = Annotated[
    str,
    typer.Option(
        "--population", help="Go back to what this population has; default: to the newest that any of the channel has."
    ),
]
Release = Annotated[int, typer.Argument(metavar="RELEASE", help="The release's number.", min=1)]
Encoding = Annotated[
    str,
    typer.Option(
        "--encoding", help="full, or int8-delta: what devices have plus a small delta, as a version of its own."
    ),
]

_COLUMNS: Final[list[output.Column]] = [
    ("model", lambda release: release.model),
    ("release", lambda release: str(release.number)),
    ("version", lambda release: str(release.version)),
    ("channel", lambda release: release.channel),
    ("encoding", lambda release: release.encoding),
    ("size", lambda release: output.size(release.size)),
    ("deltas", lambda release: _deltas(release)),
    ("standing", lambda release: _standing(release)),
    ("issued (UTC)", lambda release: output.instant(release.issued_at_ms)),
]


@verb(RELEASES, "list", "umbel releases list smartwatch")
def list_releases(
    session: Session,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="Only this model's.", show_default=False)] = "",
    limit: Limit = 100,
) -> None:
    """List releases, newest first: how each is encoded, how large it is, and the deltas to it from earlier ones."""
    answer = session.stub.ListReleases(pb.ListReleasesRequest(model=model, limit=limit))
    session.rows("", answer, answer.releases, _COLUMNS)


@verb(RELEASES, "show", "umbel releases show smartwatch 12")
def show(session: Session, model: Model, release: Release) -> None:
    """Show one release: what it holds, what a device fetches for it, and who gets it."""
    answer = session.stub.GetRelease(pb.GetReleaseRequest(model=model, number=release))
    session.facts(answer.release, _facts(answer.release))


@verb(RELEASES, "publish", "umbel releases publish smartwatch 3 --channel beta", changes=True)
def publish(session: Session, model: Model, number: Number, channel: Channel = "stable") -> None:
    """Release a version to everybody on a channel at once, without waves; an older one too, which is how to go back."""
    answer = session.stub.Publish(pb.PublishRequest(model=model, version=number, channel=channel, **session.call))
    found = session.stub.GetRelease(pb.GetReleaseRequest(model=model, number=answer.release.number)).release
    session.facts(found, _facts(found))
    note_channel(session, model, channel, [found.number])


@verb(RELEASES, "prepare", "umbel releases prepare smartwatch 3 --encoding int8-delta", changes=True)
def prepare(
    session: Session,
    model: Model,
    number: Number,
    channel: Channel = "stable",
    encoding: Encoding = "full",
    population: Population = "",
) -> None:
    """Make a version a release that a rollout can move to, with the release to go back with. Nobody gets it yet."""
    request = pb.PrepareReleaseRequest(
        model=model, version=number, channel=channel, encoding=encoding, population=population, **session.call
    )
    answer = session.stub.PrepareRelease(request)
    facts = [("release", str(answer.number)), ("to go back with", str(answer.revert or "–"))]
    facts += [("devices have now", str(answer.head or "–")), ("version", str(answer.release.version))]
    session.facts(answer, [*facts, *_sizes(answer.release)])
    note_channel(session, model, channel, [answer.number, answer.revert])
    note_population(session, population)


@verb(RELEASES, "hold", "umbel releases hold smartwatch --reason 'bad labels'", changes=True)
def hold(session: Session, model: Model, reason: Reason = "") -> None:
    """Emergency: offer nothing of a model to anybody, until the hold is lifted."""
    session.show(
        session.stub.HoldReleases(pb.HoldReleasesRequest(model=model, reason=reason, **session.call)),
        lambda: f"{model} is held",
    )


@verb(RELEASES, "lift", "umbel releases lift smartwatch", changes=True)
def lift(session: Session, model: Model) -> None:
    """End a hold."""
    session.show(
        session.stub.LiftHold(pb.LiftHoldRequest(model=model, **session.call)), lambda: f"{model} is offered again"
    )


def _facts(release: Any) -> list[tuple[str, str]]:
    return [
        ("model", release.model),
        ("release", str(release.number)),
        ("version", str(release.version)),
        ("channel", release.channel),
        ("standing", _standing(release)),
        *_sizes(release),
        ("bundle", release.bundle_digest),
        ("issued (UTC)", output.instant(release.issued_at_ms)),
    ]


def _standing(release: Any) -> str:
    whose = f" of {', '.join(release.head_of)}" if release.head_of else ""
    return f"{release.standing}{whose}" or "–"


def _sizes(release: Any) -> list[tuple[str, str]]:
    whole = [(f"whole, {name}", output.size(size)) for name, size in sorted(release.size_by_runtime.items())]
    deltas = [
        (f"delta from {delta.from_release}", f"{output.size(delta.size)} for {output.size(delta.stands_for)}")
        for delta in release.deltas
    ]
    return [("encoding", release.encoding), *whole, *deltas]


def _deltas(release: Any) -> str:
    told = [f"{delta.size / delta.stands_for:.0%} from {delta.from_release}" for delta in release.deltas]
    return ", ".join(told) or "–"
