"""Read the configuration once, and refuse a senseless one at the start.

Only this module looks at the environment. A value comes from there, then from
`.env`, then from its default; empty counts as unset. Three URLs are the mode:
a part of the service runs in the process while its URL is unset.
"""

import os
import re
import sys
from pathlib import Path
from typing import Literal, NoReturn

import dotenv
import limits
import pydantic
from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_FILE = Path(".env")
# After the scheme: a user, a host, a port, and the rest. No other @ or :
URL = (
    r"://([^@/?#]*@)?([^][@/?#:]+|\[[^][]+\])(:[1-6]?\d{1,4})?([/?#][^@]*)?\Z"
)
ENCODED = "special characters percent-encoded, or unset it for embedded mode"
MENDS = {
    "database_url": f"write postgresql://… or sqlite:///…, {ENCODED}",
    "redis_url": f"write redis://… or rediss://…, {ENCODED}",
    "rabbitmq_url": f"write amqp://… or amqps://…, {ENCODED}",
    "rate_limit": "write such as 5/minute, or leave it empty to turn it off",
    "cors_origins": "write such as https://shop.example, with commas, or *",
}
ORIGIN = r"(\*|https?://[^/\s,]+)"


class Settings(BaseSettings):
    """The validated configuration of one process."""

    model_config = SettingsConfigDict(
        frozen=True, env_ignore_empty=True, regex_engine="python-re"
    )

    database_url: str = Field(
        "sqlite:///orders.db",
        repr=False,
        pattern=rf"^(postgresql{URL}|sqlite:///(?!.*:memory:)[^?])",
    )
    redis_url: str | None = Field(None, repr=False, pattern=f"^rediss?{URL}")
    rabbitmq_url: str | None = Field(None, repr=False, pattern=f"^amqps?{URL}")
    jwt_algorithm: Literal["HS256", "HS384", "HS512"] = "HS256"
    jwt_secret_key: str = Field("", repr=False)
    jwt_expire_minutes: int = Field(30, ge=1, le=525_600)
    app_host: str = "127.0.0.1"
    app_port: int = Field(8000, ge=1, le=65_535)
    web_concurrency: int = Field(1, ge=1, le=64)  # uvicorn's name
    # Here, empty is not unset: it turns the limit off.
    rate_limit: str = Field(
        default_factory=lambda: os.environ.get("RATE_LIMIT", "5/minute")
    )
    cors_origins: str = Field("*", pattern=rf"^{ORIGIN}([\s,]+{ORIGIN})*\Z")
    forwarded_allow_ips: str = ""
    log_format: Literal["text", "json"] = "text"

    @field_validator("rate_limit")
    @classmethod
    def _check_limit(cls, text: str) -> str:
        """Refuse what slowapi cannot read, and limits that let nothing by."""
        if text and not all(limit.amount for limit in limits.parse_many(text)):
            raise ValueError
        return text


def load_settings(*, secret: bool = True) -> Settings:
    """Return the settings, or end the process with one line that says why."""
    # What only `.env` sets is put into the environment, for libraries to see.
    for name, value in dotenv.dotenv_values(ENV_FILE).items():
        unset = {None} if name == "RATE_LIMIT" else {None, ""}
        if value is not None and os.environ.get(name) in unset:
            os.environ[name] = value
    try:
        settings = Settings()
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        mend = MENDS.get(name, first["msg"])  # never the value: a password
        refuse_to_start(f"{name.upper()} is not usable: {mend}")
    key, algorithm = settings.jwt_secret_key, settings.jwt_algorithm
    # RFC 7518, section 3.2: a key is at least as long as the hash's output.
    least = int(algorithm[2:]) // 8
    placeholder = re.match("(?i)change|replace|your|secret|example|<", key)
    # Its absence is no fault for a migration.
    if (key or secret) and (placeholder or len(key.encode()) < least):
        refuse_to_start(
            f"JWT_SECRET_KEY is not set, a placeholder, or less than {least}"
            f" bytes of {algorithm}: put the output of `openssl rand -hex"
            f" {least}` there, or remove .env: `uv run orders` writes one"
        )
    return settings


def refuse_to_start(reason: str) -> NoReturn:
    """End the process with the one line that a person needs."""
    print(f"orders cannot start: {reason}", file=sys.stderr, flush=True)
    raise SystemExit(3)  # on which uvicorn does not restart a process
