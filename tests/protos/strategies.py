"""How hypothesis draws the values of the agreement: all that is legal, the edges among it."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from umbel.digests import Digest
from umbel.fields import MAX_COUNT, MAX_TEXT
from umbel.file_delta import FileDelta
from umbel.manifest import MAX_MANIFEST_BYTES
from umbel.offer import SignedOffer
from umbel.plan import Kind, Plan
from umbel.release import Release, SignedRelease
from umbel.sealing import SEALED, Sealing
from umbel.update import Update
from umbel.visit import (
    Assignment,
    CheckIn,
    CheckInReply,
    Event,
    Health,
    Outcome,
    ReleaseOutcome,
    ReportBegin,
    Retry,
    RetryWindow,
    SessionRecord,
)
from umbel.weights import Weights

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_TEXT).filter(str.isprintable)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: Digest(raw.hex()))
report_ids = st.binary(min_size=16, max_size=16).map(bytes.hex)
tokens = st.binary(min_size=1, max_size=256)
counts = st.integers(0, MAX_COUNT)
small = st.integers(0, 2**32 - 1)
amounts = st.floats(0, 1e300)
instants = st.integers(0, 2**45).map(lambda milliseconds: milliseconds / 1000)
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)

plans = st.builds(
    Plan,
    kind=st.sampled_from(Kind),
    epochs=small,
    batch_size=st.integers(1, 2**32 - 1),
    max_steps=small,
    max_examples=counts,
    min_examples=counts,
    max_seconds=amounts,
    clip_norm=amounts,
    max_weight=amounts,
    hyperparameters=st.dictionaries(names, amounts, max_size=4),
    seed=st.integers(0, 2**64 - 1),
)
releases = st.builds(
    Release,
    model=names,
    number=st.integers(1, MAX_COUNT),
    version=st.integers(1, MAX_COUNT),
    channel=names,
    bundle=digests,
    manifest_size=st.integers(0, MAX_MANIFEST_BYTES),
    issued_at=instants,
)
signed_releases = st.builds(
    SignedRelease, statement=st.binary(min_size=1), key_id=texts, signature=st.binary(min_size=1)
)
sessions = st.builds(
    SessionRecord,
    task=names,
    round=counts,
    shape=st.text([event.value for event in Event], max_size=64),
    error=texts,
)
outcomes = st.builds(
    ReleaseOutcome,
    model=names,
    number=counts,
    outcome=st.sampled_from(Outcome),
    reason=texts,
    execution=st.just("") | names,
    accuracy_change=st.none() | st.floats(-1, 1),
    latency_ratio=st.none() | st.floats(1e-6, 1e6),
)
signed_offers = st.builds(SignedOffer, statement=st.binary(min_size=1), key_id=texts, signature=st.binary(min_size=1))
check_ins = st.builds(
    CheckIn,
    population=names,
    runtimes=st.lists(names, max_size=3).map(tuple),
    suites=st.lists(texts, max_size=3).map(tuple),
    held_bundles=st.lists(digests, max_size=3).map(tuple),
    offers_work=st.booleans(),
    training_examples=counts,
    held_back_examples=counts,
    sessions=st.lists(sessions, max_size=3).map(tuple),
    outcomes=st.lists(outcomes, max_size=3).map(tuple),
    channel=names,
    sdk=texts,
    protocol=st.integers(1, 2**32 - 1),
    release=counts,
    health=st.builds(
        Health,
        accuracy=st.none() | st.floats(-10, 1),
        latency_seconds=st.none() | st.floats(1e-6, 1e6),
        memory_mb=st.none() | st.floats(1e-3, 1e6),
    ),
)
windows = st.tuples(amounts, amounts).map(lambda pair: RetryWindow(min(pair), max(pair)))
assignments = st.builds(
    Assignment,
    session_id=names,
    task=names,
    round=counts,
    plan=plans,
    base=signed_releases,
    sealing=st.builds(Sealing, st.just(SEALED), st.binary(min_size=32, max_size=32)),
    upload_token=tokens,
    deadline=instants,
    if_accepted=windows,
    if_rejected=windows,
)
replies = st.builds(
    CheckInReply,
    reply=assignments | st.builds(Retry, windows, texts),
    newest=st.none() | signed_releases,
    offer=st.none() | signed_offers,
    deltas=st.lists(st.builds(FileDelta, digests, digests, digests, st.integers(1, MAX_COUNT)), max_size=3).map(tuple),
)
report_begins = st.builds(
    ReportBegin,
    session_id=names,
    report_id=report_ids,
    upload_token=tokens,
    sealed_size=counts,
    sealed_digest=digests,
)

shapes = st.dictionaries(names, arrays.array_shapes(min_dims=0, max_dims=3, max_side=4), max_size=4)
metrics = st.dictionaries(
    st.sampled_from(["loss", "correct", "examples", "train_loss", "é"]), st.floats(0, 1e300), max_size=5
)


@st.composite
def weights_of(draw: st.DrawFn, wanted: dict[str, tuple[int, ...]]) -> Weights:
    """Finite weights of these shapes."""
    return Weights({name: draw(arrays.arrays(np.float32, shape, elements=numbers)) for name, shape in wanted.items()})


updates = st.builds(Update, delta=shapes.flatmap(weights_of), weight=st.floats(1e-6, 1e6), metrics=metrics)
