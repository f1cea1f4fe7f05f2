"""The guards of releases on the device: trust, accept test, trial, shelf, deltas; and the tests that notice."""

from __future__ import annotations

from typing import Final

from tests.mutation.guards import of

_OFFERS: Final = ("tests/rollouts/test_offer_attacks.py",)
_LISTING: Final = ("tests/server/test_release_attacks.py", "tests/server/test_release_keys.py")
_TRUST: Final = ("tests/client/test_trust.py", "tests/protos/test_release.py")
_SHELF: Final = ("tests/client/test_shelf.py", "tests/rollouts/test_trial.py")
_TRIAL: Final = (
    "tests/rollouts/test_trial.py",
    "tests/rollouts/test_offer_attacks.py",
    "tests/client/test_personal.py",
    "tests/rollouts/test_rollout_end_to_end.py",
)
_DURABLE: Final = ("tests/test_durable.py",)
_DELTAS: Final = ("tests/protos/test_delta.py",)

GUARDS: Final = (
    # Trust on the device: offers, releases, the listing.
    *of(
        "protos/umbel/offer.py", _OFFERS,
        ("an offer's signature", '    verify_signature(public_key, signed.signature, LABEL + signed.statement, "the offer")\n', ""),
        ("an offer's purpose", 'LABEL = b"umbel-offer/1\\0"', 'LABEL = b"umbel-release/1\\0"'),
        ("an offer's device", "if offer.device != device:", "if False:"),
        ("an offer's end", "if now >= offer.expires_at:", "if False:"),
    ),
    *of(
        "client/umbel_client/offered.py", _OFFERS,
        ("an offer's end by the listing's time", "verify_offered(kit, signed, listing.time_floor)", "verify_offered(kit, signed)"),
        ("an offer that was followed", "if offer.execution in kit.memory.state.executions:", "if False:"),
        ("an offer's model", "if known and offer.model != known:", "if False:"),
        ("an offer's number", "if active is not None and offer.number <= active.number:", "if False:"),
        ("an offer's content", "if listed.bundle != offer.bundle:", "if False:"),
        ("an offer's channel", "if listed.channel != kit.identity.channel:", "if False:"),
    ),
    *of(
        "client/umbel_client/device.py", _OFFERS,
        ("a bare release where a listing is pinned", "        if listing is None:\n            if answer.newest is None:", "        if answer.newest is not None or listing is None:\n            if answer.newest is None:"),
    ),
    *of(
        "protos/umbel/release.py", _TRUST,
        ("a release's key", "if signed.key_id != key_id_of(public_key):", "if False:"),
        ("a release's signature", '    verify_signature(public_key, signed.signature, LABEL + signed.statement, "the release")\n', ""),
        ("a release's number", "if release.number < newest_known:", "if False:"),
    ),
    *of(
        "client/umbel_client/trust.py", _TRUST,
        ("a release's channel", "if release.channel != self.channel:", "if False:"),
        ("a release's model", "if self.model and release.model != self.model:", "if False:"),
        ("a release seen before", "            require_newer(release, seen.number)\n", ""),
        ("one number, one content", "if release.number == seen.number and release.bundle != seen.bundle:", "if False:"),
    ),
    *of(
        "protos/umbel/listing.py", ("tests/protos/test_listing.py",),
        ("a release under its own path", "target_path(release.model, release.number) != path or ", ""),
        ("a manifest's size", "length > MAX_MANIFEST_BYTES or ", ""),
        ("numbers of a release", " or isinstance(value, bool)", ""),
        ("a version of a release", " or release.version < 1", ""),
    ),
    *of(
        "protos/umbel/manifest.py", ("tests/protos/test_manifest.py",),
        ("a file of less than nothing", " or value < 0:", ":"),
        ("an input without a shape", "if not spec.shape or ", "if "),
    ),
    *of(
        "client/umbel_client/listing.py", _LISTING,
        ("time doesn't go back", "max(now, self._floor(files))", "now"),
        ("a date that is none", "or not 0 <= told <= _LAST_INSTANT:", "or False:"),
        ("a stolen key's date", "signed if by & set(trusted) and", "signed if by and"),
        ("one deadline", "async with asyncio.timeout(self._seconds):", "async with asyncio.timeout(None):"),
        ("the pinned root", "bootstrap=self._root,", "bootstrap=None,"),
        ("a release that isn't listed", "if target is None:\n            raise", "if False:\n            raise"),
    ),
    *of(
        "protos/umbel/runtime/onnx.py", ("tests/protos/test_onnx_files.py",),
        ("a graph that reads files", "        require_no_files(path.read_bytes(), constants)\n", ""),
    ),
    *of(
        "protos/umbel/runtime/onnx_files.py", ("tests/protos/test_onnx_files.py",),
        ("only the main graph's weights are bound", "depth == 2 and ", ""),
        ("tensors in branches", "6: _GRAPH, ", ""),
        ("tensors in functions", ", 25: _FUNCTION", ""),
        ("sparse tensors", ", 15: _SPARSE", ""),
        ("graphs in graphs without end", ", RecursionError) as", ") as"),
    ),
    *of(
        "client/umbel_client/tuf_files.py", _LISTING,
        ("endless metadata", "if len(data) > max_length:", "if False:"),
    ),
    # The device: accept test, trial, shelf.
    *of(
        "client/umbel_client/adoption.py", _TRIAL,
        ("content that failed here", "if offered.listed.bundle in self._kit.shelf.slots.blocked:", "if False:"),
        ("a test that kills the process", "if tries > TRIES:", "if False:"),
        ("golden examples", "            verify_golden(kit.runtime, bundle)\n", ""),
        ("the accept test", "if tested.worse_than_present(kit.personal.margin) and not taken_back:", "if False:"),
        ("a way back is taken at any rate", " and not taken_back:", ":"),
        ("an execution is followed once", ".with_execution(offer.execution)", ""),
        ("a trial for what is offered", "deltas, trial=trial, taken_back", "deltas, trial=None, taken_back"),
    ),
    *of(
        "client/umbel_client/adoption.py", ("tests/rollouts/test_deferred_offers.py",),
        ("an interruption is no try", "attempt=(offer.execution, tries - 1)", "attempt=(offer.execution, tries)"),
        ("a device in use puts an offer off", "        self._kit.require_free()\n", ""),
    ),
    *of(
        "client/umbel_client/slots.py", _SHELF,
        ("a try is spent before a load", "tries_left=self.trial.tries_left - 1", "tries_left=self.trial.tries_left"),
        ("no tries, no load", "if self.trial.tries_left <= 0:", "if False:"),
        ("the last known good one is kept", "if good is None or self.trial is not None:", "if good is None:"),
        ("what failed is blocked", "blocked=blocked, reverted=told", "reverted=told"),
        ("tries come back with an answer", "replace(self.trial, tries_left=TRIES)", "self.trial"),
    ),
    *of(
        "client/umbel_client/adoption.py", (*_SHELF, "tests/client/test_in_the_wild.py"),
        ("a trial's time", "elif now - trial.since >= kit.personal.trial_seconds:", "elif True:"),
        ("a trial that begins ahead", "if now < trial.since:", "if False:"),
    ),
    *of(
        "client/umbel_client/agent.py", _TRIAL,
        ("a rest before each sleep", "        self._device.rest()\n        before", "        before"),
    ),
    *of(
        "client/umbel_client/shelf.py", _SHELF,
        ("a blob that rotted", "        if digest_of_file(path) != digest:", "        if False:"),
        ("bytes that aren't those asked for", "        if found != digest:", "        if False:"),
        ("room for a bundle", "if size > self._limit:", "if False:"),
        ("blobs in a slot stay", " if key[1] not in pinned}", "}"),
        ("personal weights go with their slot", "if own is not None and own.weights not in _own_weights(slots):", "if False:"),
    ),
    *of(
        "client/umbel_client/files.py", _SHELF,
        ("whole or not at all", "beside = place + BESIDE", "beside = place"),
    ),
    *of(
        "client/umbel_client/files.py", _DURABLE,
        ("bytes before their name", "                os.fsync(descriptor)\n", "                pass\n"),
        ("a name before it counts", "    try:\n        os.fsync(descriptor)\n", "    try:\n        pass\n"),
    ),
    *of(
        "client/umbel_client/shelf.py", _DURABLE,
        ("a blob's bytes before its name", "        self._disk.flush_file(part)\n", ""),
        ("blobs' names before they serve", "        self._disk.flush_folder(self._blobs)\n", ""),
    ),
    *of(
        "protos/umbel/bundle.py", _DURABLE,
        ("a bundle's bytes before their names", "        os.fsync(file.fileno())\n", ""),
    ),
    *of(
        "server/umbel_server/files.py", _DURABLE,
        ("a server's names before it answers", "    flush(path.parent)\n", ""),
        ("a server's bytes before their name", "            os.fsync(descriptor)\n        finally:\n            os.close(descriptor)\n        aside", "            pass\n        finally:\n            os.close(descriptor)\n        aside"),
    ),
    *of(
        "server/umbel_server/blobs.py", _DURABLE,
        ("a report's bytes before it is accepted", "        self._sync(partial)\n", ""),
        ("a report's name before it is accepted", "        self._sync(self.spool)\n", ""),
        ("a version's bytes before it is one", "            self._sync(aside)\n", ""),
        ("a version's names before it is one", "        self._sync(path.parent)\n", ""),
    ),
    *of(
        "client/umbel_client/fetching.py", ("tests/client/test_fetching.py", "tests/client/test_deltas.py"),
        ("not a byte more than promised", "                    if offset > size:\n                        break\n", ""),
        ("a delta that saves too little", "is_worth_it(delta.size, ref.size) and ", ""),
        ("a delta without its base", "or not self._shelf.holds(delta.base)", ""),
        ("a bad delta is done without", "        except (UmbelError, OSError):\n", "        except NotImplementedError:\n"),
        ("only its own runtime's graphs", "manifest.files_for(self._runtime)", "manifest.files"),
    ),
    *of(
        "protos/umbel/delta.py", _DELTAS,
        ("what a delta made", "if digest.hexdigest() != target.digest:", "if False:"),
        ("a delta's form", "if magic != MAGIC:", "if False:"),
        ("a delta's base", "found_base.hex() != base or ", ""),
        ("a delta's target", " or found_target.hex() != target.digest:", ":"),
        ("a delta's size", "if size != target.size or ", "if "),
        ("a payload's size", " or not 0 < payload_size <= size + _SPARE:", ":"),
        ("a payload that goes on", "        if more:", "        if False:"),
        ("more than the payload", "if count > self._left:", "if False:"),
        ("a window's size", "max_window_size=MAX_WINDOW_BYTES", "max_window_size=1 << 31"),
        ("kinds of segments", "if kind not in (KEEP, XOR, ADD) or (b > 0) != (kind == ADD):", "if False:"),
        ("a segment's length", "if not 0 < made <= left:", "if False:"),
        ("endless segments", "range(MAX_SEGMENTS)", "range(1 << 40)"),
        ("seventy per cent", "delta_size * 10 < full_size * 7", "delta_size * 10 <= full_size * 7"),
    ),
)  # fmt: skip
