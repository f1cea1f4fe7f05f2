"""What each command of `umbel-device` does."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from umbel.clock import SystemClock
from umbel.errors import BadInput, MalformedMessage, NotFound, UmbelError
from umbel.helper_card import HelperCard
from umbel.home import in_home
from umbel.manifest import Manifest
from umbel_client import enrolling
from umbel_client.config import load_config
from umbel_client.device import Device
from umbel_client.enrolment import EnrolmentCode, load_identity
from umbel_client.files import Disk
from umbel_client.idle import Waiting
from umbel_client.importing import import_npz, read_inputs
from umbel_client.kit import Memory
from umbel_client.opening import examples_on_disk, mirror_of, runtime_of
from umbel_client.private import in_words, load_pinned
from umbel_client.report import describe, instant, read_report, releases_in_words, slots_in_words
from umbel_client.shelf import Shelf
from umbel_client.status import FileStatus
from umbel_client.visits import Ending, Visit

Command = Callable[[argparse.Namespace], int]


def enrol(options: argparse.Namespace) -> int:
    """Make a key, redeem the token, keep the certificate."""
    helper = _helper(options)
    identity = asyncio.run(
        enrolling.enrol(
            options.home, _enrolment_code(options), channel=options.channel, helper=helper, again=options.again
        )
    )
    _say(f"enrolled as {identity.device_id} in population {identity.population!r}; home: {options.home}")
    if helper is None:
        _say("no helper is pinned: the coordinator can read each update that this device sends")
    return 0


def _helper(options: argparse.Namespace) -> tuple[HelperCard, str] | None:
    if options.helper is None and options.helper_token is None:
        return None
    if options.helper is None or options.helper_token is None:
        raise BadInput("give --helper and --helper-token together, or neither")
    try:
        card = HelperCard.from_text(options.helper.read_bytes())
    except OSError as error:
        raise NotFound(f"no helper's card at {options.helper} ({error.strerror}); ask who runs it") from None
    return card, _or_file(options.helper_token)


def _enrolment_code(options: argparse.Namespace) -> EnrolmentCode:
    if options.code:
        return EnrolmentCode.from_text(_or_file(options.code))
    if not (options.server and options.token and options.ca):
        raise BadInput("give --server, --token and --ca, or --code")
    try:
        authority = options.ca.read_bytes()
    except OSError as error:
        raise NotFound(f"no authority at {options.ca} ({error.strerror}); ask the operator for it") from None
    return EnrolmentCode(options.server, _or_file(options.token), authority)


def run(options: argparse.Namespace) -> int:
    """Run the agent."""
    from umbel_client.agent import Agent, Until

    if options.max_visits < 0 or options.until_release < 0:
        raise BadInput("--max-visits and --until-release take numbers from 1 on")
    until = Until(1 if options.once else options.max_visits, options.until_release)
    tell = _tell_json if options.json else _tell
    heard = tell if options.once else _if_it_can(tell)

    async def live() -> Visit | None:
        with closing(_device(options)) as device:
            return await Agent(device, heard).run(until)

    visit = asyncio.run(live())
    return 1 if options.once and visit is not None and visit.ending is Ending.FAILED else 0


def status(options: argparse.Namespace) -> int:
    """Tell what the device holds and has done, whether its agent runs or not."""
    home = options.home
    identity, config = load_identity(home), load_config(home)
    store = examples_on_disk(home, config.examples)
    memory = Memory(home, Disk())
    tree = describe(
        identity, memory.known, memory.state, Shelf(home / "shelf").slots, store, config.policy, SystemClock().now()
    )
    tree = {**read_report(home), **tree, "updates": in_words(load_pinned(home))}
    if options.json:
        _say(json.dumps(tree, indent=2))
        return 0
    width = max(map(len, tree))
    tree["slots"] = slots_in_words(tree["slots"])
    for name in ("last_contribution", "next_wake"):
        tree[name] = instant(tree[name]) if tree.get(name) else None
    for name, value in tree.items():
        lines = releases_in_words(value) or ["-"] if name == "releases" else [_in_words(value)]
        _say(f"{name:<{width}}  " + f"\n{'':<{width}}  ".join(lines))
    return 0


def predict(options: argparse.Namespace) -> int:
    """Answer for the inputs in a file."""
    with closing(_device(options)) as device:
        return _answer(device, read_inputs(options.file), options)


def _answer(device: Device, inputs: Any, options: argparse.Namespace) -> int:
    if device.predictor.labels:
        ranked = device.probabilities(inputs)
        if options.json:
            _say(json.dumps(ranked))
        else:
            for row in ranked:
                _say("  ".join(f"{label} {share:.1%}" for label, share in list(row.items())[:3]))
        return 0
    for name, array in device.predict(inputs).items():
        _say(json.dumps({name: array.tolist()}) if options.json else f"{name}\n{array}")
    return 0


def examples_import(options: argparse.Namespace) -> int:
    """Add the examples of an archive."""
    config = load_config(options.home)
    store = examples_on_disk(_home(options), config.examples)
    manifest = _manifest(options.home, config.runtime.name)
    added = import_npz(store, options.file, at=SystemClock().now(), subject=options.subject, manifest=manifest)
    _say(f"{added} examples added")
    return 0


def _manifest(home: Path, runtime: str) -> Manifest | None:
    """Of the model that the device has, if it has one that can be read."""
    shelf = Shelf(home / "shelf")
    active = shelf.slots.active
    try:
        return None if active is None else shelf.bundle(active.bundle, runtime).manifest
    except UmbelError:
        return None


def examples_stats(options: argparse.Namespace) -> int:
    """Count the examples."""
    held = examples_on_disk(_home(options), load_config(options.home).examples).stats(SystemClock().now())
    tree = {
        "training": held.training, "held_back": held.held_back, "bytes": held.bytes, "subjects": dict(held.subjects),
    }  # fmt: skip
    if options.json:
        _say(json.dumps(tree, indent=2))
        return 0
    _say(f"{held.training} for training, {held.held_back} held back, {held.bytes} bytes")
    for subject, count in sorted(held.subjects.items()):
        _say(f"  {subject or '(no subject)'}: {count}")
    return 0


def examples_forget(options: argparse.Namespace) -> int:
    """Delete examples and what was derived from them."""
    with closing(_device(options)) as device:
        gone = device.forget(None if options.all else options.subject)
    _say(f"{gone} examples deleted, and what was derived from them here")
    return 0


def why(options: argparse.Namespace) -> int:
    """Tell the idle policy's verdict."""
    with closing(_device(options)) as device:
        verdict = device.verdict()
    works = not isinstance(verdict, Waiting)
    offers = works and not verdict.reasons
    if options.json:
        _say(json.dumps({"eligible": works, "offers_work": offers, "reasons": list(verdict.reasons)}, indent=2))
        return 0
    if not works:
        _say("this device waits, because:")
    elif verdict.reasons:
        _say("this device may visit its coordinator, but offers no work, because:")
    else:
        _say("this device may work now: every condition holds")
    for reason in verdict.reasons:
        _say(f"  - {reason}")
    return 0


