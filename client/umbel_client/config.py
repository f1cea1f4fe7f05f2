"""`device.toml`: what may be set for one device. Everything has a default; unknown names are refused.

[policy]                    # umbel_client.idle.IdlePolicy
version = 1
require_idle = false

[personal]                  # umbel_client.personal.PersonalSettings
epochs = 5
hyperparameters = { lr = 0.05 }

[examples]                  # umbel_client.examples.StoreLimits
max_age_seconds = 2592000.0

[runtime]                   # umbel_client.opening.RuntimeSettings
name = "litert"

[mirror]                    # umbel_client.opening.MirrorSettings
address = "https://cdn.example.org/umbel"

[privacy]                   # umbel_client.private.PrivacyPolicy
minimum_cohort = 100
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from umbel.errors import MalformedMessage, NotFound
from umbel_client.examples import StoreLimits
from umbel_client.idle import IdlePolicy
from umbel_client.opening import MirrorSettings, RuntimeSettings
from umbel_client.personal import PersonalSettings
from umbel_client.private import PrivacyPolicy

FILE = "device.toml"


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """One device's settings."""

    policy: IdlePolicy = field(default_factory=IdlePolicy)
    personal: PersonalSettings = field(default_factory=PersonalSettings)
    examples: StoreLimits = field(default_factory=StoreLimits)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    mirror: MirrorSettings = field(default_factory=MirrorSettings)
    privacy: PrivacyPolicy = field(default_factory=PrivacyPolicy)


def load_config(home: Path, path: Path | None = None) -> DeviceConfig:
    """The settings in `path`, or in the home's `device.toml`, or the defaults where there is none.

    Raises:
        NotFound: `path` was given and doesn't exist.
        MalformedMessage: not TOML, or with names or values that don't belong there.
    """
    file = path or home / FILE
    if not file.is_file():
        if path is not None:
            raise NotFound(f"no settings at {path}")
        return DeviceConfig()
    try:
        tree = tomllib.loads(file.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"{file} isn't TOML: {error}") from error
    defaults = DeviceConfig()
    known = [entry.name for entry in fields(defaults)]
    unknown = sorted(set(tree) - set(known))
    if unknown:
        raise MalformedMessage(f"{file} has tables {unknown}; it may have {', '.join(known)}")
    return replace(
        defaults, **{name: _settings(getattr(defaults, name), table, str(file)) for name, table in tree.items()}
    )


def _settings(defaults: Any, table: Any, where: str) -> Any:
    if isinstance(defaults, IdlePolicy):
        return IdlePolicy.from_tree(table)
    known = {entry.name: getattr(defaults, entry.name) for entry in fields(defaults)}
    if not isinstance(table, dict):
        raise MalformedMessage(f"{where}: {type(defaults).__name__} must be a table")
    for name, value in table.items():
        if name not in known:
            raise MalformedMessage(f"{where} has {name!r}; known are {', '.join(known)}")
        if not _fits(value, known[name]):
            raise MalformedMessage(f"{where}: {name} is {value!r}; its default is {known[name]!r}")
    return type(defaults)(**table)


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, dict):
        return isinstance(value, dict) and all(_fits(number, 0.0) for number in value.values())
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if isinstance(default, int) and not isinstance(value, int):
        return False
    return math.isfinite(value) and value >= 0
