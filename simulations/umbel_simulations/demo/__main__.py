"""`python -m umbel_simulations.demo`: the main job, for people to watch."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from umbel.errors import UmbelError, unusable
from umbel.holding import held
from umbel.program import take_streams
from umbel_simulations.demo.board import rollout_table, summary
from umbel_simulations.demo.page import megabytes
from umbel_simulations.demo.results import Results
from umbel_simulations.demo.run import Options, run

_ABOUT = "Start a coordinator and a fleet of device processes on this machine, and let them learn from real recordings."


def main() -> int:
    """Run the demo; returns 0, or 1 when something refused, or 130 after Ctrl-C."""
    take_streams()
    options = _options()
    console = Console(emoji=False)
    for ends in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ends) is signal.SIG_DFL:
            signal.signal(ends, _interrupt)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        alone = held(options.folder, f"another demo runs in {options.folder}; end it, or choose a folder by --folder")
        with alone, Live(console=console, refresh_per_second=4, transient=False) as live:
            results = run(options, live)
    except KeyboardInterrupt:
        console.print("stopped; nothing is left running")
        return 130
    except (UmbelError, OSError) as error:
        words = str(error) if isinstance(error, UmbelError) else unusable(error)
        console.print(f"[red]the demo failed:[/] {escape(words)}", highlight=False)
        return 1
    _tell(console, results, options.folder)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options() -> Options:
    parser = argparse.ArgumentParser("python -m umbel_simulations.demo", description=_ABOUT)
    usual = Options(Path("build/demo"))
    parser.add_argument("--folder", type=Path, default=usual.folder, help="where all state and the report go")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="training rounds")
    parser.add_argument("--devices", type=int, default=usual.devices, help="device processes, 2 to 20")
    public = "no helper: the coordinator reads each update (to compare; private rounds are the default)"
    parser.add_argument("--public", action="store_true", help=public)
    chosen = parser.parse_args()
    if chosen.rounds < 2 or not 2 <= chosen.devices <= 20:
        parser.error("give 2 rounds or more, and 2 to 20 devices")
    return Options(chosen.folder, chosen.rounds, chosen.devices, private=not chosen.public)


def _tell(console: Console, results: Results, folder: Path) -> None:
    console.print(summary(results))
    console.print(rollout_table(results))
    here = escape(str(folder))
    console.print(
        f"\n{len(results.rounds)} rounds in {results.seconds:.0f} s; {megabytes(results.bytes_up)} up, "
        f"{megabytes(results.bytes_down)} down; report: {here}/report.html",
        highlight=False,
    )
    newest = max(entry.version for entry in results.rounds)
    console.print(f"\nEverything lies in {here}. What to try next:", highlight=False)
    for command, meaning in (
        (f"umbel serve --state {folder / 'state'}", "the coordinator again, as it was"),
        (
            f"umbel versions lineage smartwatch {newest} --state {folder / 'state'}",
            "where it came from, while it serves",
        ),
        (f"umbel-device --home {folder / 'devices' / results.devices[0].name} status", "what a device holds"),
        ("docs/tutorials/first-federation.md", "your own data and your own model"),
    ):
        console.print(f"  {escape(command)}\n      [dim]{meaning}[/]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
