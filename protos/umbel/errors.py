"""Every way in which Umbel says no, as one tree.

    UmbelError
    ├── BadInput                    what was sent can't be taken, now or later
    │   ├── MalformedMessage        bytes or fields that don't decode to a value
    │   ├── WeightsMismatch         names, shapes or dtypes are not the agreed ones
    │   ├── NotFinite               NaN or infinity where numbers are summed
    │   ├── OutOfBounds             a number, length or size beyond what was agreed
    │   ├── InputMismatch           inputs or targets that aren't what the model's signature takes
    │   └── BundleInvalid           a bundle whose manifest and files don't fit together
    ├── NotAuthentic                it can't be shown who made this, or that nobody changed it
    │   ├── CertificateRefused      a certificate that is foreign, expired or for another purpose
    │   ├── TokenRefused            a person's token that is forged, out of time, or for somebody else
    │   ├── EnrolmentRefused        a token that is unknown, used up or too old
    │   ├── SignatureInvalid        a signature that doesn't verify under the pinned key
    │   ├── DigestMismatch          bytes that don't hash to the name they were fetched by
    │   ├── SealBroken              a sealed update that doesn't open for this round and report
    │   ├── SumImplausible          a combined sum that no honest cohort can have made
    │   ├── Expired                 a statement past its date: newer ones may be held back
    │   └── RollbackRefused         a release older than one already trusted
    ├── NotAllowed                  known who asks, and this isn't theirs to do
    ├── NotFound                    nothing goes by that name here
    ├── Conflict                    a right request at the wrong moment
    │   ├── RoundClosed             too late: the round has what it needs, or is over
    │   ├── AlreadyExists           the name is taken, by something else
    │   ├── AlreadyReported         this session's report is already counted
    │   ├── CohortTooSmall          fewer reports than a sum may be made of
    │   ├── SetRefused              another set of reports than the one that a round may be summed over
    │   ├── BudgetSpent             a round that would cost more privacy than its task may spend
    │   └── WrongState              the thing isn't in a state that allows this
    ├── Unavailable                 try again later
    │   ├── Unreachable             no answer from the other side
    │   └── Interrupted             stopped on purpose before the end, can go on later
    ├── ModelUnusable               a model that doesn't do on this machine what its maker saw
    │   ├── RuntimeFailure          the runtime refused to load or run a graph
    │   └── GoldenMismatch          golden examples came out differently here
    ├── CannotCompile               a module can't be made into a bundle
    │   ├── OperatorNotSupported    an operator of it has no translation
    │   └── ParityFailed            its graphs don't do what the module does
    └── SimulationFailed            a simulation has shown that something is wrong
        ├── SimulationStuck         everybody waits, and nothing will ever happen
        └── InvariantBroken         what must always hold doesn't

Each class carries a `code`, stable on the wire, and the gRPC `status` it travels under, so that the far side raises
the same class again. Messages say what happened and what to do.
"""

from __future__ import annotations

from enum import Enum
from typing import ClassVar, Final

ERROR_KEY: Final = "umbel-error"
"""Trailing metadata of a call that carries an error's `code`."""
_LONGEST: Final = 1000


class Status(Enum):
    """The gRPC status codes that Umbel answers with, by their standard names."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


class UmbelError(Exception):
    """Anything that Umbel refuses or can't do."""

    code: ClassVar[str] = "internal"
    status: ClassVar[Status] = Status.INTERNAL


class BadInput(UmbelError):
    """What was sent can't be taken; sending it again won't help."""

    code = "bad-input"
    status = Status.INVALID_ARGUMENT


class MalformedMessage(BadInput):
    """Bytes or fields don't decode to a value."""

    code = "malformed-message"


class WeightsMismatch(BadInput):
    """Names, shapes or dtypes of weights are not the agreed ones."""

    code = "weights-mismatch"


class NotFinite(BadInput):
    """NaN or infinity where numbers are summed."""

    code = "not-finite"


class OutOfBounds(BadInput):
    """A number, length or size lies beyond what was agreed."""

    code = "out-of-bounds"


class InputMismatch(BadInput):
    """Inputs or targets are not what the model's signature takes: names, dtypes, shapes or batch sizes."""

    code = "input-mismatch"


class BundleInvalid(BadInput):
    """A bundle's manifest and files don't fit together."""

    code = "bundle-invalid"


class NotAuthentic(UmbelError):
    """It can't be shown who made this, or that nobody changed it."""

    code = "not-authentic"
    status = Status.UNAUTHENTICATED


class CertificateRefused(NotAuthentic):
    """A certificate is foreign, expired, revoked or for another purpose."""

    code = "certificate-refused"


class TokenRefused(NotAuthentic):
    """A person's token is forged, out of time, from elsewhere or for somebody else."""

    code = "token-refused"


