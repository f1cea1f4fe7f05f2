"""One good value of each kind, fixed for ever: golden vectors are made of them."""

from __future__ import annotations

from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from umbel.digests import digest_of
from umbel.file_delta import FileDelta
from umbel.plan import Kind, Plan
from umbel.release import Release, SignedRelease
from umbel.sealing import SEALED, Binding, Sealing
from umbel.update import Update
from umbel.visit import (
    Assignment,
    CheckIn,
    CheckInReply,
    Outcome,
    ReleaseOutcome,
    ReportBegin,
    Retry,
    RetryWindow,
    SessionRecord,
)
from umbel.weights import Weights

TOKEN: Final = bytes(range(200, 232))
BUNDLE: Final = digest_of(b"a manifest")
REPORT_ID: Final = "00112233445566778899aabbccddeeff"

PLAN: Final = Plan(
    kind=Kind.TRAIN,
    epochs=3,
    batch_size=16,
    max_steps=100,
    max_examples=500,
    min_examples=8,
    max_seconds=60.5,
    clip_norm=2.5,
    max_weight=1000.0,
    hyperparameters={"lr": 0.05, "mu": 0.01},
    seed=2**64 - 1,
)
RELEASE: Final = Release(
    model="smartwatch",
    number=7,
    version=5,
    channel="stable",
    bundle=BUNDLE,
    manifest_size=2048,
    issued_at=1_790_000_000.125,
)
SIGNED: Final = SignedRelease(statement=b"a statement", key_id="0123456789abcdef", signature=bytes(64))
CHECK_IN: Final = CheckIn(
    population="watches",
    runtimes=("onnx",),
    suites=("umbel-sealed/1",),
    held_bundles=(BUNDLE,),
    offers_work=True,
    training_examples=320,
    held_back_examples=80,
    sessions=(
        SessionRecord("exercises", 4, "-v[]+^"),
        SessionRecord("exercises", 5, "-v[!", "interrupted"),
    ),
    outcomes=(
        ReleaseOutcome("smartwatch", 6, Outcome.KEPT_OWN, "0.97 against 0.99 of its own"),
        ReleaseOutcome("smartwatch", 5, Outcome.ADOPTED),
        ReleaseOutcome("smartwatch", 4, Outcome.FAILED, "golden-mismatch"),
    ),
    channel="stable",
    sdk="umbel/0.1.0",
)
WORK: Final = CheckInReply(
    Assignment(
        session_id="s-0001",
        task="exercises",
        round=6,
        plan=PLAN,
        base=SIGNED,
        sealing=Sealing(SEALED, bytes(range(32))),
        upload_token=TOKEN,
        deadline=1_790_000_600.5,
        if_accepted=RetryWindow(60.0, 120.0),
        if_rejected=RetryWindow(5.0, 15.5),
    ),
    newest=SIGNED,
)
LATER: Final = CheckInReply(Retry(RetryWindow(30.0, 90.0), "the round has enough devices"), newest=SIGNED)
DELTA: Final = FileDelta(digest_of(b"weights 6"), digest_of(b"weights 7"), digest_of(b"delta"), 20_000)
REPORT_BEGIN: Final = ReportBegin(
    session_id="s-0001",
    report_id=REPORT_ID,
    upload_token=TOKEN,
    sealed_size=4096,
    sealed_digest=digest_of(b"sealed"),
)
UPDATE: Final = Update(
    delta=Weights(
        {
            "p_layer.weight": np.array([[1.5, -2.0, 0.25], [0.0, -0.0, 3e-45]], np.float32),
            "b_mean": np.float32(-7.0).reshape(()),
        }
    ),
    weight=64.0,
    metrics={"loss": 12.5, "correct": 51.0, "examples": 80.0, "train_loss": 0.125},
)
BINDING: Final = Binding(task="exercises", round=6, session_id="s-0001", report_id=REPORT_ID, base=BUNDLE)
RELEASE_KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
FOREIGN_RELEASE_KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(32))
SEALING_KEY: Final = X25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
SEALED_REPORT: Final = bytes.fromhex(
    "8af88d8fdf67fbdd159598a4311b2d543400b4d7b69f6c1e5880f10091f5d364"
    "e3713af30d3e1c7846a7fc05ddb8b82b94d8ea79884374ceb19ea2808bd7e151"
    "eea634726745d946d089b530b1d17019"
)
"""Sealed once for `BINDING` to `SEALING_KEY`."""
