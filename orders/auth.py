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
from typing import Annotated, TypeVar, cast

import jwt
from fastapi import Depends, Request, Security
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from fastapi.security.base import SecurityBase
from fastapi.security.utils import get_authorization_scheme_param
from pwdlib.hashers.argon2 import Argon2Hasher
from pydantic import EmailStr, TypeAdapter, WrapValidator
from sqlalchemy.exc import IntegrityError
from sqlmodel import Field, SQLModel, select

from orders.db import Database
from orders.models import MAX_EMAIL, MAX_USER_ID, RequestBody, User, example
from orders.problems import RETRY_AFTER, Refusal, new_router
from orders.settings import Settings

MIN_PASSWORD, MAX_PASSWORD = 8, 128  # characters
MAX_LOGINS = 32  # passwords that are hashed, or wait: a second's work
BEARER = {"WWW-Authenticate": "Bearer"}  # RFC 6750, section 3
INVALID_TOKEN = {"WWW-Authenticate": 'Bearer error="invalid_token"'}

# --- Users ------------------------------------------------------------------


def _fold_email(address: object, check: Callable[[str], str]) -> str:
    """Return the one form of all spellings of an address.

    The form is Unicode's NFKC_Casefold, which ignores case and the way in
    which a character is composed.
    """
    folded = unicodedata.normalize("NFKC", str(address)).casefold()
    folded = unicodedata.normalize("NFKC", folded)
    if check(folded) != folded:
        raise ValueError("use common characters")
    return folded


Email = Annotated[
    EmailStr, WrapValidator(_fold_email), Field(max_length=MAX_EMAIL)
]
EMAIL = TypeAdapter[str](Email)


class UserCreate(RequestBody):
    """A registration."""

    model_config = example(email="ada@example.com", password="correct horse")  # noqa: S106

    email: Email
    password: str = Field(min_length=MIN_PASSWORD, max_length=MAX_PASSWORD)


class UserPublic(SQLModel):
    """A user as the API shows it."""

    model_config = example(id=1, email="ada@example.com")

    id: int
    email: str


class Token(SQLModel):
    """An OAuth2 access token response (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = "bearer"  # noqa: S105
    expires_in: int = Field(description="Seconds that the token is valid")
    user_id: int = Field(description="Whose token it is; lists your orders")


# --- Passwords and tokens ---------------------------------------------------

# OWASP's parameters of Argon2id: 19 MiB, two passes, one lane.
passwords = Argon2Hasher(memory_cost=19_456, time_cost=2, parallelism=1)
# An unknown user's password is verified, too. Otherwise the time of an answer
# would tell who is registered.
DUMMY_HASH = passwords.hash("nobody has this password")
Result = TypeVar("Result")


class Accounts:
    """Register users, log them in, and know them by their tokens."""

    def __init__(self, database: Database, settings: Settings) -> None:
        """Remember the database and the signing key."""
        self._database = database
        self._lifetime = settings.jwt_expire_minutes * 60  # seconds
        self._key = settings.jwt_secret_key
        self._algorithm = settings.jwt_algorithm
        self._hashing = asyncio.Semaphore(MAX_LOGINS)
        # On Linux a thread has a priority of its own: the event loop's calls
        # go before the hashing of passwords.
        lower_priority = sys.platform == "linux"
        self._threads = ThreadPoolExecutor(
            os.cpu_count(), "hashing", lambda: lower_priority and os.nice(10)
        )
        return_freed_memory()

    async def register(self, draft: UserCreate) -> UserPublic:
        """Keep a new user; raise Refusal if the address is in use."""
        password = normal_form(draft.password)
        hashed = await self._in_thread(passwords.hash, password)
        user = User(email=draft.email, hashed_password=hashed)
        async with self._database.session() as session:
            session.add(user)
            try:
                await session.commit()
            except IntegrityError:
                raise Refusal("email-taken") from None
        return UserPublic.model_validate(user)

    async def log_in(self, email: str, password: str) -> Token:
        """Return a token; raise Refusal for a wrong address or password."""
        try:
            email = EMAIL.validate_python(email)
        except ValueError:
            email = ""  # no user has it
        async with self._database.session() as session:
            users = await session.exec(select(User).where(User.email == email))
            user = users.one_or_none()
        hashed = user.hashed_password if user else DUMMY_HASH
        matches = await self._in_thread(is_password, password, hashed)
        if user is None or user.id is None or not matches:
            raise Refusal(
                "wrong-password",
                headers=BEARER,
                error="invalid_grant",  # RFC 6749, section 5.2
            )
        return self.issue_token(user.id)

    def issue_token(self, user_id: int) -> Token:
        """Return a signed token, valid for the configured time."""
        expires_at = int(time.time()) + self._lifetime
        claims = {"sub": str(user_id), "exp": expires_at}
        return Token(
            access_token=jwt.encode(claims, self._key, self._algorithm),
            expires_in=self._lifetime,
            user_id=user_id,
        )

    def verify(self, token: str) -> int:
        """Return the user's id; raise Refusal unless the token is ours."""
        if not token:
            raise Refusal("unauthorized", headers=BEARER)
        with suppress(jwt.InvalidTokenError, ValueError):
            user_id, expires_at = _decode(token, self._key, self._algorithm)
            if 0 < user_id <= MAX_USER_ID and time.time() < expires_at:
                return user_id
        raise Refusal("unauthorized", headers=INVALID_TOKEN)

    async def _in_thread(
        self, work: Callable[..., Result], *arguments: str
    ) -> Result:
        """Hash in a thread; raise Refusal if too many calls wait for one."""
        if self._hashing.locked():
            headers = {"Retry-After": str(RETRY_AFTER)}
            raise Refusal("overloaded", headers=headers)
        async with self._hashing:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, work, *arguments)


