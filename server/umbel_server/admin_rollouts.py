"""The operators' calls about releases and rollouts: messages in, `RolloutVerbs` asked, messages out. No decisions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from umbel.errors import NotFound, WrongState
from umbel.fields import name, text
from umbel.listing import ListedRelease
from umbel.v1 import admin_pb2 as pb
from umbel_server import admin_messages as codec
from umbel_server.admin_releases import release_details_to_message
from umbel_server.checkpoints import key_to_text
from umbel_server.coordinator import Coordinator
from umbel_server.json_text import from_text, to_text
from umbel_server.operators import Operator
from umbel_server.rollout import Rollout, Stage
from umbel_server.rollout_records import RolloutRecord
from umbel_server.rollout_spec import EVERYBODY, RolloutSpec, spec_from_tree, spec_to_tree
from umbel_server.rollout_verbs import RolloutVerbs
from umbel_server.rpc import Stream, Unary
from umbel_server.versions import FULL

_RED: Final = (Stage.ROLLING_BACK, Stage.ROLLED_BACK, Stage.DENIED)
_GREEN: Final = (Stage.SCHEDULED, Stage.RUNNING, Stage.SUCCEEDED)


class RolloutGateway:
    """The part of AdminService that is about releases and rollouts."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def methods(self) -> dict[str, Unary[Operator] | Stream[Operator]]:
        """By name, for the service."""
        return {
            "GetRelease": self._get_release,
            "PrepareRelease": self._prepare,
            "HoldReleases": self._hold,
            "LiftHold": self._lift,
            "GetListing": self._listing,
            "DraftListing": self._draft,
            "SubmitListing": self._submit,
            "CreateRollout": self._create,
            "EditRollout": self._edit,
            "GoOnRollout": self._go_on,
            "DecideRollout": self._decide,
            "StopRollout": self._stop,
            "GetRollout": self._get,
            "ListRollouts": self._list,
            "PreviewRollout": self._preview,
            "GetCheckpoint": self._checkpoint,
        }

    @property
    def _verbs(self) -> RolloutVerbs:
        if self._coordinator.verbs is None:
            raise WrongState("this coordinator has no release listing; `umbel keys init` makes one")
        return self._coordinator.verbs

    # Releases.

    async def _get_release(self, operator: Operator, message: pb.GetReleaseRequest) -> pb.GetReleaseResponse:
        found = self._coordinator.releasing.one(name(message.model, "model"), codec.number(message.number, "release"))
        return pb.GetReleaseResponse(release=release_details_to_message(found))

    async def _prepare(self, operator: Operator, message: pb.PrepareReleaseRequest) -> pb.PrepareReleaseResponse:
        model, version = name(message.model, "model"), codec.number(message.version, "version")
        releasing, encoding = self._coordinator.releasing, message.encoding or FULL
        population = name(message.population, "population") if message.population else EVERYBODY
        call = codec.call_from_message(message)
        made = await releasing.prepare(model, version, message.channel, encoding, operator.actor, call, population)
        found = made.prepared
        details = release_details_to_message(releasing.one(model, found.number))
        return pb.PrepareReleaseResponse(
            model=model, number=found.number, revert=found.revert, head=found.head, release=details
        )

    async def _hold(self, operator: Operator, message: pb.HoldReleasesRequest) -> pb.HoldReleasesResponse:
        self._verbs.hold(
            name(message.model, "model"),
            operator.actor,
            text(message.reason, "reason"),
            codec.call_from_message(message),
        )
        return pb.HoldReleasesResponse()

    async def _lift(self, operator: Operator, message: pb.LiftHoldRequest) -> pb.LiftHoldResponse:
        self._verbs.lift(name(message.model, "model"), operator.actor, codec.call_from_message(message))
        return pb.LiftHoldResponse()

    async def _listing(self, operator: Operator, message: pb.GetListingRequest) -> pb.GetListingResponse:
        found = self._verbs.listing()
        return pb.GetListingResponse(
            roles=[
                pb.ListingRole(role=it.role, version=it.version, expires_at_ms=codec.milliseconds(it.expires_at))
                for it in found.freshness
            ],
            keys=[
                pb.ListingKey(role=it.role, key_id=it.key_id, held_here=it.held_here, belongs_offline=it.offline)
                for it in found.keys
            ],
            releases=[
                *(_listed_to_message(release, signed=False) for release in found.waiting),
                *(_listed_to_message(release, signed=True) for release in found.listed),
            ],
            held=found.held,
        )

    async def _draft(self, operator: Operator, message: pb.DraftListingRequest) -> pb.DraftListingResponse:
        return pb.DraftListingResponse(draft=self._verbs.draft(name(message.model, "model")))

    async def _submit(self, operator: Operator, message: pb.SubmitListingRequest) -> pb.SubmitListingResponse:
        call = codec.call_from_message(message)
        self._verbs.submit_listing(name(message.model, "model"), message.signed, operator.actor, call)
        return pb.SubmitListingResponse()

    # Rollouts.

    async def _create(self, operator: Operator, message: pb.CreateRolloutRequest) -> pb.CreateRolloutResponse:
        call = codec.call_from_message(message)
        record = self._verbs.create(_id(message.id), _spec(message.spec), operator.actor, call)
        return pb.CreateRolloutResponse(rollout=self._to_message(record))

    async def _edit(self, operator: Operator, message: pb.EditRolloutRequest) -> pb.EditRolloutResponse:
        seen = _revision(message.expected_revision)
        record = self._verbs.edit(_id(message.id), _spec(message.spec), operator.actor, seen, message.request_id)
        return pb.EditRolloutResponse(rollout=self._to_message(record))

    async def _go_on(self, operator: Operator, message: pb.GoOnRolloutRequest) -> pb.GoOnRolloutResponse:
        step = self._choose(
            message.action, submit=self._verbs.submit, start=self._verbs.start, resume=self._verbs.resume
        )
        record = step(_id(message.id), operator.actor, _revision(message.expected_revision), message.request_id)
        return pb.GoOnRolloutResponse(rollout=self._to_message(record))

    async def _decide(self, operator: Operator, message: pb.DecideRolloutRequest) -> pb.DecideRolloutResponse:
        verbs, actor, seen, again = (
            self._verbs, operator.actor, _revision(message.expected_revision), message.request_id,
        )  # fmt: skip
        step = self._choose(
            message.action,
            approve=lambda: verbs.approve(_id(message.id), actor, message.subject, seen, again),
            deny=lambda: verbs.deny(_id(message.id), actor, text(message.reason, "reason"), seen, again),
            promote=lambda: verbs.promote(_id(message.id), actor, seen, again),
        )
        return pb.DecideRolloutResponse(rollout=self._to_message(step()))

    async def _stop(self, operator: Operator, message: pb.StopRolloutRequest) -> pb.StopRolloutResponse:
        reason = text(message.reason, "reason")
        record = self._verbs.stop(
            _id(message.id), message.action, operator.actor, reason, message.expected_revision, message.request_id
        )
        return pb.StopRolloutResponse(rollout=self._to_message(record))

    async def _get(self, operator: Operator, message: pb.GetRolloutRequest) -> pb.GetRolloutResponse:
        record = self._verbs.get(_id(message.id))
        found, told = record.rollout, self._to_message(record)
        for it in self._verbs.progress(found):
            percent = found.spec.waves[it.wave].percent
            told.waves.add(wave=it.wave, percent=percent, devices=it.devices, counts=it.counts)
        return pb.GetRolloutResponse(rollout=told)

    async def _list(self, operator: Operator, message: pb.ListRolloutsRequest) -> pb.ListRolloutsResponse:
        found = self._verbs.newest(codec.limit_from_message(message.limit))
        return pb.ListRolloutsResponse(rollouts=map(self._to_message, found))

    async def _preview(self, operator: Operator, message: pb.PreviewRolloutRequest) -> pb.PreviewRolloutResponse:
        verbs = self._verbs
        found = verbs.get(_id(message.id)).rollout if message.id else verbs.draft_of(_spec(message.spec))
        waves = [
            pb.PreviewedWave(wave=wave, percent=found.spec.waves[wave].percent, devices=devices)
            for wave, devices in verbs.preview(found).items()
        ]
        return pb.PreviewRolloutResponse(waves=waves)

    async def _checkpoint(self, operator: Operator, message: pb.GetCheckpointRequest) -> pb.GetCheckpointResponse:
        note, witness = self._coordinator.checkpoint(), self._coordinator.witness
        return pb.GetCheckpointResponse(note=note, key=key_to_text(witness.public_key) if witness else "")

    @staticmethod
    def _choose(action: str, **steps: Callable[..., Any]) -> Callable[..., Any]:
        if action not in steps:
            raise NotFound(f"can't {action[:40]!r} here; choose among {', '.join(steps)}")
        return steps[action]

    def _to_message(self, record: RolloutRecord) -> pb.Rollout:
        found = record.rollout
        counts = self._verbs.counts(found)
        return pb.Rollout(
            id=found.id,
            stage=found.stage.value,
            light=light_of(found),
            wave=found.wave,
            revision=found.revision,
            spec=to_text(spec_to_tree(found.spec)),
            subject=found.spec.subject,
            author=found.author,
            approved_by=found.approved_by,
            reason=found.reason,
            judgement=record.judgement,
            created_at_ms=codec.milliseconds(found.created_at),
            wave_opened_at_ms=codec.milliseconds(found.wave_opened_at),
            counts=[
                pb.DeviceCount(release=number, outcome=outcome, devices=devices)
                for (number, outcome), devices in sorted(counts.items())
            ],
        )


def light_of(found: Rollout) -> str:
    """Red: refused by a gate or a person. Green: goes on by itself. Amber: waits for a person."""
    if found.stage in _RED:
        return "red"
    return "green" if found.stage in _GREEN else "amber"


def _id(sent: str) -> str:
    return name(sent, "rollout")


def _spec(document: str) -> RolloutSpec:
    return spec_from_tree(from_text(document))


def _revision(seen: int) -> int:
    if seen < 0:
        raise WrongState("name the revision that you have seen; `umbel rollouts show` tells it")
    return seen


def _listed_to_message(release: ListedRelease, *, signed: bool) -> pb.ListedRelease:
    return pb.ListedRelease(
        model=release.model,
        number=release.number,
        version=release.version,
        channel=release.channel,
        content_of=release.content_of,
        from_number=release.from_number,
        signed=signed,
    )
