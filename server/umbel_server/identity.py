"""An operator's side: what one calls with, and where a coordinator on this machine listens.

Light on purpose: `umbel` starts with nothing else loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from umbel.errors import AlreadyExists, MalformedMessage, NotFound
from umbel.fields import known
from umbel_server.files import make_private, read_file, write_file

ADDRESSES_FILE: Final = "addresses.json"
CERTIFICATE_FILE: Final = "certificate.pem"
KEY_FILE: Final = "key.pem"
SERVER_AUTHORITY_FILE: Final = "server-authority.pem"


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where a running coordinator listens, each as host:port."""

    device: str
    enrol: str
    admin: str
    tokens: str = ""
    """For operators who come with a token; empty where they can't."""
    inference: str = ""
    """For programs that ask models over gRPC; empty where they can't."""
    inference_http: str = ""
    """The same over HTTP."""
    metrics: str = ""
    """For Prometheus; empty where there are none."""

    @classmethod
    def read(cls, state: Path) -> Addresses:
        """What a coordinator wrote into its folder; raises `NotFound` if it isn't running."""
        try:
            return cls(**known(cls, json.loads((state / ADDRESSES_FILE).read_bytes())))
        except FileNotFoundError:
            raise NotFound(
                f"no coordinator is running on {state}; start one with `umbel serve --state {state}`"
            ) from None
        except (ValueError, TypeError) as error:
            raise MalformedMessage(f"{state / ADDRESSES_FILE} isn't readable: {error}") from error


@dataclass(frozen=True, slots=True)
class Identity:
    """What an operator calls with: a key, its certificate chain, and the authority of the coordinator (all PEM)."""

    certificate: bytes
    key: bytes
    server_authority: bytes

    def __repr__(self) -> str:
        return "Identity(…)"

    @classmethod
    def read(cls, folder: Path) -> Identity:
        """Read an identity's folder; raises `NotFound` naming the file that is missing."""
        parts = (CERTIFICATE_FILE, KEY_FILE, SERVER_AUTHORITY_FILE)
        return cls(*(read_file(folder / part) for part in parts))

    def write(self, folder: Path) -> None:
        """Keep it in a folder of its own; one with a certificate is complete."""
        make_private(folder)
        write_file(folder / KEY_FILE, self.key)
        write_file(folder / SERVER_AUTHORITY_FILE, self.server_authority)
        write_file(folder / CERTIFICATE_FILE, self.certificate)


@contextmanager
def kept_first(folder: Path, key: bytes, is_refusal: Callable[[Exception], bool]) -> Iterator[bytes]:
    """Keep a new identity's key before anybody is told of it: one that can't be kept must not become anyone's.

    Args:
        folder: of the identity; made if it isn't there. One with a key and no certificate was left by a call whose
            answer was lost: that key is used again, since it may be somebody's already.
        key: PEM; deleted again if the block is refused, and a folder that was made for it.
        is_refusal: tells that from an answer that was lost.

    Raises:
        AlreadyExists: the folder holds an identity, whose key would be lost.
        OSError: the folder can't be written to.
    """
    if (folder / CERTIFICATE_FILE).exists():
        raise AlreadyExists(f"{folder} holds an identity already; choose another folder")
    if (folder / KEY_FILE).exists():
        yield read_file(folder / KEY_FILE)
        return
    is_new = not folder.exists()
    make_private(folder)
    write_file(folder / KEY_FILE, key)
    try:
        yield key
    except Exception as error:
        if is_refusal(error):
            (folder / KEY_FILE).unlink()
            if is_new:
                folder.rmdir()
        raise
