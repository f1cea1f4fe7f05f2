"""A bundle: a manifest and the files that it lists, each by content.

The files may lie in one folder (`Bundle.open`) or anywhere, by content address (`Bundle(manifest, paths)`): the
graphs of an architecture are shared by all its versions. A machine that runs one runtime needs that runtime's graphs
only. See `docs/reference/bundle.md` for the format.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from umbel.digests import digest_of, digest_of_file
from umbel.errors import BadInput, BundleInvalid, DigestMismatch, MalformedMessage
from umbel.holding import alone_in
from umbel.manifest import GOLDEN_FILE, MAX_MANIFEST_BYTES, QUANTISED, WEIGHTS_FILE, FileRef, Manifest

if TYPE_CHECKING:  # numpy comes with them, which most commands of `umbel` need not
    from umbel.golden import GoldenExamples
    from umbel.weights import Weights

MANIFEST_FILE: Final = "manifest.json"


@dataclass(frozen=True, slots=True)
class Bundle:
    """All that is needed to run and train one version."""

    manifest: Manifest
    paths: Mapping[str, Path]
    """Where files lie, by their names in the manifest: all of them, or all that at least one runtime needs."""

    def __post_init__(self) -> None:
        here = set(self.paths)
        missing = sorted(set(self.manifest.common_files) - here)
        if not missing and self.manifest.graphs and not self.runtimes:
            missing = sorted(set(self.manifest.files) - here)
        if missing:
            raise BundleInvalid(f"no path is given for {missing}; fetch these files first")

    @property
    def runtimes(self) -> tuple[str, ...]:
        """The runtimes whose graphs are all here."""
        graphs = self.manifest.graphs
        return tuple(name for name in sorted(graphs) if set(graphs[name].values()) <= set(self.paths))

    @classmethod
    def open(cls, directory: Path, runtime: str | None = None) -> Bundle:
        """Read a bundle from a folder and verify each of its files.

        Args:
            directory: holds the manifest and its files.
            runtime: demand and verify only the files that this runtime needs; None means all.

        Raises:
            BundleInvalid: the manifest or a file is missing, or they contradict each other.
            DigestMismatch: a file isn't the one that the manifest lists.
            MalformedMessage: the manifest doesn't decode.
        """
        path = directory / MANIFEST_FILE
        _finish(directory)
        if not path.is_file():
            raise BundleInvalid(f"{directory} is no bundle: it has no {MANIFEST_FILE}")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise MalformedMessage(f"{path} is larger than a manifest may be ({MAX_MANIFEST_BYTES} bytes)")
        manifest = Manifest.from_bytes(path.read_bytes())
        files = manifest.files if runtime is None else manifest.files_for(runtime)
        bundle = cls(manifest, {name: directory / name for name in files})
        bundle.verify()
        return bundle

    def verify(self) -> None:
        """Check size and digest of every file that is here, and that the weights are what the manifest describes.

        Raises:
            BundleInvalid: a file is missing.
            DigestMismatch: a file isn't the one that the manifest lists.
            WeightsMismatch: names or shapes of the weights are not the manifest's.
        """
        for name, path in self.paths.items():
            _verify_file(name, path, self.manifest.files[name])
        from umbel.weights import require_shapes

        require_shapes(self.weights().shapes, self.manifest.weight_shapes)
        self.golden()

    def weights(self) -> Weights:
        """Read the weights: what is shared, and what is frozen."""
        from umbel.weights import Weights

        return Weights.of_file(self.paths[WEIGHTS_FILE])

    def shared_weights(self) -> Weights:
        """Read only the weights that devices and coordinator exchange."""
        return self.weights().subset(list(self.manifest.shared_shapes))

    def golden(self) -> GoldenExamples:
        """Read the golden examples."""
        from umbel.golden import GoldenExamples

        return GoldenExamples.from_bytes(self.paths[GOLDEN_FILE].read_bytes())

    def quantised(self, runtime: str) -> Bundle:
        """The same bundle, with the graph in fewer bits in the place of `infer`.

        Raises:
            BundleInvalid: this runtime has no such graph here.
        """
        graphs = dict(self.manifest.graphs)
        graphs[runtime] = {**graphs[runtime], "infer": self.graph_file(runtime, QUANTISED)}
        return replace(self, manifest=replace(self.manifest, graphs=graphs))

    def graph_file(self, runtime: str, signature: str) -> str:
        """The name of the file that holds one graph.

        Raises:
            BundleInvalid: the bundle has no such graph for this runtime.
        """
        try:
            return self.manifest.graphs[runtime][signature]
        except KeyError:
            raise BundleInvalid(
                f"bundle of {self.manifest.model!r} has no {signature!r} graph for the runtime {runtime!r}"
            ) from None

    def graph_path(self, runtime: str, signature: str) -> Path:
        """Where one graph lies; raises `BundleInvalid` when the bundle has none, or its file isn't here."""
        file = self.graph_file(runtime, signature)
        if file not in self.paths:
            raise BundleInvalid(f"{file!r} isn't here: of this bundle only the graphs of {self.runtimes} were fetched")
        return self.paths[file]


