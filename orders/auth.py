"""Know the caller: users, passwords, tokens.

Passwords are hashed with Argon2id in a few threads of their own, so that
logins neither block the event loop nor fill the memory. Tokens are JWTs
signed with a shared secret; they carry the user's id and nothing else.
"""

import asyncio
import ctypes
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import Annotated, Any

import jwt
from pwdlib.hashers.argon2 import Argon2Hasher
from pydantic import EmailStr, TypeAdapter, WrapValidator
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, SQLModel

from orders.db import Database
from orders.models import Refusal, Schema, example
from orders.settings import Settings

MAX_EMAIL = 254  # characters; RFC 5321, section 4.5.3.1.3
NO_STORE = {"Cache-Control": "no-store"}  # RFC 6749, section 5.1
BEARER = {"WWW-Authenticate": "Bearer"}  # RFC 6750, section 3
INVALID_TOKEN = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


def _fold(address: Any, check: Callable[[str], str]) -> str:
    """Return an address in which case and Unicode form tell nobody apart."""
    # Unicode's NFKC_Casefold: a second pass changes nothing.
    folded = unicodedata.normalize("NFKC", str(address)).casefold()
    folded = unicodedata.normalize("NFKC", folded)
    if check(folded) != folded:
        raise ValueError("use common characters")
    return folded


Email = Annotated[EmailStr, WrapValidator(_fold), Field(max_length=MAX_EMAIL)]
canonical_email = TypeAdapter[str](Email).validate_python


class UserCreate(Schema):
    """A registration."""

    model_config = example(email="ada@example.com", password="correct horse")  # noqa: S106

    email: Email
    password: str = Field(min_length=8, max_length=128)


class UserPublic(SQLModel):
    """A user as the API shows it."""

    model_config = example(id=1, email="ada@example.com")

    id: int = Field(primary_key=True)
    email: str = Field(max_length=MAX_EMAIL, unique=True)


class User(UserPublic, table=True):
    """A registered user."""

    __tablename__ = "users"

    hashed_password: str


USERS = SQLModel.metadata.tables["users"]


class Token(SQLModel):
    """An OAuth2 access token response (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = "bearer"  # noqa: S105
    expires_in: int = Field(description="Seconds that the token is valid")
    user_id: int = Field(description="Whose token it is; lists your orders")


# Else glibc keeps the memory of a hash for good, in each thread. In bytes, its
# M_MMAP_THRESHOLD (what is larger is given back at once), M_TRIM_THRESHOLD.
with suppress(AttributeError, OSError, TypeError):  # another libc, or system
    for option, size in ((-3, 2**24), (-1, 2**25)):
        ctypes.CDLL(None).mallopt(option, size)
# OWASP's Argon2id parameters: 19 MiB, two passes, one lane.
passwords = Argon2Hasher(memory_cost=19_456, time_cost=2, parallelism=1)
# Verified for who is unknown, or the time would tell who is registered.
DUMMY_HASH = passwords.hash("nobody has this password")


class Accounts:
    """Register users, and know them again."""

    def __init__(self, database: Database, settings: Settings) -> None:
        """Take where users are kept, and how tokens are signed."""
        self._database = database
        self._lifetime = settings.jwt_expire_minutes * 60  # seconds
        self._key = settings.jwt_secret_key, settings.jwt_algorithm
        self._room = asyncio.Semaphore(32)  # passwords, about a second's
        # The event loop comes first, where a thread has its own priority.
        polite = sys.platform == "linux"
        self._threads = ThreadPoolExecutor(
            os.cpu_count(), "hashing", lambda: polite and os.nice(10)
        )

    async def register(self, draft: UserCreate) -> UserPublic:
        """Keep a new user; refuse an address that is in use."""
        hashed = await self._hash(passwords.hash, draft.password)
        user = USERS.insert().values(email=draft.email, hashed_password=hashed)
        try:
            made = await self._database.execute(user.returning(USERS.c.id))
        except IntegrityError:
            raise Refusal("email-taken") from None
        return UserPublic(id=made.scalar_one(), email=draft.email)

    async def log_in(self, email: str, password: str) -> Token:
        """Return a token; refuse an unknown user or password."""
        try:
            email = canonical_email(email)
        except ValueError:
            email = ""  # is nobody's
        named = USERS.select().filter_by(email=email)
        user = (await self._database.execute(named)).first()
        hashed = user.hashed_password if user else DUMMY_HASH
        matches = await self._hash(passwords.verify, password, hashed)
        if user is None or not matches:
            # Source of the error: RFC 6749, section 5.2.
            kind, headers = "wrong-password", BEARER | NO_STORE
            raise Refusal(kind, headers=headers, error="invalid_grant")
        return self.issue_token(user.id)

    def issue_token(self, user_id: int) -> Token:
        """Return a signed token, valid for the configured time."""
        lifetime = self._lifetime
        claims = {"sub": str(user_id), "exp": int(time.time()) + lifetime}
        token = jwt.encode(claims, *self._key)
        return Token(access_token=token, expires_in=lifetime, user_id=user_id)

    def verify(self, token: str | None) -> int:
        """Return the user's id; refuse anything but a token of ours."""
        if not token:
            raise Refusal("unauthorized", headers=BEARER)
        with suppress(jwt.InvalidTokenError, ValueError):
            user_id, ends_at = _read_token(token, *self._key)
            # The greatest is that of PostgreSQL's integer.
            if 0 < user_id < 2**31 and time.time() < ends_at:
                return user_id
        raise Refusal("unauthorized", headers=INVALID_TOKEN)

    async def _hash(self, work: Callable[..., Any], *given: str) -> Any:
        """Do slow work in a thread, unless too much waits already."""
        if self._room.locked():
            raise Refusal("overloaded", headers={"Retry-After": "2"})
        async with self._room:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, work, *given)


@lru_cache(4096)  # tokens, whose signature need not be checked again
def _read_token(token: str, key: str, algorithm: str) -> tuple[int, int]:
    """Return a genuine token's user id and its end, in seconds since 1970."""
    claims = jwt.decode(token, key, [algorithm], {"require": ["exp", "sub"]})
    return int(claims["sub"]), int(claims["exp"])
