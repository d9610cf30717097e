"""A REST service that takes, keeps and processes orders.

Read it in this order; each file imports only from those above it:

settings    the only reader of the environment
logs        one readable line an event
models      tables, schemas, the status state machine, errors
db          engines and sessions
cache       the order cache: Redis, or in memory
auth        passwords, tokens, the current user
events      the outbox: relay, and the sinks inside the process
rabbitmq    the sink that publishes to Celery's worker
service     the use cases: create, get, list, change status, process
middleware  request ids and limits, around every call
problems    errors as answers
tasks       the Celery app and its one task
api         routes and the app, where everything is wired
__main__    `uv run orders`: first-run set-up, migrate, serve
"""
