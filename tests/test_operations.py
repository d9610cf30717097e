"""What those need who run it: telemetry, logs as JSON, proxies, `fastapi`."""

import contextlib
import json
import re
import signal
import sqlite3
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
import servers
from conftest import ITEMS, PASSWORD, User, environment
from fastapi.testclient import TestClient
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
    InMemorySpanExporter,
)

from orders.api import create_app
from orders.broker import Publisher, celery_message
from orders.handlers import HANDLERS
from orders.models import EventKind

PARTS = {"time", "level", "logger", "message", "request_id"}

# --- OpenTelemetry ----------------------------------------------------------


@pytest.fixture(scope="session")
def telemetry():
    """Return the SDK's exporters; a process can have them but once."""
    spans, reader = InMemorySpanExporter(), InMemoryMetricReader()
    tracing = TracerProvider()
    tracing.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(tracing)
    metering = MeterProvider(metric_readers=[reader])
    metrics.set_meter_provider(metering)
    yield spans, reader
    tracing.shutdown()
    metering.shutdown()


def instruments(reader):
    """Return what was measured, by name."""
    data = reader.get_metrics_data()
    return {
        metric.name: metric
        for resource in (data.resource_metrics if data else ())
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


def named(spans, name):
    """Return the finished spans of a name."""
    return [s for s in spans.get_finished_spans() if s.name == name]


def gauge(reader, name):
    """Return what a gauge shows; None if it was never set."""
    metric = instruments(reader).get(name)
    return metric and metric.data.data_points[0].value


def test_a_call_is_a_span_and_an_order_a_lag(telemetry, embedded):
    """The span has the request id; the histogram the relay's delay."""
    spans, reader = telemetry
    with TestClient(create_app(embedded)) as client:
        ada = User(client, "ada@example.com")
        spans.clear()
        created = ada.create(headers={"X-Request-ID": "traced-1"})
        order_id = created.json()["id"]
        ada.call("HEAD", f"/orders/{order_id}")
        client.get("/health")
        client.head("/health")
        client.get("/ready")
        servers.wait_until(lambda: ada.processed(order_id), 10)
        servers.wait_until(
            lambda: "orders.outbox.lag" in instruments(reader), 5
        )

    served = [s for s in spans.get_finished_spans() if s.kind.name == "SERVER"]
    lag = instruments(reader)["orders.outbox.lag"]
    (point,) = lag.data.data_points
    assert served[0].attributes["request.id"] == "traced-1"
    assert served[0].attributes["http.route"] == "/orders/"
    assert served[0].attributes["http.response.status_code"] == 201
    assert served[1].attributes["http.request.method"] == "HEAD"
    assert served[1].attributes["http.route"] == "/orders/{order_id}"
    assert not any("health" in s.attributes["url.path"] for s in served)
    assert not any("ready" in s.attributes["url.path"] for s in served)
    assert lag.unit == "s"
    assert point.count == 1
    assert 1.9 < point.sum < 5


def test_a_handler_is_a_span_of_the_trace_of_its_call(telemetry, embedded):
    """The client's trace goes on in the API, and in the handler."""
    spans, _ = telemetry
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    sent = {"traceparent": f"00-{trace_id}-{parent}-01"}
    with TestClient(create_app(embedded)) as client:
        ada = User(client, "ada@example.com")
        spans.clear()
        order_id = ada.create(headers=sent).json()["id"]
        servers.wait_until(lambda: ada.processed(order_id), 10)
        servers.wait_until(lambda: named(spans, "orders.process_order"), 5)

    [task] = named(spans, "orders.process_order")
    [call] = named(spans, "POST /orders/")
    assert task.context.trace_id == call.context.trace_id == int(trace_id, 16)
    # The one of the call, or of a part of it.
    spans_of_call = {s.context.span_id for s in spans.get_finished_spans()}
    assert task.parent.span_id in spans_of_call - {task.context.span_id}
    assert task.kind.name == "CONSUMER"


def test_a_trace_travels_in_the_event_and_the_message(
    telemetry, production, monkeypatch
):
    """As the header `traceparent`, which Celery's instrumentation reads."""
    delivered = []
    monkeypatch.setattr(
        Publisher, "deliver", lambda _, messages: delivered.extend(messages)
    )
    with TestClient(create_app(production)) as client:
        ada = User(client, "ada@example.com")
        ada.order()
        servers.wait_until(lambda: delivered, 10)

    [message] = delivered
    properties, _ = celery_message(message)
    [call] = named(telemetry[0], "POST /orders/")[-1:]
    trace_id = f"{call.context.trace_id:032x}"
    assert properties.headers["traceparent"].split("-")[1] == trace_id


def test_the_backlog_is_two_gauges(telemetry, embedded, monkeypatch):
    """How many events wait, and the age of the oldest."""
    _, reader = telemetry
    handler = HANDLERS[EventKind.NEW_ORDER]._replace(delay=timedelta(hours=1))
    monkeypatch.setitem(HANDLERS, EventKind.NEW_ORDER, handler)
    with TestClient(create_app(embedded)) as client:
        ada = User(client, "ada@example.com")
        ada.order()
        with sqlite3.connect(embedded.database_url[10:]) as late:
            late.execute("UPDATE events SET created_at = '2026-01-01'")
        for _ in range(2):
            ada.order()
        servers.wait_until(
            lambda: gauge(reader, "orders.outbox.waiting") == 3, 10
        )

    age = datetime.now(UTC) - datetime(2026, 1, 1, 1, tzinfo=UTC)  # its delay
    oldest = gauge(reader, "orders.outbox.oldest")
    assert oldest == pytest.approx(age.total_seconds(), abs=60)
    assert instruments(reader)["orders.outbox.oldest"].unit == "s"


def test_no_span_repeats_a_password(telemetry, embedded):
    """Neither of a call that is refused, nor of one that works."""
    spans, _ = telemetry
    spans.clear()
    form = {"username": "ada@example.com", "password": "no-such-secret"}
    with TestClient(create_app(embedded)) as client:
        User(client, "ada@example.com")
        client.post("/token/", data=form)
        client.post("/token/", json=form)
        client.post("/register/", json={"password": "no-such-secret"})

    text = "".join(span.to_json() for span in spans.get_finished_spans())
    assert "/register/" in text
    assert PASSWORD not in text
    assert "no-such-secret" not in text


class Collector(BaseHTTPRequestHandler):
    """Keep what OTLP exporters send."""

    def do_POST(self):
        """Take a batch of spans, measurements or log records."""
        size = int(self.headers["Content-Length"])
        self.server.received.append((self.path, self.rfile.read(size)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def collector():
    """Run a collector on a free port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        server.received = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_four_lines_of_env_turn_telemetry_on(tmp_path, http, collector):
    """`.env` reaches the framework's own variables; secrets stay here."""
    url = f"http://127.0.0.1:{collector.server_port}"
    (tmp_path / ".env").write_text(
        f"JWT_SECRET_KEY={'0123456789abcdef' * 4}\n"
        "FASTAPI_OTEL_AUTO_CONFIGURE=true\n"
        f"OTEL_EXPORTER_OTLP_ENDPOINT={url}\n"
        "OTEL_SERVICE_NAME=the-orders\n"
        "OTEL_METRIC_EXPORT_INTERVAL=1000\n"
    )
    with servers.running(servers.orders(tmp_path)) as server:
        client = http(server)
        ada = User(client, "ada@example.com")
        ada.create(headers={"X-Request-ID": "traced-2"})
        bad = {"email": 1, "password": "no-such-secret"}
        client.post("/register/", json=bad)
        client.post("/token/", json=bad)

        def sent(text):
            return any(text in body for _, body in [*collector.received])

        servers.wait_until(lambda: sent(b"orders.outbox.lag"), 15)
        servers.wait_until(lambda: sent(b"traced-2"), 15)
        server.stop()

    assert sent(b"the-orders")
    assert not sent(b"/health")
    assert not sent(PASSWORD.encode())
    assert not sent(b"no-such-secret")


def test_a_task_of_a_worker_is_a_span_of_the_trace(
    production, run, http, collector
):
    """As the page for operators starts a worker with telemetry."""
    telemetry = {
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": (
            f"http://127.0.0.1:{collector.server_port}"
        ),
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }

    def instrumented(folder, env):
        server = servers.worker(folder, env)
        server.command.insert(0, servers.PYTHON / "opentelemetry-instrument")
        return server

    worker = run(instrumented, production, **telemetry)
    api = run(servers.api, production, **telemetry)
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    sent = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
    ada = User(http(api), "ada@example.com")
    order_id = ada.create(headers=sent).json()["id"]
    servers.wait_until(lambda: ada.processed(order_id), 15)
    worker.stop()
    api.stop()

    [spans] = [
        body
        for path, body in collector.received
        if path == "/v1/traces" and b"orders.process_order" in body
    ]
    assert bytes.fromhex(trace_id) in spans


# --- Logs -------------------------------------------------------------------


def objects(text):
    """Return a log's lines, each of which must be one JSON object."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert {*line} >= PARTS
    return lines


def test_json_logs_of_the_api_are_an_object_a_line(tmp_path, http):
    """From uvicorn and from us, a traceback inside its line."""
    server = servers.orders(tmp_path, {"LOG_FORMAT": "json"})
    with servers.running(server):
        ada = User(http(server), "ada@example.com")
        order_id = ada.create(headers={"X-Request-ID": "json-1"}).json()["id"]
        servers.wait_until(lambda: ada.processed(order_id), 10)
        server.stop()

    lines = objects(server.text())
    by_logger = {line["logger"] for line in lines}
    (created,) = [
        line
        for line in lines
        if line["message"] == f"Order {order_id} created"
    ]
    access = [line for line in lines if line["logger"] == "uvicorn.access"]
    assert {"uvicorn.error", "uvicorn.access", "orders.service"} <= by_logger
    assert created["request_id"] == "json-1"
    assert created["level"] == "INFO"
    assert created["time"].endswith(("Z", "+00:00"))
    assert any(line["request_id"] == "json-1" for line in access)
    assert not any("/health" in line["message"] for line in access)


@pytest.mark.long
def test_json_logs_of_processes_and_workers_too(production, run, http):
    """A bare uvicorn and Celery write the same."""
    # Celery warns of root, which no service should be, before it logs.
    env = {"LOG_FORMAT": "json", "PYTHONWARNINGS": "ignore"}
    worker = run(servers.worker, production, **env)
    api = run(servers.api, production, **env)
    ada = User(http(api), "ada@example.com")
    order_id = ada.create(headers={"X-Request-ID": "json-2"}).json()["id"]
    servers.wait_until(lambda: ada.processed(order_id), 15)
    worker.stop()
    api.stop()

    # Celery says to a person, on stderr, that it shuts down.
    spoken = objects(
        "\n".join(
            line
            for line in worker.text().splitlines()
            if line and not line.startswith("worker: ")
        )
    )
    (done,) = [s for s in spoken if "processed" in s["message"]]
    assert done["request_id"] == "json-2"
    assert any(s["logger"].startswith("celery") for s in spoken)
    assert objects(api.text())


def test_text_stays_the_default(tmp_path, http):
    """For the eyes of a person."""
    with servers.running(servers.orders(tmp_path)) as server:
        http(server).get("/nowhere", headers={"X-Request-ID": "text-1"})
        servers.wait_until(lambda: "[text-1]" in server.text(), 5)

    assert '{"time"' not in server.text()
    # Nothing of how to lift a limit that is off.
    assert "limit     none\n" in server.text()


# --- Proxies, and the framework's command -----------------------------------


def test_a_proxy_named_in_env_is_believed(tmp_path, http):
    """`FORWARDED_ALLOW_IPS` of `.env` reaches `uv run orders`."""
    secret = f"JWT_SECRET_KEY={'0123456789abcdef' * 4}\n"
    codes = {}
    for proxies in ("", "127.0.0.1", "*"):
        line = f"FORWARDED_ALLOW_IPS={proxies}\n"
        (tmp_path / ".env").write_text(secret + line)
        server = servers.orders(tmp_path, {"RATE_LIMIT": "1/minute"})
        with servers.running(server):
            client = http(server)
            codes[proxies] = [
                client.get("/nowhere", headers=forwarded).status_code
                for forwarded in (
                    {"X-Forwarded-For": "192.0.2.1"},
                    {"X-Forwarded-For": "192.0.2.2"},
                    {"X-Forwarded-For": "192.0.2.2"},
                )
            ]
        warned = re.search("WARNING .*FORWARDED_ALLOW_IPS", server.text())
        assert bool(warned) == (proxies == "*")

    assert codes == {
        "": [404, 429, 429],
        "127.0.0.1": [404, 404, 429],
        "*": [404, 404, 429],
    }


def test_the_frameworks_command_serves(embedded, tmp_path, pytestconfig, http):
    """`fastapi dev` finds the app by the entrypoint, as its users expect."""
    port = servers.free_port()
    server = servers.Server(
        [
            *("env", "-C", pytestconfig.rootpath, servers.PYTHON / "fastapi"),
            *("dev", "--port", port),
        ],
        port=port,
        folder=tmp_path,
        env=environment(embedded),
        ready=lambda: servers.healthy(port),
        ours=True,
    )
    with servers.running(server):
        ada = User(http(server), "ada@example.com")
        assert ada.create(ITEMS).status_code == 201
        assert http(server).get("/docs").is_success
        server.signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(10)

    assert "orders.api:app" in server.text()
    with pytest.raises(httpx2.HTTPError):
        http(server).get("/health")
