"""`umbel-device`: enrol a device, run its agent, and ask it what it does and why."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Final

from umbel.errors import UmbelError, unusable
from umbel.home import in_home
from umbel.memory import give_back_what_is_freed
from umbel.program import take_streams
from umbel.version import VERSION
from umbel_client import commands

_ABOUT: Final = """\
Enrol this machine as a device, run its agent, and ask it what it does and why.

A new device, step by step:
  umbel-device enrol --server fleet.example:7444 --token TOKEN --ca ca.pem
  umbel-device examples import mine.npz
  umbel-device why
  umbel-device run
"""
_EXIT: Final = "exit codes: 0 done, 1 refused or failed (the reason on stderr), 2 wrong usage"


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    take_streams()
    try:
        options = _parser().parse_args(arguments)
        give_back_what_is_freed()
        return int(options.command(options))
    except UmbelError as error:
        sys.stderr.write(f"umbel-device: {error}\n")
        return 1
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this, Python complains again while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sys.stderr.write(f"umbel-device: {unusable(error)}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "umbel-device", description=_ABOUT, epilog=_EXIT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"umbel-device {VERSION}")
    parser.add_argument(
        "--home",
        type=in_home,
        default=os.environ.get("UMBEL_DEVICE_HOME") or "~/.umbel/device",
        help="the device's folder (default: $UMBEL_DEVICE_HOME, or ~/.umbel/device)",
    )
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_enrol(verbs)
    _add_run(verbs)
    _add_predict(verbs)
    _add_examples(verbs)
    status = _command(verbs, "status", "what the device holds, answers with and has done", commands.status)
    _json(status)
    why = _command(verbs, "why", "may the device work now, and if not, why not", commands.why)
    _conditions(why)
    _json(why)
    return parser


_Verbs = argparse._SubParsersAction  # the type has no public name


def _command(
    verbs: _Verbs[argparse.ArgumentParser], name: str, about: str, function: commands.Command, example: str = ""
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example:\n{example}" if example else _EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=function)
    return parser


def _add_enrol(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    parser = _command(
        verbs,
        "enrol",
        "redeem an enrolment token for a certificate",
        commands.enrol,
        "  umbel-device enrol --server fleet.example:7444 --token TOKEN --ca ca.pem\n"
        "  umbel-device enrol --code umbel-enrol-1.eyJzZXJ2ZXIi...",
    )
    parser.add_argument("--server", metavar="HOST:PORT", help="the coordinator's enrolment port")
    parser.add_argument("--token", help="single-use token, or @FILE that holds it")
    parser.add_argument("--ca", type=Path, metavar="PEM", help="the coordinator's authority, got out of band")
    parser.add_argument("--code", help="all three in one string, or @FILE that holds it")
    parser.add_argument("--channel", default="stable", help="release channel to follow (default: stable)")
    parser.add_argument("--helper", type=Path, metavar="CARD", help="the helper's card, got from whoever runs it")
    parser.add_argument("--helper-token", metavar="TOKEN", help="the helper's own token, or @FILE that holds it")
    parser.add_argument("--again", action="store_true", help="replace an identity that this home has already")


def _add_run(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    parser = _command(
        verbs,
        "run",
        "run the agent: visit the coordinator whenever due, until told to stop",
        commands.run,
        "  umbel-device run                     until SIGTERM or Ctrl-C\n"
        "  umbel-device run --once              one visit, now",
    )
    _conditions(parser)
    parser.add_argument("--once", action="store_true", help="make one visit now and end")
    parser.add_argument("--max-visits", type=int, default=0, metavar="N", help="end after N visits")
    parser.add_argument("--until-release", type=int, default=0, metavar="N", help="end once release N was judged")
    _json(parser)


def _add_predict(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    parser = _command(
        verbs,
        "predict",
        "answer for the inputs in a file, on this device",
        commands.predict,
        "  umbel-device predict window.npy      one array, batch first\n"
        "  umbel-device predict inputs.npz      arrays by input name",
    )
    parser.add_argument("file", type=Path, help=".npy with one input, or .npz with inputs by name")
    _json(parser)


def _add_examples(verbs: _Verbs[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("examples", help="what the device learns from: import, stats, forget")
    nested = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = _command(
        nested,
        "import",
        "add the examples of a NumPy archive",
        commands.examples_import,
        "  umbel-device examples import mine.npz --subject anna\n\n"
        "The archive holds `x` and `y`, batch first, and may hold `held_back` (one boolean each).",
    )
    add.add_argument("file", type=Path, help=".npz with inputs and targets by name")
    add.add_argument("--subject", default="", help="whom they are about, for `examples forget`")
    stats = _command(nested, "stats", "how many examples there are", commands.examples_stats)
    _json(stats)
    forget = _command(
        nested,
        "forget",
        "delete a person's examples, and all that was derived from them here, at once",
        commands.examples_forget,
        "  umbel-device examples forget --subject anna\n  umbel-device examples forget --all",
    )
    who = forget.add_mutually_exclusive_group(required=True)
    who.add_argument("--subject")
    who.add_argument("--all", action="store_true")


def _conditions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings (default: device.toml in the home)")
    parser.add_argument(
        "--status-file", type=Path, metavar="JSON", help="take the device's status from this file, not from the machine"
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="answer in JSON")


if __name__ == "__main__":
    sys.exit(main())
