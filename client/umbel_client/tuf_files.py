"""Files that were fetched already, as python-tuf wants to be given them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import unquote

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError
from tuf.ngclient.fetcher import FetcherInterface


class Missing(DownloadError):
    """A file that has to be fetched before the client can go on."""

    def __init__(self, name: str, limit: int) -> None:
        super().__init__(f"{name} isn't at hand yet")
        self.name = name
        self.limit = limit


class FilesAtHand(FetcherInterface):
    """A fetcher without a network.

    Args:
        base: what every address begins with.
        files: bytes by file name; None for a file that isn't there either when one asks for it.
    """

    def __init__(self, base: str, files: Mapping[str, bytes | None]) -> None:
        self._base = base
        self._files = files

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """The file of this address; raises `Missing` when nobody has fetched it yet."""
        name = url.removeprefix(self._base)
        if name not in self._files:
            raise Missing(name, max_length)
        data = self._files[name]
        if data is None:
            raise DownloadHTTPError(f"{unquote(name)} isn't there", 404)
        if len(data) > max_length:
            raise DownloadLengthMismatchError(
                f"{unquote(name)} has {len(data)} bytes, at most {max_length} are allowed"
            )
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        yield self.download_bytes(url, 0)
