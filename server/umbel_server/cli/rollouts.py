"""`umbel rollouts` and `umbel approvals`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from umbel.errors import MalformedMessage
from umbel.release import STABLE
from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.notes import note_population
from umbel_server.cli.verbs import Session, Watch, group, verb
from umbel_server.cli.waves import counts_in_words, facts_table, picture, spec_of, wave_in_words
from umbel_server.files import read_toml

ROLLOUTS: Final = group("rollouts", "Rollouts: move a population to a release in waves, and back.")
APPROVALS: Final = group("approvals", "Approvals: what waits for a second person.")

Id = Annotated[str, typer.Argument(metavar="ROLLOUT", help="The rollout's id.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it goes into the audit.")]

_COLUMNS: Final[list[output.Column]] = [
    ("rollout", lambda it: it.id),
    ("light", lambda it: it.light),
    ("stage", lambda it: it.stage),
    ("wave", lambda it: wave_in_words(it)),
    ("release", lambda it: str(spec_of(it)["release"])),
    ("devices", lambda it: counts_in_words(it)),
    ("author", lambda it: it.author),
    ("approved by", lambda it: it.approved_by or "–"),
    ("created (UTC)", lambda it: output.instant(it.created_at_ms)),
]


@verb(
    ROLLOUTS,
    "create",
    "umbel rollouts create shoulder-7 --model smartwatch --population watches --release 7 --revert 8 --from 5",
    changes=True,
)
def create(
    session: Session,
    rollout: Id,
    file: Annotated[
        Path | None, typer.Option("--file", help="TOML with the rollout's spec; options go before it.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model.")] = None,
    population: Annotated[str | None, typer.Option("--population", help="The devices.")] = None,
    channel: Annotated[str | None, typer.Option("--channel", help="The channel.", show_default=STABLE)] = None,
    release: Annotated[
        int | None, typer.Option("--release", help="The release, as `umbel releases prepare` told.")
    ] = None,
    revert: Annotated[int | None, typer.Option("--revert", help="The release to go back with.")] = None,
    from_release: Annotated[int | None, typer.Option("--from", help="What devices have now.")] = None,
    waves: Annotated[str, typer.Option("--waves", help="Per cent of the population, such as 1,5,25,100.")] = "",
    soak: Annotated[float | None, typer.Option("--soak", help="Seconds before a wave's gate may pass.", min=0)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show which devices each wave would take.")] = False,
) -> None:
    """Write a draft of a rollout; nothing moves before it is submitted, approved by somebody else, and started."""
    from umbel_server.rollout_spec import LADDER

    chosen = {
        "model": model, "population": population, "channel": channel, "release": release, "revert_release": revert,
        "from_release": from_release,
    }  # fmt: skip
    spec = {"channel": STABLE} | (read_toml(file) if file else {})
    spec |= {name: value for name, value in chosen.items() if value is not None}
    if waves:
        spec["waves"] = _shares(waves)
    if soak is not None:
        usual = [{"percent": share} for share in LADDER]
        spec["waves"] = _soaking(spec.get("waves", usual), soak)
    document = _document(spec)
    if dry_run:
        _show_preview(session, pb.PreviewRolloutRequest(spec=document))
    else:
        request = pb.CreateRolloutRequest(id=rollout, spec=document, **session.call)
        _show(session, session.stub.CreateRollout(request).rollout)
    note_population(session, spec["population"])


@verb(ROLLOUTS, "edit", "umbel rollouts edit shoulder-7 --file rollout.toml", changes=True)
def edit(
    session: Session,
    rollout: Id,
    file: Annotated[Path, typer.Option("--file", help="TOML with the rollout's whole spec.")],
) -> None:
    """Write another spec; approvals are void, and it must be submitted again."""
    call = _call(session, _get(session, rollout))
    request = pb.EditRolloutRequest(id=rollout, spec=_document(read_toml(file)), **call)
    _show(session, session.stub.EditRollout(request).rollout)


@verb(ROLLOUTS, "preview", "umbel rollouts preview shoulder-7")
def preview(session: Session, rollout: Id) -> None:
    """Show which enrolled devices each wave takes."""
    _show_preview(session, pb.PreviewRolloutRequest(id=rollout))


@verb(ROLLOUTS, "submit", "umbel rollouts submit shoulder-7", changes=True)
def submit(session: Session, rollout: Id) -> None:
    """Ask for approval."""
    _go_on(session, rollout, "submit")


@verb(ROLLOUTS, "start", "umbel rollouts start shoulder-7", changes=True)
def start(session: Session, rollout: Id) -> None:
    """Open the first wave of an approved rollout."""
    _go_on(session, rollout, "start")


@verb(ROLLOUTS, "resume", "umbel rollouts resume shoulder-7", changes=True)
def resume(session: Session, rollout: Id) -> None:
    """Go on with a paused rollout; a second person is needed where a gate had stopped it."""
    _go_on(session, rollout, "resume")


@verb(ROLLOUTS, "approve", "umbel rollouts approve shoulder-7 --subject 1f0c…", changes=True)
def approve(
    session: Session,
    rollout: Id,
    subject: Annotated[str, typer.Option("--subject", help="What you looked at, as `show` prints it.")] = "",
) -> None:
    """Let a rollout go, exactly as it stands; its author can't."""
    found = _get(session, rollout)
    _decide(session, found, "approve", subject=subject or found.subject)


