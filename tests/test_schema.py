"""The API keeps what its OpenAPI schema says, whatever is sent."""

import subprocess

import pytest
import servers
from conftest import User

from orders.api import app
from orders.problems import REFUSALS


@pytest.mark.long
def test_schemathesis_finds_nothing(tmp_path, http, pytestconfig):
    """All of its checks hold: no 5xx, no undocumented answer."""
    examples = 20 if pytestconfig.option.all else 10
    server = servers.orders(tmp_path)
    with servers.running(server):
        ada = User(http(server), "ada@example.com")
        found = subprocess.run(
            [
                servers.PYTHON / "schemathesis",
                "--config-file",
                pytestconfig.rootpath / "tests" / "schemathesis.toml",
                "run",
                f"http://127.0.0.1:{server.port}/openapi.json",
                "--header",
                f"Authorization: {ada.headers['Authorization']}",
                *("--checks", "all", "--max-examples", str(examples)),
            ],
            cwd=tmp_path,
            env=servers.without_coverage(),
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert found.returncode == 0, found.stdout
    assert "Traceback" not in server.text()


def test_the_schema_says_what_a_client_developer_asks():
    """No parameter without its meaning, no body without an example."""
    schema = app.openapi()
    operations = [
        operation
        for methods in schema["paths"].values()
        for operation in methods.values()
    ]
    undescribed = [
        (operation["operationId"], parameter["name"])
        for operation in operations
        for parameter in operation.get("parameters", [])
        if "description" not in parameter
    ]

    assert undescribed == []
    for operation in operations:
        assert operation["description"]
        assert operation["tags"]
    for name, part in schema["components"]["schemas"].items():
        if name.endswith(("Create", "Public", "Change")):
            assert part["examples"]


def test_the_schema_documents_every_error_as_a_problem():
    """RFC 9457's media type, and members that a client can read."""
    schema = app.openapi()
    problem = schema["components"]["schemas"]["Problem"]
    errors = [
        (operation["operationId"], status, answer["content"])
        for methods in schema["paths"].values()
        for operation in methods.values()
        for status, answer in operation["responses"].items()
        if status >= "400" and operation["tags"] != ["service"]
    ]

    assert {"type", "title", "status", "detail"} <= {*problem["properties"]}
    assert {*problem["required"]} <= {"type", "title", "status", "detail"}
    assert len(errors) > 30
    for where in errors:
        *_, content = where
        assert [*content] == ["application/problem+json"], where
        reference = content["application/problem+json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/Problem"


def test_the_schema_says_whose_it_is_and_how_long_keys_live():
    """A licence, a contact, and what a header stands for."""
    schema = app.openapi()
    headers = {
        parameter["name"]: parameter["description"]
        for methods in schema["paths"].values()
        for operation in methods.values()
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "header"
    }
    page = schema["paths"]["/orders/user/{user_id}"]["get"]["parameters"]
    (limit,) = [p["schema"] for p in page if p["name"] == "limit"]

    assert schema["info"]["license"]["name"] == "MIT"
    assert schema["info"]["contact"]["name"]
    assert "while its order is kept" in headers["Idempotency-Key"]
    assert limit["maximum"] == 100


def test_the_page_of_the_docs_explains_each_kind():
    """What the `type` of a problem refers to stands at the page's end."""
    description = app.openapi()["tags"][-1]["description"]

    for kind, (status, _) in REFUSALS.items():
        assert f"| {kind} | {status} |" in description
