"""The API keeps what its OpenAPI schema says, whatever is sent."""

import subprocess

import servers
from conftest import User
from test_journey import orders_command


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
