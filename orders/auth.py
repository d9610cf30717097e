"""Know the caller: passwords, tokens, and who a request comes from.

Passwords are hashed with Argon2id in a few threads of their own, so that
logins neither block the event loop nor fill the memory. Tokens are JWTs
signed with a shared secret; they carry the user's id and nothing else.
"""

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import jwt
from fastapi import Request
from fastapi.security import OAuth2PasswordBearer
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy.exc import IntegrityError
from sqlmodel import select

from orders.db import Database
from orders.models import (
    EmailTaken,
    Token,
    Unauthorized,
    User,
    UserCreate,
    UserPublic,
    canonical_email,
)
from orders.settings import Settings

MAX_USER_ID = 2**31 - 1  # PostgreSQL's integer
VERIFIED_TOKENS = 4096  # whose signature need not be checked again

# OWASP's Argon2id parameters: 19 MiB, two passes, one lane.
passwords = PasswordHash(
    (Argon2Hasher(memory_cost=19_456, time_cost=2, parallelism=1),)
)
# Verified in place of a user who does not exist, which takes as long.
DUMMY_HASH = passwords.hash("nobody has this password")


def _yield_to_event_loop() -> None:
    """Lower this thread's priority, where the system has one a thread."""
    if hasattr(os, "sched_getaffinity"):  # Linux, where nice is per thread
        os.nice(10)


hashing = ThreadPoolExecutor(
    os.cpu_count(), "hashing", initializer=_yield_to_event_loop
)


async def register(database: Database, draft: UserCreate) -> UserPublic:
    """Keep a new user; raise EmailTaken when the address is in use."""
    loop = asyncio.get_running_loop()
    hashed = await loop.run_in_executor(
        hashing, passwords.hash, draft.password
    )
    user = User(email=draft.email, hashed_password=hashed)
    async with database.session() as session:
        session.add(user)
        try:
            await session.commit()
        except IntegrityError:
            raise EmailTaken from None
        return UserPublic.model_validate(user)


async def authenticate(database: Database, email: str, password: str) -> int:
    """Return the user's id; Unauthorized for an unknown user or password.

    Both take the same time, so that nobody learns who is registered.
    """
    user = await _find_user(database, email)
    hashed = user.hashed_password if user else DUMMY_HASH
    loop = asyncio.get_running_loop()
    matches = await loop.run_in_executor(
        hashing, passwords.verify, password, hashed
    )
    if user is None or user.id is None or not matches:
        raise Unauthorized("Incorrect e-mail or password")
    return user.id


async def _find_user(database: Database, email: str) -> User | None:
    try:
        email = canonical_email(email)
    except ValueError:
        email = ""  # is nobody's; the query costs the same time
    async with database.session() as session:
        users = await session.exec(select(User).where(User.email == email))
        return users.first()


def issue_token(settings: Settings, user_id: int) -> Token:
    """Return a signed token for the user, valid for the configured time."""
    lifetime = settings.jwt_expire_minutes * 60  # seconds
    token = jwt.encode(
        {"sub": str(user_id), "exp": int(time.time()) + lifetime},
        settings.jwt_secret_key,
        algorithm=settings.jwt_algorithm,
    )
    return Token(access_token=token, expires_in=lifetime)


def verify_token(settings: Settings, token: str) -> int:
    """Return the user's id; raise Unauthorized for anything but our token."""
    try:
        user_id, expires_at = _read_token(
            settings.jwt_secret_key, settings.jwt_algorithm, token
        )
    except (jwt.InvalidTokenError, ValueError):
        raise Unauthorized from None
    if not 0 < user_id <= MAX_USER_ID or time.time() >= expires_at:
        raise Unauthorized
    return user_id


@lru_cache(VERIFIED_TOKENS)
def _read_token(secret: str, algorithm: str, token: str) -> tuple[int, int]:
    """Return a genuine token's user id and its end, in seconds since 1970."""
    claims = jwt.decode(
        token,
        secret,
        algorithms=[algorithm],
        options={"require": ["exp", "sub"]},
    )
    return int(claims["sub"]), int(claims["exp"])


class TokenBearer(OAuth2PasswordBearer):
    """The dependency that turns the Authorization header into a user id."""

    async def __call__(self, request: Request) -> int:  # type: ignore[override]
        """Return the caller's user id, or raise Unauthorized."""
        scheme, _, token = request.headers.get("authorization", "").partition(
            " "
        )
        if scheme.lower() != "bearer":
            raise Unauthorized
        return verify_token(request.app.state.settings, token.strip())


current_user = TokenBearer(tokenUrl="token/")
