"""gRPC failures -> the errors that the far side raised, or that the way there caused."""

from __future__ import annotations

from typing import Final

import grpc

from umbel.errors import (
    BY_CODE,
    ERROR_KEY,
    AlreadyExists,
    BadInput,
    CertificateRefused,
    Conflict,
    DigestMismatch,
    NotAllowed,
    NotAuthentic,
    NotFound,
    RoundClosed,
    UmbelError,
    Unavailable,
    Unreachable,
    foreign,
    from_code,
)

_BY_STATUS: Final[dict[grpc.StatusCode, type[UmbelError]]] = {
    grpc.StatusCode.UNAVAILABLE: Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unreachable,
    grpc.StatusCode.CANCELLED: Unreachable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Unavailable,
    grpc.StatusCode.INVALID_ARGUMENT: BadInput,
    grpc.StatusCode.OUT_OF_RANGE: BadInput,
    grpc.StatusCode.UNIMPLEMENTED: BadInput,
    grpc.StatusCode.UNAUTHENTICATED: NotAuthentic,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.ABORTED: RoundClosed,
    grpc.StatusCode.DATA_LOSS: DigestMismatch,
}


def error_of(failure: grpc.aio.AioRpcError, address: str) -> UmbelError:
    """The typed error for a failed call: by its code in the trailing metadata, or else by its status.

    A code that isn't known here is a newer peer's: its status says what kind of refusal it is.
    """
    metadata = failure.trailing_metadata() or ()
    codes = [value for key, value in metadata if key == ERROR_KEY]
    details = foreign(failure.details() or failure.code().name)
    kind = _BY_STATUS.get(failure.code(), UmbelError)
    if codes:
        code = codes[0] if isinstance(codes[0], str) else codes[0].decode(errors="replace")
        if code in BY_CODE:
            return from_code(code, details)
        return Unavailable(details) if kind is Unreachable else kind(details)
    if failure.code() is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in details:
        return CertificateRefused(
            f"the certificate of {address} isn't from the pinned authority, for this name, or in time: {details}"
        )
    if failure.code() is grpc.StatusCode.UNAVAILABLE and "WRONG_VERSION_NUMBER" in details:
        return Unreachable(f"what answers at {address} speaks no TLS, so it is no coordinator; is the port right?")
    if kind is Unreachable:
        return Unreachable(f"no answer from {address}: {details}")
    return kind(f"{address} answered {failure.code().name}: {details}")
