"""Keys that lie elsewhere: drafts travel as files, between machines that share nothing else."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from tests.server.release_world import MODEL, NOW, ROLE, World, listed
from tests.server.test_cli import Umbel, done
from tests.server.test_cli import run as run
from umbel.clock import DAY
from umbel.errors import Expired
from umbel_server.folder import Folder
from umbel_server.keyring import Keyring
from umbel_server.renewal import due, renew
from umbel_server.repository import Repository, role_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.release(listed(1))
    return made


# Renewal.


async def test_offline_roles_are_renewed_before_devices_would_stop_following(world: World) -> None:
    device, year = world.device(), 400
    for day in range(0, year, 20):
        now = NOW + day * DAY
        renew(world.repository, now)
        world.repository.keep_fresh(now)
        await device.find(world.fetch, now, MODEL, 1)
    assert {it.role: it.version for it in world.repository.freshness()}["root"] > 1


async def test_without_renewal_they_do_stop(world: World) -> None:
    now = NOW + 91 * DAY
    world.repository.keep_fresh(now)
    with pytest.raises(Expired):
        await world.device().find(world.fetch, now, MODEL, 1)


def test_what_is_not_due_is_left_alone_and_what_cannot_be_signed_here_too(world: World, tmp_path: Path) -> None:
    assert due(world.repository, NOW + 40 * DAY) == []
    assert due(world.repository, NOW + 50 * DAY) == ["targets", ROLE]
    for key in world.keys.signers("targets")[:2]:
        world.keys.forget(key.public_key.keyid)
    assert renew(world.repository, NOW + 50 * DAY) == [ROLE]


# By hand, on three machines.


@pytest.fixture
def state(tmp_path: Path) -> Path:
    Folder.create(tmp_path / "state", (), time.time())
    return tmp_path / "state"


def moved_away(state: Path, role: str, to: Path) -> list[str]:
    """Move a role's keys to another machine; their files there."""
    to.mkdir(exist_ok=True)
    found = sorted(Folder(state).release_keys.glob(f"{role}-*.key"))
    return [shutil.move(path, to / path.name) for path in found]


def test_a_root_key_is_replaced_with_every_root_key_elsewhere(run: Umbel, state: Path, tmp_path: Path) -> None:
    here = ("--state", str(state))
    old = done(run("keys", "status", *here, "--json")).json["keys"][0]
    keys = moved_away(state, "root", tmp_path / "safe")
    new = done(run("keys", "new", str(tmp_path / "fresh.key"), "--json")).json["public"]
    draft = str(tmp_path / "root.json")
    assert run("keys", "rotate", "root", old["key_id"], *here, "--new", new).code == 1, "nowhere to write it"
    done(run("keys", "rotate", "root", old["key_id"], *here, "--new", new, "--draft", draft))
    for key in keys[:2]:
        done(run("keys", "sign", draft, "--key", key))
    few = run("keys", "publish", "root", draft, *here)
    assert few.code == 1 and "needs 3 of its signers" in few.err
    for key in keys[2:4]:
        done(run("keys", "sign", draft, "--key", key))
    done(run("keys", "publish", "root", draft, *here))
    after = [it["key_id"] for it in done(run("keys", "status", *here, "--json")).json["keys"] if it["role"] == "root"]
    assert len(after) == 5 and old["key_id"] not in after


def test_a_model_gets_signers_whose_keys_were_never_here(run: Umbel, state: Path, tmp_path: Path) -> None:
    here = ("--state", str(state))
    targets = moved_away(state, "targets", tmp_path / "safe")
    files = [str(tmp_path / f"signer-{number}.key") for number in range(3)]
    signers = [done(run("keys", "new", file, "--json")).json["public"] for file in files]
    draft, listing = str(tmp_path / "targets.json"), str(tmp_path / "listing.json")
    done(run("keys", "delegate", "m", *signers, "--draft", draft, *here))
    for key in targets[:2]:
        done(run("keys", "sign", draft, "--key", key))
    done(run("keys", "publish", "targets", draft, *here))
    done(run("keys", "renew", role_of("m"), "--draft", listing, *here))
    for key in files[:2]:
        done(run("keys", "sign", listing, "--key", key))
    done(run("keys", "publish", role_of("m"), listing, *here))
    repository = Repository(Folder(state).listing, Keyring(Folder(state).release_keys))
    assert repository.models() == ["m"] and repository.has_listing("m")
    refused = run("keys", "renew", "targets", *here)
    assert refused.code == 1 and "use --draft" in refused.err


def test_keys_are_never_overwritten_and_nonsense_is_no_key(run: Umbel, state: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "one.key")
    public = done(run("keys", "new", file)).out.strip()
    assert (len(public), Path(file).stat().st_mode & 0o777) == (64, 0o600)
    assert run("keys", "new", file).code == 1
    draft = ("--draft", str(tmp_path / "x"), "--state", str(state))
    assert run("keys", "delegate", "m", "zz", *draft).code == 1
    assert run("keys", "renew", "releases-nobody", *draft).code == 1
    done(run("keys", "renew", "targets", "--state", str(state)))
