"""`umbel`: the coordinator and its operators' verbs.

Exit codes: 0 done, 1 refused (the message says why and what to do), 2 the command line doesn't make sense.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING

from umbel.errors import UmbelError, unusable
from umbel.program import take_streams
from umbel.version import VERSION

if TYPE_CHECKING:
    import click

_ABOUT = """Run a coordinator, and operate it.

A first federation:

1. umbel init umbel-state

2. umbel serve

3. umbel models add BUNDLE_DIR --name smartwatch

4. umbel devices tokens create --population watches --count 20 --codes

5. umbel tasks create --name shoulder --population watches --model smartwatch --rounds 15 --goal 16 --public

6. umbel rounds list --watch

Exit codes: 0 done, 1 refused (the message says why), 2 the command line doesn't make sense.
"""


@cache
def program() -> click.Command:
    """The whole command line; kept, as the signatures of a hundred verbs take a tenth of a second to read."""
    import click
    import typer
    from typer.main import get_command

    from umbel_server.cli import (
        auditing,
        ceremony,
        drift,
        fleet,
        listing,
        models,
        people,
        releases,
        rollouts,
        rounds,
        serving,
        status,
    )
    from umbel_server.cli import helper as helper_verbs

    verbs = typer.Typer(
        name="umbel", help=_ABOUT, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    serving.add_to(verbs)
    for group in (models.MODELS, models.VERSIONS, releases.RELEASES, rounds.TASKS, rounds.ROUNDS):
        verbs.add_typer(group)
    for group in (rollouts.ROLLOUTS, rollouts.APPROVALS, listing.KEYS):
        verbs.add_typer(group)
    for group in (fleet.DEVICES, people.OPERATORS, auditing.AUDIT, helper_verbs.HELPER):
        verbs.add_typer(group)
    ceremony.add_to(listing.KEYS)
    drift.add_to(rounds.TASKS)
    status.add_to(verbs)
    return click.version_option(VERSION, message=f"umbel {VERSION}")(get_command(verbs))


def main() -> None:
    """Entry point of `umbel`."""
    take_streams()
    try:
        program()()
    except ModuleNotFoundError as missing:
        extras = "server,postgres" if missing.name == "psycopg" else "server"
        raise SystemExit(f"umbel needs {missing.name}: pip install 'umbel[{extras}]'") from missing
    except UmbelError as error:
        sys.stderr.write(f"umbel: {error}\n")
        raise SystemExit(1) from error
    except OSError as error:
        sys.stderr.write(f"umbel: {unusable(error)}\n")
        raise SystemExit(1) from error
