"""Read the configuration once, and refuse a senseless one at the start.

This is the only module that looks at the environment. A value comes from the
real environment first, then from `.env`, then from its default. Three URLs
are the mode: each part of the service is embedded in the process while its
URL is unset.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dotenv import dotenv_values
from limits import parse_many

ENV_FILE = ".env"
MIN_SECRET_BYTES = 32  # RFC 7518, section 3.2: as long as the hash's output
STARTUP_FAILURE = 3  # exit status; uvicorn does not restart a worker on it


class SettingsError(ValueError):
    """A variable is missing or senseless; the text names it and the mend."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The validated configuration of one process."""

    jwt_secret_key: str = field(repr=False)
    jwt_algorithm: str = "HS256"
    jwt_expire_minutes: int = 30
    database_url: str = field(default="sqlite:///orders.db", repr=False)
    redis_url: str | None = field(default=None, repr=False)
    rabbitmq_url: str | None = field(default=None, repr=False)
    app_host: str = "127.0.0.1"
    app_port: int = 8000
    rate_limit: str = "5/minute"
    cors_origins: tuple[str, ...] = ("*",)
    forwarded_allow_ips: str = ""


def read_environment() -> dict[str, str]:
    """Return what `.env` says, overruled by the real environment."""
    from_file = {k: v or "" for k, v in dotenv_values(ENV_FILE).items()}
    real = {
        name: value
        for name, value in os.environ.items()
        if value or name in MEANINGFUL_WHEN_EMPTY
    }
    return {**from_file, **real}


def parse_settings(environ: Mapping[str, str]) -> Settings:
    """Validate every variable; raise SettingsError for the first bad one."""
    values = {}
    for name, parse in PARSERS.items():
        text = environ.get(name, "").strip()
        if text or name in MEANINGFUL_WHEN_EMPTY & environ.keys():
            try:
                values[name.lower()] = parse(text)
            except ValueError as error:
                raise SettingsError(f"{name} {error}") from error
    if "jwt_secret_key" not in values:
        raise SettingsError(f"JWT_SECRET_KEY is not set: {SECRET_MEND}")
    return Settings(**values)


def load_settings(*, worker: bool = False) -> Settings:
    """Return the settings, or end the process with one line that says why."""
    try:
        settings = parse_settings(read_environment())
        if worker and settings.rabbitmq_url is None:
            raise SettingsError(
                "RABBITMQ_URL is not set: a worker needs the broker; without"
                " one the API processes the orders itself"
            )
        return settings
    except SettingsError as error:
        print(f"orders cannot start: {error}", file=sys.stderr)
        raise SystemExit(STARTUP_FAILURE) from None


SECRET_MEND = (
    "put the output of `openssl rand -hex 32` there, or remove .env and"
    " let `uv run orders` write one"
)


def _secret(text: str) -> str:
    if re.match("(?i)change|replace|your|secret|example|<", text):
        raise ValueError(f"is a placeholder: {SECRET_MEND}")
    if len(text.encode()) < MIN_SECRET_BYTES:
        raise ValueError(
            f"is shorter than {MIN_SECRET_BYTES} bytes: {SECRET_MEND}"
        )
    return text


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"is {text!r}: use {', '.join(allowed)}")
        return text

    return parse


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not (
            low <= int(text) <= high
        ):
            raise ValueError(
                f"is {text!r}: use a whole number from {low} to {high}"
            )
        return int(text)

    return parse


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        forms = " or ".join(f"{scheme}://…" for scheme in schemes)
        try:
            parts = urlsplit(text)
            usable = parts.scheme in schemes and (
                parts.scheme == "sqlite" or bool(parts.hostname)
            )
            _ = parts.port  # raises ValueError when it is no port number
        except ValueError:
            usable = False
        if not usable or "://" not in text:
            # The value itself stays unsaid: it may hold a password.
            raise ValueError(
                f"is not usable: write {forms}, or unset it for the"
                " embedded mode"
            )
        return text

    return parse


def _rate_limit(text: str) -> str:
    try:
        if text and not all(item.amount > 0 for item in parse_many(text)):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"is {text!r}: write for example 5/minute, or leave it empty to"
            " turn the limit off"
        ) from None
    return text


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(part.strip() for part in text.split(",") if part.strip())
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ValueError(
                f"holds {origin!r}: write origins such as"
                " https://shop.example, separated by commas, or *"
            )
    return origins


PARSERS: dict[str, Callable[[str], object]] = {
    "JWT_SECRET_KEY": _secret,
    "JWT_ALGORITHM": _one_of("HS256", "HS384", "HS512"),
    "JWT_EXPIRE_MINUTES": _integer(1, 525_600),
    "DATABASE_URL": _url("postgresql", "sqlite"),
    "REDIS_URL": _url("redis", "rediss"),
    "RABBITMQ_URL": _url("amqp", "amqps"),
    "APP_HOST": str,
    "APP_PORT": _integer(1, 65_535),
    "RATE_LIMIT": _rate_limit,
    "CORS_ORIGINS": _origins,
    "FORWARDED_ALLOW_IPS": str,
}
MEANINGFUL_WHEN_EMPTY = {"RATE_LIMIT"}
