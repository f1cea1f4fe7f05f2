"""A device's channel to the coordinator in the same process: every message is encoded, travels, and is decoded.

Travelling takes the device's latency and bandwidth in virtual time; a message may be lost, late, doubled or overtaken,
and the device's own network may be gone when it arrives. What goes up and down is counted as gRPC's messages are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Final, TypeVar

from google.protobuf.message import Message

from umbel.digests import Digest
from umbel.errors import MalformedMessage, OutOfBounds, UmbelError, Unreachable
from umbel.identity import DeviceId
from umbel.messages import (
    check_in_reply_from_message,
    check_in_to_message,
    parse,
    report_begin_to_message,
    window_from_message,
)
from umbel.v1 import device_pb2 as pb
from umbel.visit import Assignment, CheckIn, CheckInReply, ReportBegin, RetryWindow
from umbel_client.channel import Traffic
from umbel_simulations.fleet.books import Books
from umbel_simulations.fleet.faults import Fate, Weather
from umbel_simulations.fleet.house import House
from umbel_simulations.fleet.population import Profile

M = TypeVar("M", bound=Message)
CALL_SECONDS: Final = 30.0
"""How long a device waits for an answer, as over gRPC."""
CHUNK_BYTES: Final = 256 << 10


class VirtualChannel:
    """See `umbel_client.channel.Channel`.

    Args:
        house: who answers.
        device: who calls.
        profile: of its network.
        weather: what becomes of messages.
        present: whether the device is on its network now.
        books: what was really sent and answered.
        asks_first: whether it asks before it uploads a report.
        assigned: told of each assignment.
        forge: what a lying device sends instead of its report.
    """

    def __init__(
        self,
        house: House,
        device: DeviceId,
        profile: Profile,
        weather: Weather,
        present: Callable[[], bool],
        books: Books,
        *,
        asks_first: bool,
        assigned: Callable[[Assignment], None],
        forge: Callable[[ReportBegin, bytes], tuple[ReportBegin, bytes]],
    ) -> None:
        self.traffic = Traffic()
        self._house, self._device, self._profile, self._weather = house, device, profile, weather
        self._present, self._books, self._asks_first, self._assigned = present, books, asks_first, assigned
        self._forge = forge

    async def check_in(self, check_in: CheckIn) -> CheckInReply:
        """Offer to take part; see `Channel`."""
        self._books.checked_in()
        answer = await self._call("CheckIn", check_in_to_message(check_in), pb.CheckInResponse)
        reply = check_in_reply_from_message(answer)
        if isinstance(reply.reply, Assignment):
            self._books.assigned()
            self._assigned(reply.reply)
        return reply

    async def fetch(self, digest: Digest, offset: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `offset` on; see `Channel`."""
        question = pb.FetchRequest(digest=digest, offset=offset).SerializeToString()
        await self._up(len(question), self._weather.fate())
        async with contextlib.aclosing(self._house.stream("Fetch", self._device, question)) as answers:
            async for data in answers:
                yield (await self._down(data, pb.FetchResponse, self._weather.fate())).chunk

    async def read_listing(self, name: str, limit: int) -> bytes:
        """A file of the release listing; see `Channel`."""
        answer = await self._call("ReadListing", pb.ReadListingRequest(name=name), pb.ReadListingResponse)
        if len(answer.content) > limit:
            raise OutOfBounds(f"listing file {name} has {len(answer.content)} bytes; at most {limit} are allowed")
        return answer.content

    async def report(self, begin: ReportBegin, sealed: bytes) -> RetryWindow:
        """Ask, then send what is missing; see `Channel`."""
        begin, sealed = self._forge(begin, sealed)
        self._books.sent(begin.session_id, self._device)
        if not self._asks_first:
            # All of it goes up before anything is heard.
            await self._travel(len(sealed) / self._profile.up)
            self.traffic.up += len(sealed)
        fate = self._weather.fate(repeats=True)
        if fate.again is not None:
            self._house.spawn(self._later(fate.again, self._exchange(begin, sealed, travels=False)))
        window = await self._exchange(begin, sealed, travels=True, fate=fate)
        self._books.acknowledged(begin.session_id)
        return window

    async def renew(self, certificate_request: bytes) -> bytes:
        """A new certificate chain; see `Channel`."""
        message = pb.RenewRequest(certificate_request=certificate_request)
        return (await self._call("Renew", message, pb.RenewResponse)).certificate_chain

    async def close(self) -> None:
        """Nothing is kept open."""

    # One message for one message.

    async def _call(self, method: str, message: Message, answers: type[M]) -> M:
        data, fate = message.SerializeToString(), self._weather.fate(repeats=True)
        if fate.again is not None:
            self._house.spawn(self._later(fate.again, self._house.call(method, self._device, data)))
        if (behind := fate.behind(CALL_SECONDS)) is not None:
            self._house.spawn(self._later(behind, self._house.call(method, self._device, data)))
        await self._up(len(data), fate)
        answer = await self._house.call(method, self._device, data)
        return await self._down(answer, answers, self._weather.fate())

    async def _later(self, seconds: float, work: object) -> None:
        """A copy that nobody waits for: what it is answered, nobody hears."""
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            work.close()  # type: ignore[attr-defined]
            raise
        with contextlib.suppress(UmbelError):
            await work  # type: ignore[misc]

    # A report.

    async def _exchange(
        self, begin: ReportBegin, sealed: bytes, *, travels: bool, fate: Fate | None = None
    ) -> RetryWindow:
        offset = [0]
        requests = self._requests(begin, sealed, offset, travels=travels, fate=fate)
        async with contextlib.aclosing(self._house.stream("Report", self._device, requests)) as answers:
            proceed = await self._answer(answers, "proceed", travels=travels)
            offset[0] = proceed.proceed.offset
            accepted = await self._answer(answers, "accepted", travels=travels)
            return window_from_message(accepted.accepted.next)

    async def _requests(
        self, begin: ReportBegin, sealed: bytes, offset: list[int], *, travels: bool, fate: Fate | None
    ) -> AsyncIterator[bytes]:
        generation = self._house.generation
        question = pb.ReportRequest(begin=report_begin_to_message(begin)).SerializeToString()
        if travels:
            await self._up(len(question), fate or Fate())
        yield question
        for start in range(offset[0], len(sealed), CHUNK_BYTES):
            chunk = pb.ReportRequest(chunk=sealed[start : start + CHUNK_BYTES]).SerializeToString()
            if travels and self._asks_first:
                await self._up(len(chunk), self._weather.fate())
            self._house.require_same(generation)
            yield chunk

    async def _answer(self, answers: AsyncGenerator[bytes, None], step: str, *, travels: bool) -> pb.ReportResponse:
        data = await anext(answers, None)
        if data is None:
            raise Unreachable(f"the report ended before the coordinator said {step!r}; it goes on next time")
        fate = self._weather.fate() if travels else Fate()
        answer = await self._down(data, pb.ReportResponse, fate) if travels else parse(pb.ReportResponse, data)
        if answer.WhichOneof("step") != step:
            raise MalformedMessage(f"expected {step!r} in a report's answer, got {answer.WhichOneof('step')!r}")
        return answer

    # On the way.

    async def _up(self, size: int, fate: Fate) -> None:
        self.traffic.up += size
        await self._way(size / self._profile.up, fate)

    async def _down(self, data: bytes, kind: type[M], fate: Fate) -> M:
        await self._way(len(data) / self._profile.down, fate)
        self.traffic.down += len(data)
        return parse(kind, data)

    async def _way(self, seconds: float, fate: Fate) -> None:
        if fate.lost or fate.overtaken is not None or fate.late >= CALL_SECONDS:
            await asyncio.sleep(CALL_SECONDS)
            raise Unreachable("no answer in time")
        await self._travel(seconds + self._profile.latency / 2 + fate.late)

    async def _travel(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if not self._present():
            raise Unreachable("the device has left its network")
