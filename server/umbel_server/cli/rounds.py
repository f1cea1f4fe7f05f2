"""`umbel tasks` and `umbel rounds`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.table import Table

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.task_file import read_task, settings_of
from umbel_server.cli.verbs import Session, Watch, group, until_interrupted, verb

TASKS: Final = group("tasks", "Tasks: what a population is asked to do for a model, round after round.")
ROUNDS: Final = group("rounds", "Rounds: one rendezvous of a cohort each.")

Name = Annotated[str, typer.Argument(metavar="TASK", help="The task's name.")]

TASK_COLUMNS: Final[list[output.Column]] = [
    ("task", lambda task: task.spec.name),
    ("state", lambda task: task.state),
    ("model", lambda task: task.spec.model),
    ("population", lambda task: task.spec.population),
    ("rounds", lambda task: f"{task.judged_rounds}/{task.spec.rounds}"),
    ("accepted", lambda task: str(task.steps)),
    ("strategy", lambda task: task.spec.strategy.name),
    ("goal", lambda task: str(task.spec.goal)),
]
ROUND_COLUMNS: Final[list[output.Column]] = [
    ("task", lambda found: found.task),
    ("round", lambda found: f"{found.number}" + (" eval" if found.kind == "evaluate" else "")),
    ("state", lambda found: found.state),
    ("reports", lambda found: f"{found.reports}/{found.goal}"),
    ("base", lambda found: str(found.base_version)),
    ("new", lambda found: output.number(found.version)),
    ("accuracy", output.share),
    ("candidate", lambda found: output.share(found, "candidate_accuracy")),
    ("secs", lambda found: f"{found.seconds:.1f}" if found.HasField("seconds") else "–"),
    ("up", lambda found: output.size(found.bytes_up)),
    ("down", lambda found: output.size(found.bytes_down)),
    ("reason", lambda found: found.reason),
]


@verb(TASKS, "create", "umbel tasks create --file task.toml", changes=True)
def create_task(
    session: Session,
    file: Annotated[Path | None, typer.Option("--file", help="The task as TOML; options go before it.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The task's name.")] = None,
    population: Annotated[str | None, typer.Option("--population", help="The devices that it is for.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model that it trains.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Rounds to run.")] = None,
    goal: Annotated[int | None, typer.Option("--goal", help="Reports wished for in a round.")] = None,
    minimum: Annotated[int | None, typer.Option("--minimum", help="Fewest reports that count.")] = None,
    deadline: Annotated[float | None, typer.Option("--deadline", help="Seconds until a round's last moment.")] = None,
    strategy: Annotated[str | None, typer.Option("--strategy", help="A Flower strategy: FedAvg, FedAdam …")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over a device's examples.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Examples in a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate on the devices.")] = None,
    clip_norm: Annotated[float | None, typer.Option("--clip-norm", help="Largest norm of one device's delta.")] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Know only sums of updates (the default; needs a helper), or read each device's update.",
        ),
    ] = None,
    privacy: Annotated[
        list[str] | None,
        typer.Option(
            "--privacy",
            metavar="KEY=VALUE",
            help="A setting of its secret sums, such as noise_multiplier=1 or clip_quantile=0.5; again for more.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="What all chance is drawn from.")] = None,
) -> None:
    """Create a task; its first round opens at once. docs/reference/umbel-cli.md shows a whole file."""
    chosen = {
        "name": name,
        "population": population,
        "model": model,
        "rounds": rounds,
        "goal": goal,
        "minimum": minimum,
        "deadline_seconds": deadline,
        "updates_private": private,
        "seed": seed,
    }
    plan = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "clip_norm": clip_norm}
    spec = read_task(file, chosen, plan, strategy, settings_of(privacy or []))
    _show_task(session, session.stub.CreateTask(pb.CreateTaskRequest(spec=spec, **session.call)).task)


@verb(TASKS, "list", "umbel tasks list --json")
def list_tasks(session: Session) -> None:
    """List the tasks."""
    answer = session.stub.ListTasks(pb.ListTasksRequest())
    session.rows("", answer, answer.tasks, TASK_COLUMNS)


@verb(TASKS, "show", "umbel tasks show shoulder")
def show_task(session: Session, name: Name) -> None:
    """Show a task with its plan, strategy and validation."""
    _show_task(session, session.stub.GetTask(pb.GetTaskRequest(name=name)).task)


@verb(TASKS, "privacy", "umbel tasks privacy shoulder")
def task_privacy(session: Session, name: Name) -> None:
    """Show what a task's rounds cost in privacy: spent, left, after one more; and whether noise drowns all."""
    answer = session.stub.GetTaskPrivacy(pb.GetTaskPrivacyRequest(name=name))
    session.show(answer, lambda: _privacy_table(answer))


def _privacy_table(told: pb.GetTaskPrivacyResponse) -> Any:
    rest = max(0.0, told.budget - told.epsilon_spent)
    left = f"{rest:.3g} of {told.budget:.3g}" if told.budget else "no budget was set"
    facts = [("updates", _who_sees(told.private))]
    facts += [("trust", told.trust)]
    if told.private:
        facts += [
            ("on the wire", _on_the_wire(told)),
            ("clip", _clip(told)),
            ("noise", f"{told.noise_multiplier:.3g} sensitivities a round" if told.noise_multiplier else "none"),
            ("signal to noise", f"{told.signal_to_noise:.3g} at best"),
            ("rounds", str(told.rounds)),
            ("epsilon spent", f"{told.epsilon_spent:.3g} at delta {told.delta:g}"),
            ("left", left),
            ("after another round", f"{told.epsilon_next:.3g}"),
        ]
    return output.table("", [("", lambda fact: fact[0]), ("", lambda fact: fact[1])], facts)


