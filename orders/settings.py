"""Read the configuration once, and refuse a senseless one at the start.

This is the only module that looks at the environment. A value comes from the
environment, then from `.env`, then from its default; empty counts as unset.
Three URLs are the mode: a part of the service is embedded in the process
while its URL is unset.
"""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

import dotenv
import limits
import pydantic
from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

ENV_FILE = Path(".env")
STARTUP_FAILURE = 3  # exit status; uvicorn does not restart a worker on it
SCHEMES = {
    "database_url": ("postgresql", "sqlite"),
    "redis_url": ("redis", "rediss"),
    "rabbitmq_url": ("amqp", "amqps"),
}
# RFC 7518, section 3.2: a key is at least as long as the hash's output.
MIN_SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
MEND = (
    "put the output of `openssl rand -hex {}` there, or remove .env and let"
    " `uv run orders` write one"
)


class Settings(BaseSettings):
    """The validated configuration of one process."""

    model_config = SettingsConfigDict(frozen=True, hide_input_in_errors=True)

    database_url: str = Field(default="sqlite:///orders.db", repr=False)
    redis_url: str | None = Field(default=None, repr=False)
    rabbitmq_url: str | None = Field(default=None, repr=False)
    jwt_algorithm: Literal["HS256", "HS384", "HS512"] = "HS256"
    jwt_secret_key: str = Field(default="", repr=False)
    jwt_expire_minutes: int = Field(default=30, ge=1, le=525_600)
    app_host: str = "127.0.0.1"
    app_port: int = Field(default=8000, ge=1, le=65_535)
    web_concurrency: int = Field(default=1, ge=1, le=64)  # uvicorn's name
    rate_limit: str = "5/minute"
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ("*",)
    forwarded_allow_ips: str = ""
    log_format: Literal["text", "json"] = "text"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Count what is empty as unset, but for the limit: empty is off."""
        return {k: v for k, v in values.items() if v or k == "rate_limit"}

    @field_validator(*SCHEMES)
    @classmethod
    def _check_url(cls, url: str | None, info: ValidationInfo) -> str | None:
        """Refuse a URL that can never work; its value stays unsaid."""
        if url is None:
            return None
        schemes = SCHEMES[str(info.field_name)]
        try:
            parts = urlsplit(url)
            _ = parts.port  # raises ValueError when it is no port number
            if parts.scheme == "sqlite":
                usable = len(parts.path) > 1 and ":memory:" not in parts.path
            else:  # another @: a password with an @, a / or a ?
                ats = parts.netloc.count("@")
                usable = bool(parts.hostname) and url.count("@") == ats < 2
        except ValueError:
            usable = False
        if not usable or parts.scheme not in schemes:
            raise ValueError(
                f"is not usable: write {'://… or '.join(schemes)}://…, with"
                " special characters of a password percent-encoded, or unset"
                " it for the embedded mode"
            )
        return url

    @field_validator("jwt_secret_key")
    @classmethod
    def _check_secret(cls, secret: str, info: ValidationInfo) -> str:
        """Refuse a placeholder, and what is too short for the algorithm."""
        algorithm = info.data.get("jwt_algorithm", "HS256")
        least = MIN_SECRET_BYTES[algorithm]
        mend = MEND.format(least)
        if re.match("(?i)change|replace|your|secret|example|<", secret):
            raise ValueError(f"is a placeholder: {mend}")
        if secret and len(secret.encode()) < least:
            fault = f"is shorter than the {least} bytes of {algorithm}"
            raise ValueError(f"{fault}: {mend}")
        return secret

    @field_validator("rate_limit")
    @classmethod
    def _check_rate_limit(cls, text: str) -> str:
        """Refuse what slowapi cannot read, and limits that let nothing by."""
        try:
            parsed = limits.parse_many(text) if text else []
            usable = all(limit.amount > 0 for limit in parsed)
        except ValueError:
            usable = False
        if not usable:
            mend = "or leave it empty to turn the limit off"
            raise ValueError(f"is no limit: write such as 5/minute, {mend}")
        return text

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split_origins(cls, value: Any) -> Any:
        """Read origins that are separated by commas."""
        if not isinstance(value, str):
            return value
        origins = tuple(part.strip() for part in value.split(","))
        if not all(re.fullmatch(r"\*|https?://[^/\s]+", o) for o in origins):
            mend = "write such as https://shop.example, separated by commas"
            raise ValueError(f"is no list of origins: {mend}, or *")
        return origins


def load_settings(*, secret: bool = True) -> Settings:
    """Return the settings, or end the process with one line that says why."""
    # What only `.env` sets is put into the environment, for libraries to see.
    for name, value in dotenv.dotenv_values(ENV_FILE).items():
        empty = not os.environ.get(name) and name != "RATE_LIMIT"
        if value is not None and (empty or name not in os.environ):
            os.environ[name] = value
    try:
        settings = Settings()
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        fault = first.get("ctx", {}).get("error") or f": {first['msg']}"
        refuse_to_start(f"{str(first['loc'][0]).upper()} {fault}")
    # Its absence is no fault for a migration.
    if secret and not settings.jwt_secret_key:
        mend = MEND.format(MIN_SECRET_BYTES[settings.jwt_algorithm])
        refuse_to_start(f"JWT_SECRET_KEY is not set: {mend}")
    return settings


def refuse_to_start(reason: str) -> NoReturn:
    """End the process with the one line that a person needs."""
    print(f"orders cannot start: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(STARTUP_FAILURE)
