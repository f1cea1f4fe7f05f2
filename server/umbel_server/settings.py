"""A coordinator's settings: the command line, then `UMBEL_…` in the environment, then `config.toml` in its folder."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from umbel.errors import OutOfBounds
from umbel.helper_card import HelperCard
from umbel_server.drift_windows import MOST, Windows
from umbel_server.files import read_file
from umbel_server.roles import Role
from umbel_server.selection import Pace
from umbel_server.tokens import USUAL, TokenRules, known_algorithms
from umbel_server.trust import Trust

DEVICE_PORT = 7443
ENROL_PORT = 7444
ADMIN_PORT = 7445
TOKEN_PORT = 7447
Port = Annotated[int, Field(ge=0, le=65_535)]


class Oidc(BaseModel):
    """An OpenID Connect provider whose tokens let operators in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str = Field(pattern=r"^https://[^\s?#]+$", max_length=256)
    """The provider's address, as it stands in its tokens."""
    audience: str = Field(min_length=1, max_length=256)
    """What tokens for this coordinator are made out to."""
    roles: dict[str, Role] = Field(min_length=1)
    """Group -> role; whose groups aren't here gets in nowhere."""
    groups_claim: str = "groups"
    """Where a token tells groups; `realm_access.roles` for a claim inside a claim."""
    require: dict[str, str] = Field(default_factory=dict)
    """Claims that must have exactly this value: the tenant's id, where a provider serves many tenants."""
    algorithms: Annotated[tuple[str, ...], AfterValidator(known_algorithms)] = USUAL
    longest_hours: float = Field(default=24.0, gt=0, le=168)
    """Tokens that were issued longer ago don't count."""
    ca: Path | None = None
    """PEM of the authority of the provider's own certificate; None for those that this machine trusts."""

    @property
    def rules(self) -> TokenRules:
        """Which tokens count."""
        return TokenRules(
            self.issuer,
            self.audience,
            MappingProxyType(self.roles),
            self.groups_claim,
            MappingProxyType(self.require),
            self.algorithms,
            self.longest_hours * 3600,
        )


