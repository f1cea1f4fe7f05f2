"""No release is believed that is foreign, changed, older than one seen, or meant for others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from umbel.digests import digest_of
from umbel.errors import MalformedMessage, NotAllowed, RollbackRefused, SignatureInvalid, UmbelError
from umbel.messages import release_to_bytes
from umbel.release import Release, SignedRelease, sign_statement
from umbel.visit import Outcome, ReleaseOutcome, SessionRecord
from umbel_client.files import Disk
from umbel_client.kit import Memory
from umbel_client.state import Decided, DeviceState, Fetched, Known, Scores, load_known, state_to_bytes
from umbel_client.trust import Seen, Trust

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
TRUST = Trust(KEY.public_key().public_bytes_raw())


def release(number: int = 5, content: bytes = b"bundle", model: str = "m", channel: str = "stable") -> Release:
    return Release(model, number, number, channel, digest_of(content), 100, 1_700_000_000.0)


def signed(statement: Release, key: Ed25519PrivateKey = KEY) -> SignedRelease:
    return sign_statement(release_to_bytes(statement), key)


def test_an_authentic_release_is_believed() -> None:
    assert TRUST.verify_newest(signed(release())) == release()


def test_a_foreign_key_is_refused() -> None:
    with pytest.raises(SignatureInvalid, match="trusts"):
        TRUST.verify_newest(signed(release(), Ed25519PrivateKey.generate()))


def test_a_foreign_key_under_the_trusted_name_is_refused() -> None:
    forged = replace(signed(release(), Ed25519PrivateKey.generate()), key_id=signed(release()).key_id)
    with pytest.raises(SignatureInvalid):
        TRUST.verify_newest(forged)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_flipped_bit_is_refused(place: int, bit: int) -> None:
    good = signed(release())
    flipped = bytearray(good.statement + good.signature)
    flipped[place % len(flipped)] ^= 1 << bit
    size = len(good.statement)
    with pytest.raises(SignatureInvalid):
        TRUST.verify_newest(SignedRelease(bytes(flipped[:size]), good.key_id, bytes(flipped[size:])))


def test_signed_nonsense_is_refused() -> None:
    for statement in (b"", b"nonsense", release_to_bytes(replace(release(), number=0))):
        with pytest.raises(MalformedMessage):
            TRUST.verify_newest(sign_statement(statement, KEY))


def test_a_signature_over_something_else_is_no_release() -> None:
    statement = release_to_bytes(release())
    plain = SignedRelease(statement, signed(release()).key_id, KEY.sign(statement))
    with pytest.raises(SignatureInvalid):
        TRUST.verify_newest(plain)


def test_an_older_release_is_refused_and_the_same_one_is_not() -> None:
    trust = TRUST.remember(release(5))
    assert trust.verify_newest(signed(release(5))).number == 5
    with pytest.raises(RollbackRefused, match="older"):
        trust.verify_newest(signed(release(4)))


def test_the_same_number_with_another_content_is_refused() -> None:
    trust = TRUST.remember(release(5))
    with pytest.raises(RollbackRefused, match="another content"):
        trust.verify_newest(signed(release(5, b"other bundle")))


def test_another_channel_or_model_is_refused() -> None:
    with pytest.raises(NotAllowed, match="channel"):
        TRUST.verify_newest(signed(release(channel="beta")))
    with pytest.raises(NotAllowed, match="model"):
        TRUST.remember(release()).verify_newest(signed(release(9, model="other")))


def test_a_base_may_be_of_any_channel_and_age_but_must_be_signed() -> None:
    trust = TRUST.remember(release(9))
    assert trust.verify_base(signed(release(2, channel="candidate"))).number == 2
    with pytest.raises(SignatureInvalid):
        trust.verify_base(signed(release(2), Ed25519PrivateKey.generate()))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_numbers_never_fall_whatever_is_offered(offers: list[int]) -> None:
    trust, accepted = TRUST, []
    for number in offers:
        try:
            trust = trust.remember(trust.verify_newest(signed(release(number, str(number).encode()))))
        except UmbelError:
            continue
        accepted.append(number)
    assert accepted == sorted(accepted)
    assert accepted[-1] == max(offers)


# What was seen is kept.


def test_known_releases_survive_and_a_damaged_file_is_not_taken_for_a_new_device(tmp_path: Path) -> None:
    memory = Memory(tmp_path, Disk())
    known = Known("m", {"m/stable": Seen(7, digest_of(b"x"))})
    memory.know(known)
    assert load_known(tmp_path / "known.json") == known
    for damage in (b"", b"{", b"[]", b'{"model": "m", "seen": {"m/stable": {"number": 7, "bundle": "../x"}}}'):
        (tmp_path / "known.json").write_bytes(damage)
        with pytest.raises(MalformedMessage, match="damaged"):
            Memory(tmp_path, Disk())


def test_a_damaged_history_starts_anew(tmp_path: Path) -> None:
    for damage in (b"", b"{", b"[1]", b'{"visits": 3}'):
        (tmp_path / "state.json").write_bytes(damage)
        assert Memory(tmp_path, Disk()).state == DeviceState()


def test_a_history_that_a_newer_version_wrote_is_kept_as_far_as_it_is_known(tmp_path: Path) -> None:
    """After a downgrade, a device would follow its offers again, and take up a second day's budgets."""
    state = DeviceState(
        judged=3,
        scores=Scores(release=3, serving=0.5),
        sessions=(SessionRecord("learn", 1, "-v", ""),),
        outcomes=(ReleaseOutcome("m", 3, Outcome.ADOPTED),),
        decided=(Decided(1.0, 3, "adopted", ""),),
        fetched=Fetched(bytes=7),
        bytes_today=9,
    )
    tree = json.loads(state_to_bytes(state))
    entries = (tree[name][0] for name in ("sessions", "outcomes", "decided"))
    for part in (tree, tree["scores"], tree["fetched"], *entries):
        part["of_a_newer_version"] = 1
    (tmp_path / "state.json").write_text(json.dumps(tree))
    assert Memory(tmp_path, Disk()).state == state
