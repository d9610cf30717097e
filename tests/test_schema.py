"""The API keeps what its OpenAPI schema says, whatever is sent."""

import subprocess

import servers
from conftest import User
from test_journey import orders_command

from orders.api import app


def test_schemathesis_finds_nothing(tmp_path, http, pytestconfig):
    """All of its checks hold: no 5xx, no undocumented answer."""
    server = orders_command(tmp_path)
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
                *("--checks", "all", "--max-examples", "30"),
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
    """No answer without its meaning, no body without an example."""
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
    tags = {tag["name"] for tag in schema["tags"] if tag["description"]}

    assert undescribed == []
    for operation in operations:
        assert operation["description"]
        assert {*operation["tags"]} <= tags
        for answer in operation["responses"].values():
            assert answer["description"] != "Successful Response"
            assert "X-Request-ID" in answer["headers"]
    for name, part in schema["components"]["schemas"].items():
        if name.endswith(("Create", "Public", "Change")):
            assert part["examples"]