def _who_sees(private: bool) -> str:
    return "only their sums are known" if private else "the coordinator reads each one"


def _on_the_wire(told: pb.GetTaskPrivacyResponse) -> str:
    if not told.clip_norm:
        return "metrics only"
    return f"{told.ring_bits} bits a number, {told.bytes_per_weight:.3f} bytes a weight"


def _clip(told: pb.GetTaskPrivacyResponse) -> str:
    if not told.clip_norm:
        return "none: no weights are sent"
    if not told.clip_quantile:
        return f"{told.clip_norm:.4g}"
    return f"{told.clip_norm:.4g} next, moving to where {told.clip_quantile:.0%} of the devices stay below it"


@verb(TASKS, "pause", "umbel tasks pause shoulder", changes=True)
def pause_task(session: Session, name: Name) -> None:
    """Let the open round end, and begin no new one."""
    _show_task(session, session.stub.PauseTask(pb.PauseTaskRequest(name=name, **session.call)).task)


@verb(TASKS, "resume", "umbel tasks resume shoulder", changes=True)
def resume_task(session: Session, name: Name) -> None:
    """Let a paused task go on."""
    _show_task(session, session.stub.ResumeTask(pb.ResumeTaskRequest(name=name, **session.call)).task)


@verb(TASKS, "stop", "umbel tasks stop shoulder", changes=True)
def stop_task(session: Session, name: Name) -> None:
    """End a task for good, and its open round with it."""
    _show_task(session, session.stub.StopTask(pb.StopTaskRequest(name=name, **session.call)).task)


def _show_task(session: Session, task: pb.Task) -> None:
    facts = [(heading, text(task)) for heading, text in TASK_COLUMNS]
    facts += [
        ("minimum", str(task.spec.minimum)),
        ("deadline", f"{task.spec.deadline_seconds:g} s"),
        ("channel", task.spec.channel or "–"),
        ("plan", output.plan(output.to_tree(task.spec.plan))),
        ("arguments", _arguments(task.spec.strategy.arguments)),
        ("validation", _arguments(task.spec.validation)),
        ("updates", _who_sees(not task.spec.updates_are_public)),
        ("privacy", _arguments(task.spec.privacy)),
        ("created (UTC)", output.instant(task.created_at_ms)),
    ]
    session.facts(task, facts)


def _arguments(arguments: Any) -> str:
    return output.settings({name: output.plain(arguments[name]) for name in sorted(arguments)})


TaskOption = Annotated[str, typer.Option("--task", help="Only this task's.")]


@verb(ROUNDS, "list", "umbel rounds list --watch")
def list_rounds(
    session: Session,
    task: TaskOption = "",
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1, max=10_000)] = 30,
    watch: Watch = False,
) -> None:
    """List rounds, newest first."""
    request = pb.ListRoundsRequest(task=task, limit=limit)
    if watch:
        session.follow(lambda: session.stub.ListRounds(request), _rounds)
        return
    answer = session.stub.ListRounds(request)
    session.show(answer, lambda: _rounds(answer))


def _rounds(answer: pb.ListRoundsResponse) -> Table:
    return output.table("", ROUND_COLUMNS, answer.rounds)


@verb(ROUNDS, "show", "umbel rounds show shoulder 3")
def show_round(
    session: Session,
    task: Name,
    number: Annotated[int, typer.Argument(metavar="ROUND", help="The round's number.", min=1)],
) -> None:
    """Show one round."""
    found = session.stub.GetRound(pb.GetRoundRequest(task=task, number=number)).round
    facts = [(heading, text(found)) for heading, text in ROUND_COLUMNS]
    facts += [
        ("sessions", f"{found.assigned} assigned: {found.reports} reported, {found.open} open, "
                     f"{found.expired} expired, {found.aborted} aborted, {found.failed} failed"),
        ("minimum", str(found.minimum)),
        ("one report", _per_weight(found)),
        ("metrics of base", output.metrics(found.metrics)),
        ("of candidate", output.metrics(found.candidate_metrics)),
        ("opened (UTC)", output.instant(found.opened_at_ms)),
        ("deadline (UTC)", output.instant(found.deadline_ms)),
        ("ended (UTC)", output.instant(found.ended_at_ms)),
    ]  # fmt: skip
    session.facts(found, facts)


def _per_weight(found: pb.Round) -> str:
    return f"{found.bytes_per_weight:.3f} bytes a weight" if found.HasField("bytes_per_weight") else "–"


@verb(ROUNDS, "watch", "umbel rounds watch --json")
def watch_rounds(session: Session) -> None:
    """Print what happens from now on, one line each, until Ctrl-C."""
    with until_interrupted():
        for happening in session.stub.Watch(pb.WatchRequest()):
            _print_happening(session, happening)


def _print_happening(session: Session, happening: pb.WatchResponse) -> None:
    tree = output.to_tree(happening) | {"detail": json.loads(happening.detail or "{}")}
    if session.as_json:
        output.print_json_line(tree)
        return
    told = {name: value for name, value in tree["detail"].items() if value not in ("", {})}
    line = f"{output.instant(happening.at_ms)}  {happening.kind:<20} {happening.subject}  {output.settings(told)}"
    output.console().print(line, markup=False)
