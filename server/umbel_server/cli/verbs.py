"""How a verb is made: one function with its own options, given a `Session` to ask the coordinator through.

`verb` adds what all of them share: --state, --identity, --server, --json, and what a token needs.
"""

from __future__ import annotations

import inspect
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer
from google.protobuf.message import Message
from rich.live import Live

from umbel.errors import MalformedMessage
from umbel.v1.admin_pb2_grpc import AdminServiceStub
from umbel_server.cli import output
from umbel_server.cli.connection import caller_of, connect, state_folder
from umbel_server.identity import Addresses, Identity

REFRESH_SECONDS: Final = 1.0

State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        envvar="UMBEL_STATE",
        help="The coordinator's folder, on its own machine.",
        show_default="umbel-state",
    ),
]
_IdentityOption = Annotated[
    Path | None,
    typer.Option("--identity", envvar="UMBEL_IDENTITY", help="Folder of the operator's identity to call with."),
]
_ServerOption = Annotated[str, typer.Option("--server", envvar="UMBEL_SERVER", help="host:port of the admin port.")]
_TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="UMBEL_TOKEN", help="A token of the team's identity provider, to call with instead."
    ),
]
_TokenFileOption = Annotated[
    Path | None, typer.Option("--token-file", envvar="UMBEL_TOKEN_FILE", help="The file that holds the token.")
]
_AuthorityOption = Annotated[
    Path | None,
    typer.Option(
        "--server-authority", envvar="UMBEL_SERVER_AUTHORITY", help="With a token: the coordinator's authority, PEM."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Watch = Annotated[bool, typer.Option("--watch", help="Keep showing what changes, until Ctrl-C.")]


@dataclass(frozen=True)
class Session:
    """One command's connection, and how it should print."""

    stub: AdminServiceStub
    identity: Identity
    state: Path
    as_json: bool
    call: Mapping[str, Any] = field(default_factory=dict)
    """How a change is asked for: `request_id` and `expected_revision`, for its message."""

    def enrol_address(self) -> str:
        """Where devices enrol, if the coordinator runs on this machine; raises `NotFound` if not."""
        return Addresses.read(self.state).enrol

    def show(self, answer: Message, render: Callable[[], Any]) -> None:
        """Print an answer: as JSON, or as `render` draws it."""
        if self.as_json:
            output.print_json(output.to_tree(answer))
        else:
            output.console().print(render())

    def rows(self, title: str, answer: Message, rows: Sequence[Message], columns: Sequence[output.Column]) -> None:
        """Print a list: as JSON, or as a table."""
        self.show(answer, lambda: output.table(title, columns, rows))

    def facts(self, message: Message, facts: Sequence[tuple[str, str]]) -> None:
        """Print one thing: as JSON, or as a list of facts."""
        self.show(message, lambda: output.table("", [("", lambda fact: fact[0]), ("", lambda fact: fact[1])], facts))

    def follow(self, ask: Callable[[], Message], render: Callable[[Any], Any]) -> None:
        """Ask again and again, and show what changes: a JSON document a line, or a live table."""
        with until_interrupted():
            if self.as_json:
                self._follow_json(ask)
            with Live(console=output.console(), auto_refresh=False) as live:
                while True:
                    live.update(render(ask()), refresh=True)
                    time.sleep(REFRESH_SECONDS)

    def _follow_json(self, ask: Callable[[], Message]) -> NoReturn:
        last = None
        while True:
            tree = output.to_tree(ask())
            if tree != last:
                output.print_json_line(tree)
                last = tree
            time.sleep(REFRESH_SECONDS)


@contextmanager
def until_interrupted() -> Iterator[None]:
    """What is watched ends by Ctrl-C, and that is no failure."""
    with suppress(KeyboardInterrupt):
        yield


@contextmanager
def _understood() -> Iterator[None]:
    """A coordinator of another version may leave out of an answer what a verb shows: that is no traceback."""
    try:
        yield
    except (LookupError, TypeError, ValueError) as error:
        raise MalformedMessage(
            f"this umbel can't make out the coordinator's answer ({error!r}); are both of the same version?"
        ) from error


_SHARED: Final = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, annotation, default in (
        ("state", State, None),
        ("identity", _IdentityOption, None),
        ("server", _ServerOption, ""),
        ("token", _TokenOption, None),
        ("token_file", _TokenFileOption, None),
        ("server_authority", _AuthorityOption, None),
        ("as_json", Json, False),
    )
)


_CHANGING: Final = tuple(
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, annotation, default in (
        (
            "request_id",
            Annotated[str, typer.Option("--request-id", help="Names this call, so that it can be made again safely.")],
            "",
        ),
        (
            "expected_revision",
            Annotated[
                int | None,
                typer.Option("--expected-revision", help="Refuse if it has changed since it was at this revision."),
            ],
            None,
        ),
    )
)


def verb(
    group: typer.Typer, called: str, example: str, *, changes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `function(session, …)` a command of `group`; its docstring and the example are its help.

    One that `changes` something takes --request-id and --expected-revision too, and sends `session.call`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def command(
            *,
            state: Path | None,
            identity: Path | None,
            server: str,
            token: str | None,
            token_file: Path | None,
            server_authority: Path | None,
            as_json: bool,
            **options: Any,
        ) -> None:
            caller = caller_of(identity, token, token_file, server_authority)
            folder = Path() if server and not caller.needs_folder else state_folder(state)
            with connect(folder, caller, server) as (stub, who):
                call = _call(options) if changes else {}
                with _understood():
                    function(Session(stub, who, folder, as_json, call), **options)

        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        taken = (*parameters, *(_CHANGING if changes else ()), *_SHARED)
        command.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in taken}
        command.__doc__ = f"{inspect.getdoc(function)}\n\nExample: {example}"
        command.__name__ = function.__name__
        group.command(called)(command)
        return function

    return decorate


def _call(options: dict[str, Any]) -> dict[str, Any]:
    request_id, seen = options.pop("request_id"), options.pop("expected_revision")
    return {"request_id": request_id or secrets.token_hex(16)} | ({} if seen is None else {"expected_revision": seen})


def group(called: str, about: str) -> typer.Typer:
    """A group of verbs."""
    return typer.Typer(name=called, help=about, no_args_is_help=True)
