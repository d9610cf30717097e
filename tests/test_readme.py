"""The README tells the truth: its calls are made, its names looked up."""

import re
import subprocess
from pathlib import Path

import servers
from test_journey import orders_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
VOLATILE = {
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}": "<uuid>",
    r"\d{4}-\d\d-\d\dT[0-9:.]+\+00:00": "<time>",
    r"in \d+ seconds": "in <n> seconds",
}


def settled(text):
    """Return the text without what differs from run to run."""
    for pattern, name in VOLATILE.items():
        text = re.sub(pattern, name, text)
    return text.strip()


def test_the_first_order_goes_as_the_readme_shows(tmp_path):
    """Every call is made in a shell, and its output compared."""
    (block,) = re.findall("```console\n(.*?)```", README, re.DOTALL)
    commands = re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    expected = re.sub(r"^\$ .*\n", "", block, flags=re.MULTILINE)

    server = orders_command(tmp_path, {"RATE_LIMIT": "5/minute"})
    with servers.running(server):
        script = " && echo && \n".join(commands).replace(
            "127.0.0.1:8000", f"127.0.0.1:{server.port}"
        )
        shell = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=30
        )

    lines = [line for line in shell.stdout.splitlines() if line]
    assert settled("\n".join(lines)) == settled(expected)


def test_every_file_and_name_of_the_readme_exists():
    """Who follows a name finds it."""
    for file, names in re.findall(r"`(\w+\.py)`: ([^|;\n)]+)", README):
        code = (ROOT / "orders" / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            if not name.endswith(".py"):
                assert name.rsplit(".")[-1] in code, name


def test_every_guarantee_names_a_test():
    """A promise without a test is none."""
    tests = "".join(
        f"{path.stem} {path.read_text()}"
        for path in Path(__file__).parent.glob("test_*.py")
    )
    guarantees = README.split("## Guarantees")[1].split("\n## ")[0]
    names = re.findall(r"\| `(\w+)` \|$", guarantees, re.MULTILINE)

    assert names
    for name in names:
        assert name in tests


def test_the_readme_states_the_size_of_the_package():
    """Who plans an afternoon can rely on it, to a tenth."""
    files = list((ROOT / "orders").glob("*.py"))
    lines = sum(len(file.read_text().splitlines()) for file in files)
    stated = re.search(r"(\d+) files with about ([\d,]+) lines", README)

    assert stated
    assert int(stated[1]) == len(files)
    assert abs(int(stated[2].replace(",", "")) - lines) <= lines / 10