class Settings(BaseSettings):
    """All that an operator can choose before the start."""

    model_config = SettingsConfigDict(env_prefix="UMBEL_", frozen=True, extra="forbid")

    state: Path
    """The coordinator's folder: keys, authorities, blobs, and the SQLite database where there is no other."""
    profile: Literal["development", "production"] = "development"
    """`production` refuses what is only good for development, unless it is asked for by name."""
    host: Annotated[str, AfterValidator(lambda host: host.removeprefix("[").removesuffix("]"))] = "127.0.0.1"
    """Address to listen at; `0.0.0.0` for all."""
    names: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    """Host names and addresses that the coordinator's certificate is good for."""
    advertise: str = ""
    """host:port that devices are told to call; empty for the host that they enrolled at, and the device port."""
    device_port: Port = DEVICE_PORT
    enrol_port: Port = ENROL_PORT
    admin_port: Port = ADMIN_PORT
    token_port: Port = TOKEN_PORT
    """For operators with tokens; open only where there is an `oidc`."""
    metrics_port: Port | None = None
    """For Prometheus, which reads `/metrics` there over plain HTTP; None: no such port."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics port, at which nobody is asked who they are."""
    oidc: Oidc | None = None
    """Whose tokens let operators in, beside certificates; None: nobody's."""
    inference_port: Port | None = None
    """Where programs ask released models, by the Open Inference Protocol over gRPC; None: nowhere."""
    inference_http_port: Port | None = None
    """The same over HTTP."""
    inference_threads: int = Field(default=0, ge=0, le=1_024)
    """Answers that are made at a time; 0: as many as the machine has processors."""
    inference_waiting: int = Field(default=256, ge=1)
    """Questions that may be here at a time; who comes then is told to come later."""
    inference_log_days: float = Field(default=14.0, ge=0)
    """How long records of questions are kept; 0: none are written."""
    drift_reference_rounds: int = Field(default=10, ge=1, le=MOST)
    """How many of a task's first rounds its last ones are compared with, to notice drift."""
    drift_recent_rounds: int = Field(default=5, ge=1, le=MOST)
    """How many of its last ones."""
    database_url: str = ""
    """SQLAlchemy URL; empty for SQLite in the folder."""
    helper: Path | None = None
    """The card of the helper that makes private rounds possible; a relative path counts from the folder."""
    attestation: Literal["accept", "refuse", ""] = ""
    """Devices without proof of integrity: accept or refuse; empty lets the profile decide."""
    device_certificate_days: float = Field(default=7.0, gt=0, le=90)
    operator_certificate_days: float = Field(default=90.0, gt=0, le=366)
    pace_shortest_seconds: float = Field(default=1.0, gt=0)
    """How long a small fleet's devices wait between visits while there is work, on average."""
    pace_idle_seconds: float = Field(default=60.0, gt=0)
    """How long devices wait between visits while there is no work, on average."""
    pace_longest_seconds: float = Field(default=6 * 3600.0, gt=0)
    """No device is sent away for longer."""
    pace_steering: bool = True
    """False: devices come back after `pace_idle_seconds`, however many are wanted; to see what steering is worth."""
    adaptive_deadlines: bool = True
    """False: sessions and rounds may take as long as their task allows, however fast devices are."""
    durable: bool = True
    """False: SQLite and blobs leave it to the system when bytes reach the disk. A power cut then loses what was
    acknowledged: for simulations only."""
    stop_seconds: float = Field(default=5.0, ge=0)
    """How long calls may go on once the coordinator has been told to stop."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def effective_database_url(self) -> str:
        """The database to open."""
        return self.database_url or f"sqlite:///{self.state.resolve() / 'umbel.db'}"

    @property
    def pace(self) -> Pace:
        """How devices are paced."""
        return Pace(
            shortest=self.pace_shortest_seconds,
            longest=self.pace_longest_seconds,
            idle=self.pace_idle_seconds,
            steers=self.pace_steering,
            adapts=self.adaptive_deadlines,
        )

    @property
    def windows(self) -> Windows:
        """Which rounds are compared to notice drift."""
        return Windows(reference=self.drift_reference_rounds, recent=self.drift_recent_rounds)

    @property
    def helper_card(self) -> HelperCard | None:
        """The helper's card, if there is to be one; raises `NotFound` or `MalformedMessage`."""
        if self.helper is None:
            return None
        path = self.helper if self.helper.is_file() else self.state / self.helper
        return HelperCard.from_text(read_file(path))

    @property
    def trust(self) -> Trust:
        """Who runs the helper. One on this very machine is nobody else's, whatever its card says."""
        card = self.helper_card
        return Trust(card.operator if card and not _is_here(card.address.rpartition(":")[0]) else "")

    @property
    def accepts_unattested(self) -> bool:
        """Whether a device may enrol without proof of its integrity."""
        return (self.attestation or ("accept" if self.profile == "development" else "refuse")) == "accept"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What this coordinator trusts that a fleet of other people's devices shouldn't, in words."""
        found = ["certificate authorities and signing keys lie in files on this machine"]
        if self.accepts_unattested:
            found.append("devices enrol without proof of their integrity")
        if not self.durable:
            found.append("a power cut loses what was acknowledged (durable = false)")
        if self.helper is None:
            found.append("there is no helper: tasks can't keep updates private")
        elif self.trust.is_development:
            found.append(self.trust.words.removeprefix("development trust: "))
        return tuple(f"development trust: {words}" for words in found)


def _is_here(host: str) -> bool:
    """Whether a name or address means this very machine wherever it is read."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def load_settings(state: Path, **chosen: Any) -> Settings:
    """Put the settings for a coordinator's folder together; `None` among `chosen` means not chosen.

    Raises:
        OutOfBounds: a setting that isn't known or isn't possible, named with its reason.
    """
    file = state / "config.toml"

    class FromFolder(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, file)

    try:
        return FromFolder(state=state, **{name: value for name, value in chosen.items() if value is not None})
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise OutOfBounds(f"settings don't fit ({reasons}); see {file} and UMBEL_ in the environment") from error
    except ValueError as error:
        raise OutOfBounds(f"{file} isn't TOML: {error}") from error
