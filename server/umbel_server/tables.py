"""The tables of the coordinator's store, the same on SQLite and on PostgreSQL.

`migrations/` builds them step by step; a test compares what it built with what stands here. Instants are POSIX
seconds in double precision; `…_json` columns hold canonical JSON (see `umbel_server.json_text`).
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
)

METADATA: Final = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    }
)

MODELS: Final = Table(
    "models",
    METADATA,
    Column("name", String(100), primary_key=True),
    Column("next_release", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
)

VERSIONS: Final = Table(
    "versions",
    METADATA,
    Column("model", String(100), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("parent", Integer, nullable=True),
    Column("state", String(20), nullable=False),
    Column("bundle", String(64), nullable=False),
    Column("manifest_size", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("lineage_json", Text, nullable=False),
    Column("metrics_json", Text, nullable=False),
    ForeignKeyConstraint(["model"], ["models.name"]),
)

VERSION_FILES: Final = Table(
    "version_files",
    METADATA,
    Column("model", String(100), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("digest", String(64), primary_key=True),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.number"]),
)

RELEASES: Final = Table(
    "releases",
    METADATA,
    Column("model", String(100), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("channel", String(100), nullable=False),
    Column("statement", LargeBinary, nullable=False),
    Column("key_id", String(16), nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("issued_at", Double, nullable=False),
    ForeignKeyConstraint(["model", "version"], ["versions.model", "versions.number"]),
    Index("ix_releases_newest", "model", "channel", "number"),
)

TASKS: Final = Table(
    "tasks",
    METADATA,
    Column("name", String(100), primary_key=True),
    Column("model", String(100), nullable=False),
    Column("population", String(100), nullable=False),
    Column("state", String(20), nullable=False),
    Column("task_json", Text, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("judged_rounds", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("strategy_state", String(64), nullable=True),
    Column("clip_norm", Double, nullable=True),
    ForeignKeyConstraint(["model"], ["models.name"]),
)

ROUNDS: Final = Table(
    "rounds",
    METADATA,
    Column("task", String(100), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(20), primary_key=True),
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("base_version", Integer, nullable=False),
    Column("base_release", Integer, nullable=False),
    Column("base_bundle", String(64), nullable=False),
    Column("goal", Integer, nullable=False),
    Column("minimum", Integer, nullable=False),
    Column("slots", Integer, nullable=False),
    Column("session_seconds", Double, nullable=False),
    Column("opened_at", Double, nullable=False),
    Column("due", Double, nullable=False),
    Column("deadline", Double, nullable=False),
    Column("weights", BigInteger, nullable=False, server_default="0"),
    Column("ended_at", Double, nullable=True),
    Column("version", Integer, nullable=True),
    Column("pending_state", String(64), nullable=True),
    Column("weight", Double, nullable=False),
    Column("metrics_json", Text, nullable=False),
    Column("bytes_up", BigInteger, nullable=False),
    Column("bytes_down", BigInteger, nullable=False),
    ForeignKeyConstraint(["task"], ["tasks.name"]),
)

SESSIONS: Final = Table(
    "sessions",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("task", String(100), nullable=False),
    Column("round", Integer, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("device", String(32), nullable=False),
    Column("token_digest", String(64), nullable=False),
    Column("state", String(20), nullable=False),
    Column("detail", Text, nullable=False),
    Column("assigned_at", Double, nullable=False),
    Column("deadline", Double, nullable=False),
    Column("ended_at", Double, nullable=True),
    Column("report_id", String(32), nullable=True),
    Column("sequence", Integer, nullable=True),
    Column("sealed_digest", String(64), nullable=True),
    Column("sealed_size", BigInteger, nullable=False),
    ForeignKeyConstraint(["task", "round", "kind"], ["rounds.task", "rounds.number", "rounds.kind"]),
    # The last line against counting twice: even a coordinator that lost its mind can't commit it.
    UniqueConstraint("report_id"),
    UniqueConstraint("task", "round", "kind", "sequence"),
    Index("ix_sessions_round", "task", "round", "kind", "state"),
    Index("ix_sessions_device", "device", "state"),
)

PRIVATE_ROUNDS: Final = Table(
    "private_rounds",
    METADATA,
    Column("task", String(100), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(20), primary_key=True),
    # What both aggregators signed; see umbel.descriptor.
    Column("statement", LargeBinary, nullable=False),
    Column("leader_signature", LargeBinary, nullable=False),
    Column("helper_signature", LargeBinary, nullable=False),
    ForeignKeyConstraint(["task", "number", "kind"], ["rounds.task", "rounds.number", "rounds.kind"]),
)

DEVICES: Final = Table(
    "devices",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("population", String(100), nullable=False),
    Column("enrolled_at", Double, nullable=False),
    Column("last_seen", Double, nullable=True),
    Column("runtimes", Text, nullable=False),
    Column("sdk", Text, nullable=False),
    Column("visits", Integer, nullable=False),
    Column("reports", Integer, nullable=False),
    Column("revoked_at", Double, nullable=True),
    Index("ix_devices_population", "population", "last_seen"),
    Index("ix_devices_revoked_at", "revoked_at"),
)

SHAPES: Final = Table(
    "session_shapes",
    METADATA,
    Column("task", String(100), primary_key=True),
    Column("shape", String(64), primary_key=True),
    Column("error", String(256), primary_key=True),
    Column("count", Integer, nullable=False),
)

OUTCOMES: Final = Table(
    "release_outcomes",
    METADATA,
    Column("model", String(100), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("device", String(32), primary_key=True),
    Column("outcome", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Double, nullable=False),
)

AUDIT: Final = Table(
    "audit",
    METADATA,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", String(100), nullable=False),
    Column("action", String(100), nullable=False),
    Column("object", String(256), nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("body_json", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Index("ix_audit_object", "object", "sequence"),
)

TOKENS: Final = Table(
    "enrolment_tokens",
    METADATA,
    # A token's SHA-256: whoever reads the table can't enrol with it.
    Column("digest", String(64), primary_key=True),
    Column("population", String(100), nullable=False),
    Column("created_by", String(100), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("used_at", Double, nullable=True),
    Column("used_by", String(32), nullable=True),
)

OPERATORS: Final = Table(
    "operators",
    METADATA,
    Column("id", String(32), primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("role", String(20), nullable=False),
    Column("added_by", String(100), nullable=False),
    Column("added_at", Double, nullable=False),
    Column("revoked_at", Double, nullable=True),
)

LISTED: Final = Table(
    "listed_releases",
    METADATA,
    # Releases for devices to adopt, which the release listing (TUF) has or is to have; facts that never change.
    Column("model", String(100), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("content_of", Integer, nullable=False),
    Column("from_number", Integer, nullable=False),
    ForeignKeyConstraint(["model", "number"], ["releases.model", "releases.number"]),
)

HEADS: Final = Table(
    "channel_heads",
    METADATA,
    # What a device gets that no rollout takes; under no population: whatever its population.
    Column("model", String(100), primary_key=True),
    Column("channel", String(100), primary_key=True),
    Column("population", String(100), primary_key=True),
    Column("number", Integer, nullable=False),
)

ROLLOUTS: Final = Table(
    "rollouts",
    METADATA,
    Column("id", String(100), primary_key=True),
    Column("model", String(100), nullable=False),
    Column("channel", String(100), nullable=False),
    Column("population", String(100), nullable=False),
    Column("stage", String(20), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("rollout_json", Text, nullable=False),
    Column("judgement_json", Text, nullable=False),
    ForeignKeyConstraint(["model"], ["models.name"]),
    Index("ix_rollouts_where", "model", "channel", "population", "stage"),
)

EXECUTIONS: Final = Table(
    "executions",
    METADATA,
    Column("id", String(32), primary_key=True),
    # Empty for a release that everybody on the channel gets.
    Column("rollout", String(100), nullable=False),
    Column("wave", Integer, nullable=False),
    Column("model", String(100), nullable=False),
    Column("number", Integer, nullable=False),
    Column("device", String(32), nullable=False),
    Column("offered_at", Double, nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("accuracy_change", Double, nullable=True),
    Column("latency_ratio", Double, nullable=True),
    Column("answered_at", Double, nullable=True),
    # One device, one vote.
    UniqueConstraint("model", "number", "device"),
    Index("ix_executions_rollout", "rollout", "number"),
)

HEALTH: Final = Table(
    "device_health",
    METADATA,
    # What each device told last of the release that answers, and what it had told when the window began in which
    # rollouts compare devices; NULL for what it never told.
    Column("device", String(32), primary_key=True),
    Column("population", String(100), nullable=False),
    Column("at", Double, nullable=False),
    Column("release", Integer, nullable=False),
    Column("troubles", Integer, nullable=False),
    Column("accuracy", Double, nullable=True),
    Column("latency_seconds", Double, nullable=True),
    Column("memory_mb", Double, nullable=True),
    Column("before_accuracy", Double, nullable=True),
    Column("before_latency_seconds", Double, nullable=True),
    Column("before_memory_mb", Double, nullable=True),
    Index("ix_device_health_population", "population", "at"),
)

REQUESTS: Final = Table(
    "requests",
    METADATA,
    # A mutating call that was answered; asked again under the same id, it is answered the same and nothing is done.
    Column("request_id", String(64), primary_key=True),
    Column("actor", String(100), nullable=False),
    Column("action", String(100), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("at", Double, nullable=False),
    # SHA-256 of what else was asked for, and what was answered where the subject alone doesn't tell it.
    Column("body", String(64), nullable=True),
    Column("answer", Text, nullable=True),
)

LEASES: Final = Table(
    "leases",
    METADATA,
    Column("name", String(100), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("until", Double, nullable=False),
)

HOLDS: Final = Table(
    "holds",
    METADATA,
    # No offers for this model while the row stands.
    Column("model", String(100), primary_key=True),
    Column("actor", String(100), nullable=False),
    Column("reason", Text, nullable=False),
    Column("at", Double, nullable=False),
)

CHECKPOINTS: Final = Table(
    "audit_checkpoints",
    METADATA,
    Column("size", Integer, primary_key=True, autoincrement=False),
    Column("note", Text, nullable=False),
    Column("at", Double, nullable=False),
)


def newest_first(series: Column[Any], number: Column[Any], at: Column[Any]) -> tuple[ColumnElement[Any], ...]:
    """Order rows of several series by time, but within each series by number: a clock may have been ahead."""
    not_later_than_the_next = func.min(at).over(partition_by=series, order_by=number.desc())
    return not_later_than_the_next.desc(), number.desc()