def _device(options: argparse.Namespace) -> Device:
    config = load_config(options.home, getattr(options, "config", None))
    status_file = getattr(options, "status_file", None)
    return Device.open(
        options.home,
        identity=load_identity(options.home),  # before anything is made: a mistyped home stays none
        policy=config.policy,
        personal=config.personal,
        status=FileStatus(status_file) if status_file else None,
        examples=examples_on_disk(options.home, config.examples),
        runtime=runtime_of(config.runtime),
        mirror=mirror_of(config.mirror),
        privacy=config.privacy,
    )


def _home(options: argparse.Namespace) -> Path:
    home: Path = options.home
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home


def _if_it_can(tell: Callable[[Visit], None]) -> Callable[[Visit], None]:
    """An agent whose log lies on a full disk goes on without a word; one whose reader is gone ends."""

    def told(visit: Visit) -> None:
        try:
            tell(visit)
        except BrokenPipeError:
            raise
        except OSError:
            return

    return told


def _tell(visit: Visit) -> None:
    parts = [visit.ending.value]
    if visit.session:
        parts.append(f"{visit.session.task} round {visit.session.round} {visit.session.shape}")
    if visit.release:
        parts.append(f"release {visit.release.number} {visit.release.outcome.value} {visit.release.reason}".rstrip())
    parts += visit.reasons
    if visit.error:
        parts.append(str(visit.error))
    _say("; ".join(parts) + f"; next in {visit.next_wake - visit.at:.1f} s")


def _tell_json(visit: Visit) -> None:
    tree = {
        "ending": visit.ending.value,
        "at": visit.at,
        "next_wake": visit.next_wake,
        "reasons": list(visit.reasons),
        "release": visit.release and {"number": visit.release.number, "outcome": visit.release.outcome.value},
        "session": visit.session and {"round": visit.session.round, "shape": visit.session.shape},
        "error": visit.error and visit.error.code,
    }
    _say(json.dumps(tree))


def _or_file(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return in_home(text[1:]).read_text().strip()
    except OSError as error:
        raise NotFound(f"can't read {text[1:]} ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise MalformedMessage(f"{text[1:]} isn't text: {error}") from None


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None or value == "" else json.dumps(value) if isinstance(value, dict | list) else str(value)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
