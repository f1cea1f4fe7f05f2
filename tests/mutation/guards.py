"""The guards that keep a private round private, each with a way to take it out: (name, file, text, text without it)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Mutant:
    """One guard taken out."""

    name: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...] = ("tests/private",)
    """Those that have to notice."""


def of(file: str, tests: tuple[str, ...], *guards: tuple[str, str, str]) -> Iterator[Mutant]:
    """Guards of one file, which these tests keep: name, text, text without it."""
    for name, before, after in guards:
        yield Mutant(name, file, before, after, tests)


_SUM: Final = "protos/umbel/secure_sum.py"
_COHORT: Final = "protos/umbel/cohort_sum.py"
_DESCRIPTOR: Final = "protos/umbel/descriptor.py"
_CORE: Final = "server/umbel_server/helper/core.py"
_SERVICE: Final = "server/umbel_server/helper/service.py"
_RECORDS: Final = "server/umbel_server/helper/records.py"
_PEOPLE: Final = "server/umbel_server/helper/people.py"
_LEADER: Final = "server/umbel_server/secure_aggregation.py"
_RING: Final = "protos/umbel/ring.py"
_DEVICE: Final = "client/umbel_client/private.py"
_VOTE: Final = "protos/umbel/clip_vote.py"
_CLIP: Final = "server/umbel_server/adaptive_clip.py"
_PRIVACY: Final = "server/umbel_server/privacy.py"
_SETTINGS: Final = "server/umbel_server/privacy_settings.py"
_CLOSING: Final = "server/umbel_server/closing.py"
_REPORT: Final = "protos/umbel/secure_report.py"

GUARDS: Final = (
    # The device.
    Mutant("a delta's shape", _SUM, "if delta.size != descriptor.size or delta.dtype != np.float32:", "if False:"),
    Mutant("a report's weight", _SUM, "if not 1 <= weight <= descriptor.max_weight:", "if False:"),
    Mutant("clipping", _SUM, "min(1.0, descriptor.clip_norm / norm)", "1.0"),
    Mutant("NaN in the norm", _RING, "if not math.isfinite(total):", "if False:"),
    Mutant("NaN after rotating", _RING, "if not (math.isfinite(least) and math.isfinite(most)):", "if False:"),
    Mutant("NaN in a metric", _RING, "if not math.isfinite(value):", "if False:"),
    Mutant("the level of a number", _RING, "np.clip(block, -limit, limit, out=block)", "pass"),
    Mutant("a metric's bound", _RING, "min(max(scaled, -most), most)", "scaled"),
    Mutant("a histogram's bound", _SUM, "counts *= most / max(counts.sum(), most)", "pass"),
    Mutant("no count below zero", _SUM, "counts = np.maximum(counts, 0.0)", "pass"),
    Mutant("the bin with the least noise", _DESCRIPTOR, "least = min(lane.noise_variance for lane in lanes)", "least = max(lane.noise_variance for lane in lanes)"),
    Mutant("head-room", _RING, "if needed >= 2 ** (bits - 1):", "if False:"),
    Mutant("only shares leave a device with a helper", _DEVICE, "if pinned is not None and assignment.private_round is None:", "if False:"),
    Mutant("no private round without a helper", _DEVICE, "if pinned is None and assignment.private_round is not None:", "if False:"),
    Mutant("the same round for all", _DEVICE, "if told != agreed:", "if False:"),
    Mutant("the device's smallest cohort", _DEVICE, "if descriptor.minimum < policy.minimum_cohort:", "if False:"),
    Mutant("the device's longest round", _DEVICE, "if descriptor.not_after - descriptor.not_before > policy.longest_seconds:", "if False:"),
    Mutant("the device's least noise", _DEVICE, "if noise_multiplier(descriptor) < policy.minimum_noise_multiplier:", "if False:"),
    Mutant("the device's clock", _DEVICE, "    require_current(descriptor, now)\n", ""),
    # The report.
    Mutant("the header's length", _REPORT, "if length > MAX_HEADER_BYTES:", "if False:"),
    Mutant("the suite of a report", _REPORT, "if header.suite != TWO_AGGREGATORS:", "if False:"),
    Mutant("capsules' lengths", _REPORT, "if not 0 < len(capsule) <= MAX_CAPSULE_BYTES:", "if False:"),
    Mutant("one helper", _REPORT, "if len(header.helper_capsules) != 1:", "if not header.helper_capsules:"),
    Mutant("round and id in HPKE's info", _SUM, 'return header + role + b"\\0" + key_id(public_key)', 'return b""'),
    Mutant("round and id in the associated data", _SUM, "return header + hashlib.sha256(capsule).digest()", "return hashlib.sha256(capsule).digest()"),
    Mutant("the capsule in the associated data", _SUM, "return header + hashlib.sha256(capsule).digest()", "return header"),
    # The leader.
    Mutant("the round of a report", _SUM, "if report.rd != rd:", "if False:"),
    Mutant("a vector's length", _SUM, "if len(report.body) != expected:", "if False:"),
    Mutant("the order of reports", _LEADER, "if report.sequence <= self._last:", "if False:"),
    Mutant("a report's id", _LEADER, "shares.report_id.hex() != report.binding.report_id or ", ""),
    Mutant("a report's second coming", _LEADER, " or shares.report_id in self._items", ""),
    Mutant("what the helper refused", _LEADER, "            self._count_only(set(self.prepared.accepted))\n", ""),
    Mutant("a set that isn't held", _LEADER, "if not wanted <= set(self._items):", "if False:"),
    Mutant("the helper's signature", _COHORT, '    verify_signature(identity, answer.signature, statement, "the helper\'s total")\n', ""),
    Mutant("the set in the helper's answer", _COHORT, "rd + set_digest(rd, ids) + hashlib", "rd + hashlib"),
    Mutant("the weight lane", _COHORT, "if not count <= weight <= count * descriptor.max_weight:", "if False:"),
    Mutant("the range of the sum", _COHORT, "if largest_magnitude(numbers) > descriptor.level * weight + NOISE_TAIL * sigma:", "if False:"),
    Mutant("the norm of the sum", _COHORT, "if signed_norm(numbers) > bound:", "if False:"),
    Mutant("the metrics of the sum", _COHORT, "if not least <= total <= lane.bound * count + noise:", "if False:"),
    # The clip that moves.
    Mutant("a vote by the norm", _VOTE, "VOTE if norm <= clip else -VOTE", "VOTE"),
    Mutant("a vote that is no metric", _SUM, "vote(norm, descriptor.clip_norm) if is_vote else metrics", "metrics"),
    Mutant("the norm before clipping", _SUM, "vote(norm, descriptor.clip_norm)", "vote(norm * clip, descriptor.clip_norm * (1 + 1e-6))"),
    Mutant("a share of votes", _VOTE, "min(max(total / count + VOTE, 0.0), 1.0)", "total / count + VOTE"),
    Mutant("votes aren't told as a metric", _COHORT, "metrics.pop(WITHIN_CLIP, None)", "metrics.get(WITHIN_CLIP)"),
    Mutant("what the votes cost", _PRIVACY, "noisy = _with_noise(draft, rest**-0.5)", "noisy = _with_noise(draft, multiplier)"),
    Mutant("votes dearer than the round", _PRIVACY, "    if rest <= 0:", "    if False:"),
    Mutant("noise on the votes", _PRIVACY, "VOTE, math.ceil((votes * (1 << LANE_FRACTION_BITS)) ** 2))", "VOTE, 1)"),
    Mutant("the name of the votes", _PRIVACY, "    if WITHIN_CLIP in names:", "    if False:"),
    Mutant("a moving clip needs noise", _SETTINGS, "        if not self.noise_multiplier:", "        if False:"),
    Mutant("the least noise on votes", _SETTINGS, "if self.clip_vote_noise and 2 * self.clip_vote_noise <= self.noise_multiplier:", "if False:"),
    Mutant("the clip's bounds", _CLIP, "return min(max(moved, least), most)", "return moved"),
    Mutant("votes only in secret sums", _CLIP, "    if not updates_private or plan.kind is not Kind.TRAIN:", "    if False:"),
    Mutant("bounds around the first clip", _CLIP, "    if not 0 < least <= first <= most:", "    if False:"),
    Mutant("votes of a refused candidate", _CLOSING, "_judged(_reclipped(runner.record, collected))", "_judged(runner.record)"),
    Mutant("votes while a candidate is measured", _CLOSING, "        runner.record = record\n        runner.rounds[Kind.TRAIN]", "        runner.rounds[Kind.TRAIN]"),
    # Who runs the helper.
    Mutant("a helper in the same hands", "server/umbel_server/app.py", "if settings.helper is not None and settings.trust.is_development:", "if False:"),
    Mutant("a helper on this very machine", "server/umbel_server/settings.py", "return address.is_loopback or address.is_unspecified", "return False"),
    # Sets.
    Mutant("each report once, in order", _COHORT, "if any(left >= right for left, right in pairwise(ids)):", "if False:"),
    Mutant("the smallest cohort", _COHORT, "if len(ids) < descriptor.minimum:", "if False:"),
    Mutant("the largest cohort", _COHORT, "if len(ids) > descriptor.maximum:", "if False:"),
    # The helper.
    Mutant("who asks for a key", _CORE, 'verify_signature(self.policy.leader, signature, offer_statement(task, number, kind), "the request for a key")', "pass"),
    Mutant("who shows capsules", _CORE, 'verify_signature(self.policy.leader, signature, prepare_statement(rd, items), "the showing of capsules")', "pass"),
    Mutant("who orders a sum", _CORE, 'verify_signature(self.policy.leader, signature, commit_statement(rd, ids), "the order to sum")', "pass"),
    Mutant("who signs a descriptor", _CORE, "verify_leader(statement, leader_signature, self.policy.leader)", "descriptor_from_bytes(statement)"),
    Mutant("rounds only rise", _CORE, "if latest is not None and order <= tuple(latest):", "if False:"),
    Mutant("one descriptor a round", _CORE, "if held.rd is not None and held.rd != rd_of(statement):", "if False:"),
    Mutant("the key that was offered", _CORE, "if descriptor.helper_keys[0] != _public(_key(held)):", "if False:"),
    Mutant("the helper's clock at the signature", _CORE, "        require_current(descriptor, self._clock.now())\n        with self._lock:\n", "        with self._lock:\n"),
    Mutant("the helper's clock at the sum", _CORE, "        require_current(descriptor, self._clock.now())\n        return held, descriptor", "        return held, descriptor"),
    Mutant("the helper's populations", _CORE, "if policy.populations and descriptor.population not in policy.populations:", "if False:"),
    Mutant("the helper's smallest cohort", _CORE, "if descriptor.minimum < policy.minimum_cohort:", "if False:"),
    Mutant("the helper's longest round", _CORE, "if descriptor.not_after - descriptor.not_before > policy.longest_seconds:", "if False:"),
    Mutant("the helper's least noise", _CORE, "if noise < policy.minimum_noise_multiplier:", "if False:"),
    Mutant("more reports than agreed", _CORE, "if len(items) > descriptor.maximum:", "if False:"),
    Mutant("too few good reports", _CORE, "if len(seeds) < descriptor.minimum:", "if False:"),
    Mutant("the same id twice", _CORE, "item.report_id in seeds or ", ""),
    Mutant("a spent id", _CORE, " or self._records.is_spent(item.report_id)", ""),
    Mutant("one device, one report", _CORE, "if found.participant in people:", "if False:"),
    Mutant("revocation", _CORE, "if not self._records.is_participant(participant):", "if False:"),
    Mutant("the rate of a day", _CORE, "if self._records.lately(participant, now - DAY) >= policy.max_reports_per_day:", "if False:"),
    Mutant("the cap of a task", _CORE, "if caps and self._records.participations(participant, descriptor.task) >= min(caps):", "if False:"),
    Mutant("prepared before summed", _CORE, "if opened is None:", "if False:"),
    Mutant("the set's form at the sum", _CORE, "            require_set(descriptor, ids)\n", ""),
    Mutant("a subset of what was prepared", _CORE, "if not set(ids) <= set(opened.seeds):", "if False:"),
    Mutant("caps when it is summed", _CORE, "            self._require_still_welcome(descriptor, rd, [opened", "            ([opened"),
    Mutant("the cap of the ledger", _CORE, "for cap in (descriptor.rounds_per_device, policy", "for cap in (0, policy"),
    Mutant("a metric rounded over its bound", _RING, "math.floor(bound * unit)", "math.ceil(bound * unit)"),
    Mutant("one sum a round", _CORE, "            if held.ids is not None:\n                return _given_before(held, ids)\n", ""),
    Mutant("one set a round", _CORE, "if set_digest(held.rd, ids) != set_digest(held.rd, _split(held.ids)):", "if False:"),
    Mutant("all that was shown is spent", _CORE, "            opened.shown,", "            list(ids),"),
    Mutant("halves of one report", _SUM, "if commitment != item.commitment:", "if False:"),
    Mutant("the participant's certificate", _SUM, "    certificate.verify(descriptor.population, authority, now)\n", ""),
    Mutant("the participant's signature", _SUM, '    verify_signature(public_key, signature, _report_statement(header, commitment), "the report")\n', ""),
    Mutant("a certificate's expiry", "protos/umbel/participants.py", "if now * 1000 > self.not_after_ms:", "if False:"),
    Mutant("a certificate's population", "protos/umbel/participants.py", "return _CERTIFICATE + _part(population.encode()) + certificate", "return _CERTIFICATE + certificate"),
    Mutant("proof of the key at enrolment", _PEOPLE, "        require_proof(population, public_key, proof)\n        digest", "        digest"),
    Mutant("a token's expiry", _PEOPLE, " or found[1] < self._clock.now()", ""),
    Mutant("a token's population", _PEOPLE, "found[0] != population or ", ""),
    Mutant("a token's single use", _PEOPLE, "if found[2] is not None and found[2] != public_key:", "if False:"),
    Mutant("enrolment of the revoked", _PEOPLE, "if not self._records.is_participant(public_key):", "if False:"),
    Mutant("renewal of the revoked", _PEOPLE, "if not self._records.is_participant(certificate.public_key):", "if False:"),
    Mutant("a capsule's length at the helper", _SERVICE, "if not 0 < len(message.capsule) <= MAX_CAPSULE_BYTES:", "if False:"),
    Mutant("room for the round's capsules only", _SERVICE, "if len(items) > most:", "if False:"),
    Mutant("room for the round's ids only", _SERVICE, "if len(ids) > most * REPORT_ID_BYTES:", "if False:"),
    *of(
        _CORE, ("tests/private/test_two_calls_at_once.py",),
        ("a key at a time", "        with self._lock:\n            held = self._records.round(task,", "        if True:\n            held = self._records.round(task,"),
        ("a descriptor at a time", "        with self._lock:\n            held = self._require(", "        if True:\n            held = self._require("),
        ("a showing at a time", "        with self._lock:\n            held, descriptor = self._countersigned(rd)\n            if held.ids is not None:\n                return Prepared(", "        if True:\n            held, descriptor = self._countersigned(rd)\n            if held.ids is not None:\n                return Prepared("),
        ("a sum at a time", "        with self._lock:\n            held, descriptor = self._countersigned(rd)\n            if held.ids is not None:\n                return _given", "        if True:\n            held, descriptor = self._countersigned(rd)\n            if held.ids is not None:\n                return _given"),
        ("a sweep at a time", "        with self._lock:\n            now = ", "        if True:\n            now = "),
    ),
    # What the helper keeps.
    Mutant("a deleted key in the log", _RECORDS, 'self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")', "pass"),
    Mutant("a deleted key in the database", _RECORDS, "PRAGMA secure_delete=ON", "PRAGMA secure_delete=OFF"),
    Mutant("the store's privacy", _RECORDS, "            make_file_private(path)\n", "            pass\n"),
    Mutant("one transaction at a time", _RECORDS, "        with self._lock:\n            self._connection.execute(\"BEGIN", "        if True:\n            self._connection.execute(\"BEGIN"),
    # The descriptor.
    Mutant("the helper's countersignature", _DESCRIPTOR, '    verify_signature(helper, signed.helper_signature, _HELPER + signed.statement, "the round descriptor")\n', ""),
    Mutant("the leader's signature", _DESCRIPTOR, '    verify_signature(leader, signature, _LEADER + statement, "the round descriptor")\n', ""),
    Mutant("the suite", _DESCRIPTOR, "if message.suite != TWO_AGGREGATORS:", "if False:"),
    Mutant("a cohort of one", _DESCRIPTOR, "if it.minimum < ABSOLUTE_MINIMUM:", "if False:"),
    Mutant("the order of minimum and maximum", _DESCRIPTOR, "if not it.minimum <= it.maximum <= MAX_COHORT:", "if False:"),
    Mutant("a round's length", _DESCRIPTOR, "if not 0 < it.not_after - it.not_before <= LONGEST_SECONDS:", "if False:"),
    Mutant("one helper's key", _DESCRIPTOR, "if len(it.helper_keys) != 1:", "if not it.helper_keys:"),
    Mutant("two different keys", _DESCRIPTOR, "if it.leader_key in it.helper_keys:", "if False:"),
    Mutant("evaluations have no delta", _DESCRIPTOR, "if it.kind is Kind.EVALUATE and it.size:", "if False:"),
    Mutant("lanes' bounds", _DESCRIPTOR, "if not (math.isfinite(lane.bound) and lane.bound > 0):", "if False:"),
    Mutant("lanes' names", _DESCRIPTOR, 'if len(set(names)) != len(names) or "" in names:', "if False:"),
    Mutant("how much is sent", _DESCRIPTOR, "if not min(1, it.size) <= it.sent <= it.size:", "if False:"),
    Mutant("a delta's size", _DESCRIPTOR, "if not 0 <= it.size <= MAX_NUMBERS:", "if False:"),
)  # fmt: skip
