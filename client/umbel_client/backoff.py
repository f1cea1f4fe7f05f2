"""When to come back after something went wrong. Pure, so that a simulation can tell a year of it in a second."""

from __future__ import annotations

from typing import Final

from umbel.errors import DigestMismatch, Interrupted, ModelUnusable, UmbelError, Unavailable
from umbel.visit import RetryWindow

FIRST_SECONDS: Final = 2.0
LONGEST_SECONDS: Final = 900.0
PERMANENT: Final = RetryWindow(3600.0, 3 * 3600.0)
"""For what won't get better by itself soon: a bad request, a refused certificate, an unknown call."""

_TRANSIENT: Final = (Unavailable, DigestMismatch, ModelUnusable)


def is_transient(error: UmbelError) -> bool:
    """Whether trying again soon may help. An error of no known kind (a newer peer's, an internal one) may pass."""
    return isinstance(error, _TRANSIENT) or type(error) is UmbelError


def retry_window(error: UmbelError, failures: int) -> RetryWindow:
    """The window to come back in after the `failures`-th failure in a row (1 is the first).

    Transient failures double their window from seconds up to 15 minutes, and are drawn uniformly inside it ("full
    jitter" with a floor), so that a fleet that lost its coordinator together doesn't return together.
    """
    if isinstance(error, Interrupted):
        failures = 1
    if not is_transient(error):
        return PERMANENT
    # 2**30 seconds is far beyond the cap: a larger power would only overflow.
    latest = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(max(failures, 1), 30))
    return RetryWindow(latest / 4, latest)
