# One image for the API, the worker and the migration: compose.yaml picks the
# command. Every binary dependency has a musllinux wheel, so no compiler.
FROM ghcr.io/astral-sh/uv:python3.14-alpine

ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_NO_SYNC=1 \
    UV_PYTHON_DOWNLOADS=never \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /app

# The dependencies are a layer of their own: they change less than the code.
COPY pyproject.toml uv.lock ./
RUN uv sync --locked --no-dev --no-install-project
COPY README.md LICENSE alembic.ini ./
COPY migrations migrations
COPY orders orders
RUN uv sync --locked --no-dev

# Celery takes a group without a name for root's, and warns.
RUN echo orders:x:10001: >> /etc/group
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["/app/.venv/bin/python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('APP_PORT', '8000') + '/health', timeout=2)"]
CMD ["uv", "run", "orders"]
