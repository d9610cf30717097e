"""A REST service that takes, keeps and processes orders.

Read it in this order; each file imports only from those above it:

settings    read from the environment, or refused at the start
logs        readable lines, or JSON
db          engines, sessions, and calls that share round trips
models      the tables, the schemas of orders, the state machine
problems    the errors, and how they are answered
handlers    what each event sets off: your own work goes here
cache       the order cache: Redis, or in memory
broker      the publisher: the relay's way to RabbitMQ
events      the outbox: its relay, and the keeper of the cache
auth        users: their schemas, passwords, tokens, routes
service     the use cases: create, get, list, change status
middleware  around every call: ids, paths, limits, sizes, failures
tasks       the Celery app: a task for each handler
api         the routes of orders, and the app, where all is wired
__main__    `uv run orders`: first-run set-up, migrate, serve
"""
