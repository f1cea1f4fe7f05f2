"""Transient failures come back soon and ever later; permanent ones wait hours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.errors import (
    BY_CODE,
    CertificateRefused,
    DigestMismatch,
    Interrupted,
    MalformedMessage,
    NotFound,
    SignatureInvalid,
    UmbelError,
    Unavailable,
    Unreachable,
)
from umbel_client.backoff import LONGEST_SECONDS, retry_window


@pytest.mark.parametrize("kind", [Unreachable, Unavailable, DigestMismatch, UmbelError])
def test_transient_failures_grow_from_seconds_to_a_quarter_of_an_hour(kind: type[UmbelError]) -> None:
    latest = [retry_window(kind("x"), failures).latest for failures in range(1, 20)]
    assert latest[0] == 4.0
    assert latest == sorted(latest)
    assert latest[-1] == LONGEST_SECONDS


@pytest.mark.parametrize("kind", [NotFound, MalformedMessage, SignatureInvalid, CertificateRefused])
def test_permanent_failures_wait_hours(kind: type[UmbelError]) -> None:
    assert retry_window(kind("x"), 1).earliest >= 3600


def test_an_interruption_is_no_failure() -> None:
    assert retry_window(Interrupted("x"), 12) == retry_window(Interrupted("x"), 1)


@given(st.sampled_from(sorted(BY_CODE)), st.integers(-1, 10**9))
def test_every_error_has_a_window_with_room_for_jitter(code: str, failures: int) -> None:
    window = retry_window(BY_CODE[code]("x"), failures)
    assert 0 < window.earliest < window.latest <= 4 * 3600
