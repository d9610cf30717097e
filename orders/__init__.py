"""A REST service that takes, keeps and processes orders.

Read it in this order; each file imports only from those above it:

settings  the only reader of the environment
logs      one readable line an event
db        engines, sessions, and calls that share round trips
models    orders and events: tables, schemas, the state machine, errors
auth      users: their table, passwords, tokens
cache     the order cache: Redis, or in memory
broker    the relay's way to RabbitMQ
events    the outbox: its relay, its processing, the keeper of the cache
service   the use cases: create, get, list, change status
http      around every call: ids, limits, errors as answers
tasks     the Celery app and its one task
api       routes and the app, where everything is wired
__main__  `uv run orders`: first-run set-up, migrate, serve
"""

import gc
import sys

gc.set_threshold(20_000, 20, 50)  # cycles are rare, the search is slow
sys.setswitchinterval(0.001)  # seconds; else calls wait for the relay's thread