@verb(ROLLOUTS, "deny", "umbel rollouts deny shoulder-7 --reason 'not on a Friday'", changes=True)
def deny(session: Session, rollout: Id, reason: Reason) -> None:
    """Refuse a rollout, for good."""
    _decide(session, _get(session, rollout), "deny", reason=reason)


@verb(ROLLOUTS, "promote", "umbel rollouts promote shoulder-7", changes=True)
def promote(session: Session, rollout: Id) -> None:
    """Open the next wave after a gate that a person confirms."""
    _decide(session, _get(session, rollout), "promote")


@verb(ROLLOUTS, "pause", "umbel rollouts pause shoulder-7 --reason 'watching support'", changes=True)
def pause(session: Session, rollout: Id, reason: Reason = "") -> None:
    """Offer nothing new; who has the release keeps it. At once, on one person's word."""
    _stop(session, rollout, "pause", reason)


@verb(ROLLOUTS, "abort", "umbel rollouts abort shoulder-7 --reason 'wrong labels'", changes=True)
def abort(session: Session, rollout: Id, reason: Reason = "") -> None:
    """Stop, and take devices back. At once, on one person's word."""
    _stop(session, rollout, "abort", reason)


@verb(ROLLOUTS, "rollback", "umbel rollouts rollback shoulder-7 --reason 'a user called'", changes=True)
def rollback(session: Session, rollout: Id, reason: Reason = "") -> None:
    """Take devices back though every gate had passed. At once, on one person's word."""
    _stop(session, rollout, "roll-back", reason)


@verb(ROLLOUTS, "cancel", "umbel rollouts cancel shoulder-7", changes=True)
def cancel(session: Session, rollout: Id, reason: Reason = "") -> None:
    """Drop a rollout that hasn't started."""
    _stop(session, rollout, "cancel", reason)


@verb(ROLLOUTS, "list", "umbel rollouts list --watch")
def list_rollouts(
    session: Session,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1, max=10_000)] = 20,
    watch: Watch = False,
) -> None:
    """List rollouts, newest first."""

    def ask() -> pb.ListRolloutsResponse:
        return session.stub.ListRollouts(pb.ListRolloutsRequest(limit=limit))

    if watch:
        session.follow(ask, lambda answer: output.table("", _COLUMNS, answer.rollouts))
        return
    answer = ask()
    session.rows("", answer, answer.rollouts, _COLUMNS)