def _verify_file(name: str, path: Path, ref: FileRef) -> None:
    if not path.is_file():
        raise BundleInvalid(f"file {name!r} of the bundle is missing at {path}")
    size = path.stat().st_size
    if size != ref.size:
        raise DigestMismatch(f"file {name!r} has {size} bytes, the manifest says {ref.size}; fetch it again")
    if digest_of_file(path) != ref.digest:
        raise DigestMismatch(f"file {name!r} isn't the one that the manifest lists; fetch it again")


def file_refs(files: Mapping[str, bytes]) -> dict[str, FileRef]:
    """The manifest's entry for each file."""
    return {name: FileRef(digest_of(data), len(data)) for name, data in sorted(files.items())}


def write_bundle(directory: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Write a bundle into a folder, manifest last, and open it again, verified.

    What stood there is touched only when all files are on the medium: who is stopped before, or has a full disk, leaves
    it as it was. Who is stopped after that leaves it to whoever opens the folder next to put the files in their places.
    Files of a bundle that stood there and that this one doesn't have are deleted, others stay. Two that write into one
    folder do so one after the other.

    Args:
        directory: made when it doesn't exist; files of the same names are replaced.
        manifest: lists exactly `files` (see `file_refs`).
        files: the content of each file.

    Raises:
        BundleInvalid: the manifest lists other files than these.
        OSError: the folder can't be made, or not be written to.
    """
    if manifest.files != file_refs(files):
        raise BundleInvalid("the manifest lists other files than those given; build it with file_refs(files)")
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    with alone_in(directory) as held:
        try:
            for name, data in (*files.items(), (MANIFEST_FILE, manifest.to_bytes())):
                _write(_part(directory, name), data)
        except BaseException:
            for name in (MANIFEST_FILE, *files):
                _part(directory, name).unlink(missing_ok=True)
            if is_new and not any(directory.iterdir()):
                directory.rmdir()
            raise
        _put_in_place(directory, manifest, held)
        return Bundle.open(directory)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _part(directory: Path, name: str) -> Path:
    """Where a file lies that is written and not in its place yet; the manifest's comes last."""
    return directory / f".{name}.part"


def _finish(directory: Path) -> None:
    """Do what a write had begun that was stopped once all its files were there; else what stood there still holds."""
    if not _part(directory, MANIFEST_FILE).is_file():
        return
    with suppress(OSError, BadInput, DigestMismatch), alone_in(directory) as held:
        manifest = Manifest.from_bytes(_part(directory, MANIFEST_FILE).read_bytes())
        for name, ref in manifest.files.items():
            part = _part(directory, name)
            _verify_file(name, part if part.is_file() else directory / name, ref)
        _put_in_place(directory, manifest, held)


def _put_in_place(directory: Path, manifest: Manifest, held: int) -> None:
    stale = _files_of_bundle_in(directory) - set(manifest.files)
    for name in manifest.files:
        with suppress(FileNotFoundError):  # one that died has put it there
            _part(directory, name).replace(directory / name)
    os.fsync(held)  # no power cut takes a name of theirs back and leaves the manifest's
    _part(directory, MANIFEST_FILE).replace(directory / MANIFEST_FILE)
    os.fsync(held)
    for name in stale:
        (directory / name).unlink(missing_ok=True)


def _files_of_bundle_in(directory: Path) -> set[str]:
    """The names of the files that a manifest in a folder lists; none if there is no sound one."""
    try:
        return set(Manifest.from_bytes((directory / MANIFEST_FILE).read_bytes()).files)
    except (OSError, BadInput):
        return set()