def return_freed_memory() -> None:
    """Have glibc return the memory of a hash: 19 MiB in each thread."""
    # The options are M_MMAP_THRESHOLD (larger pieces are returned at once)
    # and M_TRIM_THRESHOLD, in bytes. Another libc has no such function.
    with suppress(AttributeError, OSError, TypeError):
        for option, size in ((-3, 2**24), (-1, 2**25)):
            ctypes.CDLL(None).mallopt(option, size)


def normal_form(password: str) -> str:
    """Return a password in Unicode's NFC (RFC 8265, section 4.2).

    Keyboards write one character in one code point, or in two.
    """
    return unicodedata.normalize("NFC", password)


def is_password(password: str, hashed: str) -> bool:
    """Return whether a password belongs to a hash."""
    # The first release hashed passwords as they came. A form in a character
    # set of the client's choice may hold what UTF-8 cannot: it is nobody's.
    forms = {
        form.encode(errors="surrogatepass")
        for form in (normal_form(password), password)
    }
    return any(passwords.verify(form, hashed) for form in forms)


@lru_cache(4096)  # tokens; to check a signature takes longer than a read
def _decode(token: str, key: str, algorithm: str) -> tuple[int, int]:
    """Return the user's id and the end, in seconds since 1970, of a token."""
    claims = jwt.decode(token, key, [algorithm], {"require": ["exp", "sub"]})
    return int(claims["sub"]), int(claims["exp"])


# --- The current user, and the routes ---------------------------------------


async def get_accounts(request: Request) -> Accounts:
    """Return the accounts of the app that was called."""
    return cast(Accounts, request.state.services.accounts)


class CurrentUser(SecurityBase):
    """A dependency: the id of the user whose token was sent.

    OpenAPI describes the dependency as FastAPI's OAuth2PasswordBearer. The
    class of FastAPI would return the token, and not the id.
    """

    def __init__(self) -> None:
        """Take the description of the password flow."""
        flow = OAuth2PasswordBearer("token/")
        self.model, self.scheme_name = flow.model, flow.scheme_name

    async def __call__(self, request: Request) -> int:
        """Return the user's id; raise Refusal without a valid token."""
        header = request.headers.get("Authorization")
        scheme, token = get_authorization_scheme_param(header)
        accounts = await get_accounts(request)
        return accounts.verify(token if scheme.lower() == "bearer" else "")


current_user = CurrentUser()
UserId = Annotated[int, Security(current_user)]
AccountsDep = Annotated[Accounts, Depends(get_accounts)]
LoginForm = Annotated[OAuth2PasswordRequestForm, Depends()]
router = new_router("users", 400, 401, 409, 413, 422, 429, 503)


@router.post("/register/", status_code=201)
async def register(draft: UserCreate, accounts: AccountsDep) -> UserPublic:
    """Register a user."""
    return await accounts.register(draft)


@router.post("/token/")
async def login(form: LoginForm, accounts: AccountsDep) -> Token:
    """Log in with the OAuth2 password flow; the username is the e-mail."""
    return await accounts.log_in(form.username, form.password)