@verb(ROLLOUTS, "show", "umbel rollouts show shoulder-7")
def show(session: Session, rollout: Id) -> None:
    """Show one rollout, wave by wave."""
    found = _get(session, rollout)
    session.show(found, lambda: picture(found))


@verb(ROLLOUTS, "watch", "umbel rollouts watch shoulder-7")
def watch(session: Session, rollout: Id) -> None:
    """Keep showing one rollout's waves and what its gate says, until Ctrl-C."""
    session.follow(
        lambda: session.stub.GetRollout(pb.GetRolloutRequest(id=rollout)), lambda answer: picture(answer.rollout)
    )


@verb(ROLLOUTS, "explain", "umbel rollouts explain shoulder-7")
def explain(session: Session, rollout: Id) -> None:
    """Tell in words what the gate said last, guard by guard."""
    found = _get(session, rollout)
    session.show(found, lambda: found.judgement or "no gate has said anything yet")


@verb(APPROVALS, "list", "umbel approvals list")
def list_approvals(session: Session) -> None:
    """List the rollouts that wait for a second person."""
    answer = session.stub.ListRollouts(pb.ListRolloutsRequest(limit=1000))
    waiting = [it for it in answer.rollouts if it.stage in ("pending-approval", "awaiting-promotion")]
    session.rows("", pb.ListRolloutsResponse(rollouts=waiting), waiting, _COLUMNS)


def _shares(waves: str) -> list[dict[str, float]]:
    try:
        return [{"percent": float(share)} for share in waves.split(",")]
    except ValueError:
        raise MalformedMessage(f"--waves is {waves!r}; give per cent of the population, such as 1,5,25,100") from None


def _soaking(waves: Any, seconds: float) -> list[dict[str, Any]]:
    try:
        return [wave | {"soak_seconds": seconds} for wave in waves]
    except TypeError:
        raise MalformedMessage(f"waves is {waves!r:.80}, not a list of tables; write [[waves]]") from None


def _document(spec: dict[str, Any]) -> str:
    try:
        return json.dumps(spec)
    except TypeError as error:
        raise MalformedMessage(f"not a rollout's spec: {error}; instants are POSIX seconds") from error


def _get(session: Session, rollout: str) -> pb.Rollout:
    return session.stub.GetRollout(pb.GetRolloutRequest(id=rollout)).rollout


def _call(session: Session, found: pb.Rollout) -> dict[str, Any]:
    """How a change is asked for: of a rollout as it was found, unless a person names the revision that they saw."""
    return {"expected_revision": found.revision, **session.call}


def _go_on(session: Session, rollout: str, action: str) -> None:
    call = _call(session, _get(session, rollout))
    _show(session, session.stub.GoOnRollout(pb.GoOnRolloutRequest(id=rollout, action=action, **call)).rollout)


def _decide(session: Session, found: pb.Rollout, action: str, **more: Any) -> None:
    request = pb.DecideRolloutRequest(id=found.id, action=action, **more, **_call(session, found))
    _show(session, session.stub.DecideRollout(request).rollout)


def _stop(session: Session, rollout: str, action: str, reason: str) -> None:
    # Whatever its revision, unless one is named: stopping can't wait.
    call = {"expected_revision": -1, **session.call}
    request = pb.StopRolloutRequest(id=rollout, action=action, reason=reason, **call)
    _show(session, session.stub.StopRollout(request).rollout)


def _show(session: Session, found: pb.Rollout) -> None:
    session.show(found, lambda: facts_table(found))


def _show_preview(session: Session, request: pb.PreviewRolloutRequest) -> None:
    answer = session.stub.PreviewRollout(request)
    columns: list[output.Column] = [
        ("wave", lambda wave: str(wave.wave + 1)),
        ("per cent", lambda wave: f"{wave.percent:g}"),
        ("devices", lambda wave: str(len(wave.devices))),
        ("ids", lambda wave: " ".join(device[:12] for device in wave.devices) or "–"),
    ]
    session.rows("Devices that each wave adds", answer, answer.waves, columns)
