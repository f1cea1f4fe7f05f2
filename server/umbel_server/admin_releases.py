"""Releases with their details -> the messages of `admin.proto`."""

from __future__ import annotations

from umbel.v1 import admin_pb2 as pb
from umbel_server.admin_messages import release_to_message
from umbel_server.releasing import ReleaseDetails


def release_details_to_message(details: ReleaseDetails) -> pb.PublishedRelease:
    """Encode a release and what it takes to have it."""
    message = release_to_message(details.release)
    message.encoding = details.encoding
    message.bundle_digest = details.bundle
    message.size = details.size
    message.size_by_runtime.update(details.size_by_runtime)
    message.standing = details.standing
    message.head_of.extend(details.head_of)
    for delta in details.deltas:
        message.deltas.add(from_release=delta.release, size=delta.size, stands_for=delta.stands_for)
    return message