class EnrolmentRefused(NotAuthentic):
    """An enrolment token is unknown, used up or too old, or its request doesn't prove the key."""

    code = "enrolment-refused"


class SignatureInvalid(NotAuthentic):
    """A signature doesn't verify under the pinned key."""

    code = "signature-invalid"


class DigestMismatch(NotAuthentic):
    """Bytes don't hash to the name they were fetched by."""

    code = "digest-mismatch"
    status = Status.DATA_LOSS


class SealBroken(NotAuthentic):
    """A sealed update doesn't open for this round and report."""

    code = "seal-broken"
    status = Status.INVALID_ARGUMENT


class SumImplausible(NotAuthentic):
    """A combined sum lies outside what its cohort can make: a share was corrupted, or a device broke its bounds."""

    code = "sum-implausible"
    status = Status.DATA_LOSS


class Expired(NotAuthentic):
    """A signed statement is past its date; somebody may be holding back newer ones."""

    code = "expired"


class RollbackRefused(NotAuthentic):
    """A release is older than one already trusted."""

    code = "rollback-refused"


class NotAllowed(UmbelError):
    """It is known who asks, and this isn't theirs to do."""

    code = "not-allowed"
    status = Status.PERMISSION_DENIED


class NotFound(UmbelError):
    """Nothing goes by that name here."""

    code = "not-found"
    status = Status.NOT_FOUND


class Conflict(UmbelError):
    """A right request at the wrong moment."""

    code = "conflict"
    status = Status.FAILED_PRECONDITION


class RoundClosed(Conflict):
    """Too late: the round has what it needs, or is over."""

    code = "round-closed"
    status = Status.ABORTED


class AlreadyExists(Conflict):
    """The name is taken by something else."""

    code = "already-exists"
    status = Status.ALREADY_EXISTS


class AlreadyReported(Conflict):
    """This session's report is already counted."""

    code = "already-reported"
    status = Status.ALREADY_EXISTS


class CohortTooSmall(Conflict):
    """A sum over fewer reports than agreed would tell too much about each."""

    code = "cohort-too-small"


class SetRefused(Conflict):
    """A round is summed once, over one set of reports; this is another."""

    code = "set-refused"


class BudgetSpent(Conflict):
    """A round would cost more privacy than its task may spend."""

    code = "budget-spent"


class WrongState(Conflict):
    """The thing isn't in a state that allows this."""

    code = "wrong-state"


class Unavailable(UmbelError):
    """Not now; try again later."""

    code = "unavailable"
    status = Status.UNAVAILABLE


class Unreachable(Unavailable):
    """The other side gave no answer."""

    code = "unreachable"


class Interrupted(Unavailable):
    """Stopped on purpose before the end; can go on later."""

    code = "interrupted"


class ModelUnusable(UmbelError):
    """A model doesn't do on this machine what its maker saw."""

    code = "model-unusable"
    status = Status.FAILED_PRECONDITION


class RuntimeFailure(ModelUnusable):
    """The runtime refused to load or run a graph."""

    code = "runtime-failure"


class GoldenMismatch(ModelUnusable):
    """Golden examples came out differently here."""

    code = "golden-mismatch"


class CannotCompile(UmbelError):
    """A module can't be made into a bundle."""

    code = "cannot-compile"
    status = Status.FAILED_PRECONDITION


class OperatorNotSupported(CannotCompile):
    """An operator of the module has no translation to the runtime's graph."""

    code = "operator-not-supported"


class ParityFailed(CannotCompile):
    """The compiled graphs don't do what the module does."""

    code = "parity-failed"


class SimulationFailed(UmbelError):
    """A simulation has shown that something is wrong: with the product, or with the scenario."""

    code = "simulation-failed"


class SimulationStuck(SimulationFailed):
    """Everybody waits, and nothing will ever happen."""

    code = "simulation-stuck"


class InvariantBroken(SimulationFailed):
    """What must always hold doesn't."""

    code = "invariant-broken"


def _descend(root: type[UmbelError]) -> dict[str, type[UmbelError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= _descend(child)
    return found


BY_CODE: dict[str, type[UmbelError]] = _descend(UmbelError)
"""Every error class by its wire code."""


def from_code(code: str, message: str) -> UmbelError:
    """The error that the far side raised; an unknown code (a newer peer) becomes a plain `UmbelError`."""
    return BY_CODE.get(code, UmbelError)(foreign(message))


def foreign(words: str) -> str:
    """Words of the far side, fit for a log and a terminal: in one line, nothing unprintable, not without end."""
    return "".join(letter if letter.isprintable() else " " for letter in words[:_LONGEST])


def unusable(error: OSError) -> str:
    """A file, a folder or a disk that doesn't do, in words."""
    return f"can't use {error.filename or 'a file'}: {error.strerror or error}"
