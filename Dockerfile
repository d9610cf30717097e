# One image for the API, the worker and the migration: compose.yaml picks the
# command. Every binary dependency has a musllinux wheel, so no compiler.
FROM ghcr.io/astral-sh/uv:python3.14-alpine

ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never
WORKDIR /app

# The dependencies are a layer of their own: they change less than the code.
COPY pyproject.toml uv.lock ./
RUN uv sync --locked --no-dev --no-install-project
COPY README.md LICENSE alembic.ini ./
COPY migrations migrations
COPY orders orders
RUN uv sync --locked --no-dev

# Celery takes a group without a name for root's, and warns.
RUN echo orders:x:10001: >> /etc/group && install -d -o 10001 -g 10001 /data
USER 10001:10001

# A single container keeps .env and orders.db here: mount a volume. A VOLUME
# would leave an anonymous volume behind each container.
WORKDIR /data
ENV UV_PROJECT=/app \
    UV_NO_SYNC=1 \
    ALEMBIC_CONFIG=/app/alembic.ini \
    APP_HOST=0.0.0.0 \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
EXPOSE 8000
# An API that accepts a call and does not answer for a minute hangs: it is
# killed, and Docker starts the container again. An API that refuses the call
# is starting or stopping, and is left alone.
HEALTHCHECK --interval=30s --timeout=75s --start-period=2m --start-interval=2s \
    CMD timeout 60 wget -q -O /dev/null http://127.0.0.1:${APP_PORT:-8000}/health || { [ $? = 143 ] && kill -9 -1; exit 1; }
CMD ["uv", "run", "orders"]
