"""The device SDK: answer on the device, learn from what it sees, give back only what is sealed.

    from umbel_client import Device

    device = Device.open(home)          # a folder that `umbel-device enrol` has enrolled
    device.predict(x)                   # no network
    device.learn_from(x, y)             # kept here, never sent
    visit = await device.wake()         # one visit, when nobody needs the machine

Importing this package is cheap; what a name needs is imported when the name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from umbel_client.channel import Channel
    from umbel_client.device import Device
    from umbel_client.enrolling import enrol
    from umbel_client.enrolment import EnrolmentCode, Identity
    from umbel_client.examples import ExampleStore, MemoryExamples, StoreLimits
    from umbel_client.http_mirror import Mirror
    from umbel_client.idle import ALWAYS, Eligible, IdlePolicy, Waiting
    from umbel_client.personal import PersonalSettings
    from umbel_client.private import PrivacyPolicy
    from umbel_client.status import DeviceStatus, HostStatus, StatusSource
    from umbel_client.visits import Ending, Visit

_HOMES = {
    "ALWAYS": "idle",
    "Channel": "channel",
    "Device": "device",
    "DeviceStatus": "status",
    "Eligible": "idle",
    "Ending": "visits",
    "EnrolmentCode": "enrolment",
    "ExampleStore": "examples",
    "HostStatus": "status",
    "Identity": "enrolment",
    "IdlePolicy": "idle",
    "MemoryExamples": "examples",
    "Mirror": "http_mirror",
    "PersonalSettings": "personal",
    "PrivacyPolicy": "private",
    "StatusSource": "status",
    "StoreLimits": "examples",
    "Visit": "visits",
    "Waiting": "idle",
    "enrol": "enrolling",
}

__all__ = [
    "ALWAYS",
    "Channel",
    "Device",
    "DeviceStatus",
    "Eligible",
    "Ending",
    "EnrolmentCode",
    "ExampleStore",
    "HostStatus",
    "Identity",
    "IdlePolicy",
    "MemoryExamples",
    "Mirror",
    "PersonalSettings",
    "PrivacyPolicy",
    "StatusSource",
    "StoreLimits",
    "Visit",
    "Waiting",
    "enrol",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
