"""The README tells the truth: what it shows is run, its names looked up.

Each command in it has a case here, or the first test fails. They run in a
copy of the tree, as a reader runs them, except for what would change the
machine or take minutes: its case adds an option that keeps it from that.
`test_exercises` does the exercises.
"""

import ast
import contextlib
import re
import shutil
import subprocess
import tomllib
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
import servers
from conftest import ROOT

README = (ROOT / "README.md").read_text()
MAX_LINES = 250
PAGES = ("README.md", "OPERATIONS.md", "tests/BENCHMARKS.md", "CHANGELOG.md")
VOLATILE = {
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}": "<uuid>",
    r"\d{4}-\d\d-\d\dT[0-9:.]+Z": "<time>",
    r"in \d+ seconds": "in <n> seconds",
}


def section(title, page=README):
    """Return what a page says under a title."""
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


# --- Commands ---------------------------------------------------------------

ONE_TEST = "tests/test_settings.py -k nothing_but_a_secret"
# Commands that end, and how each is run: `{}` is the command.
ENDING = {
    ".ci/run": "bash -n {}",
    "apt-get install postgresql redis-server rabbitmq-server chromium"
    " chromium-driver": "{} --simulate",
    # Debian's own pip refuses to install, even when it only would.
    "pip install uv": "PIP_BREAK_SYSTEM_PACKAGES=1 {} --dry-run",
    "uv add NAME": "{} --frozen",
    "uv run alembic revision --autogenerate -m TEXT": (
        "uv run alembic upgrade head && {}"
    ),
    "uv run python tests/benchmark.py": "{} --rounds 1 --only start",
    "uv run pytest": f"{{}} {ONE_TEST}",
    "uv run pytest --all --cov=orders": f"{{}} {ONE_TEST}",
    "uv run pytest --all -k NAME": f"{{}} {ONE_TEST}",
    "uv run mypy": "{}",
    "uv run ruff check .": "{}",
    "uv run ruff format .": "{} --exit-non-zero-on-format",
}
SERVING = {"uv run orders", "RATE_LIMIT= uv run orders", "uv run fastapi dev"}
# Commands of the exercises, which `test_exercises` runs.
EXERCISED = {
    "uv run alembic revision -m returned",
    'uv run alembic revision --autogenerate -m "order note"',
}


def spans_of(page):
    """Return what the prose of a page shows as code."""
    prose = re.sub("```.*?```", "", page, flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall("`([^`]+)`", prose)]


def shown_commands(page=README):
    """Return every command on a page, but for those in a console."""
    typed = [
        span
        for span in spans_of(page)
        # Words after a program's name, or a program in the tree.
        if re.match(r"([A-Z_]+=\S* )*[a-z.][\w./-]* \S", span)
        or ((ROOT / span).is_file() and (ROOT / span).stat().st_mode & 0o100)
    ]
    for block in re.findall("```sh\n(.*?)```", page, re.DOTALL):
        typed += [line.partition("#")[0] for line in block.splitlines()]
    return {part.strip() for line in typed for part in line.split("&&")}


def shell(command, folder, env, **options):
    """Return a command that serves as a process, run by a shell."""
    return servers.Server(
        ["bash", "-c", command], folder=folder, env=env, **options
    )


def serves(port):
    """Return what asks whether the API is there."""
    return lambda: servers.healthy(port)


def test_every_command_has_a_case():
    """Who adds a command to the README says here how it is tried."""
    languages = re.findall(r"```(\w*)\n.*?```", README, re.DOTALL)

    assert shown_commands() == {*ENDING, *SERVING, *EXERCISED}
    assert set(languages) == {"mermaid", "sh", "console", "diff"}


@pytest.mark.long
@pytest.mark.parametrize("command", ENDING)
def test_a_command_of_the_readme_succeeds(tree, reader, command):
    """It runs in a new copy of the tree."""
    program = command.split()[0]
    if not (shutil.which(program) or (ROOT / program).exists()):
        pytest.skip(f"{program} is not on this machine")
    if "benchmark" in command and (lacking := servers.missing()):
        pytest.skip(f"apt-get install {' '.join(lacking)} to run this")

    ended = subprocess.run(
        ["bash", "-c", ENDING[command].format(command)],
        cwd=tree,
        env=reader,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("command", sorted(SERVING))
def test_a_command_of_the_readme_serves(tree, reader, command):
    """It answers on the port that it is given."""
    port = servers.free_port()
    env = reader | {"APP_PORT": str(port)}
    if "fastapi" in command:
        command += f" --port {port}"
        env |= {"JWT_SECRET_KEY": "0123456789abcdef" * 4}
    server = shell(command, tree, env, port=port, ready=serves(port))

    with servers.running(server):
        assert f"http://127.0.0.1:{port}/docs" in server.text()


# --- The tutorial -----------------------------------------------------------


def settled(text):
    """Return the text without what differs from run to run."""
    for pattern, name in VOLATILE.items():
        text = re.sub(pattern, name, text)
    return text.strip()


def typed_and_printed(block):
    """Return the commands of a console as a script, and what it prints."""
    script = "\necho\n".join(re.findall(r"^\$ (.*)$", block, re.MULTILINE))
    return script, re.sub(r"^\$ .*\n", "", block, flags=re.MULTILINE)


def run_console(script, port, **env):
    """Return what a script of a page prints, without empty lines."""
    ended = subprocess.run(
        ["bash", "-c", script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")],
        env=servers.without_coverage() | env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = [line.rstrip() for line in ended.stdout.splitlines() if line]
    return "\n".join(lines)


@pytest.mark.parametrize(("number", "limit"), [(0, "5/minute"), (1, "")])
def test_the_first_order_goes_as_the_readme_shows(tmp_path, number, limit):
    """Every call is made in a shell, and its output compared."""
    first_order = section("Your first order")
    blocks = re.findall("```console\n(.*?)```", first_order, re.DOTALL)
    scripts = [typed_and_printed(block)[0] for block in blocks[: number + 1]]
    _, expected = typed_and_printed(blocks[number])

    server = servers.orders(tmp_path, {"RATE_LIMIT": limit})
    with servers.running(server):
        printed = run_console("\necho ---\n".join(scripts), server.port)

    assert settled(printed.rpartition("---\n")[2]) == settled(expected)


# --- What it says -----------------------------------------------------------


def test_a_newcomer_reads_no_more_than_so_many_lines():
    """The page for an operator is another one."""
    assert len(README.splitlines()) <= MAX_LINES


def anchors(page):
    """Return the fragments that lead to the titles of a page."""
    titles = re.findall(r"(?m)^#+ (.*)$", page)
    return {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
        for title in titles
    }


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_somewhere(name):
    """To a file, or to a title in one."""
    place = ROOT / name
    prose = re.sub("```.*?```", "", place.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", prose)

    for link in links:
        path, _, fragment = link.partition("#")
        if "://" in path:
            continue
        target = (place.parent / path).resolve() if path else place
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target.read_text()), link


def test_the_readme_leads_to_every_page():
    """Nobody has to look for the page that is theirs."""
    for page in (
        "OPERATIONS.md",
        "tests/BENCHMARKS.md",
        ".github/SECURITY.md",
    ):
        assert f"]({page})" in README


def named_places(text):
    """Return each (file, name, what follows the name) that a text names."""
    for cell in re.findall(r"`\w+\.py`: [^|()\n]+", text):
        file = ""
        for name, follows in re.findall(r"`([^`]+)`([^`]*)", cell):
            if name.endswith(".py"):
                file = name
            else:
                yield file, name, follows


@cache
def definitions(file):
    """Return the nodes that define each name in a file of the package."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / "orders" / file).read_text())):
        targets = [node]
        if isinstance(node, ast.Assign):
            targets = [
                each for target in node.targets for each in ast.walk(target)
            ]
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            name = getattr(target, "id", getattr(target, "name", None))
            if isinstance(name, str):
                found.setdefault(name, []).append(node)
    return found


def test_every_file_and_name_of_the_readme_exists():
    """Who follows a name finds it."""
    places = [*named_places(README)]

    assert len(places) > 50
    for file, name, _ in places:
        defined = definitions(file)
        assert [n for n in name.split(".") if n not in defined] == [], name


UNITS = {"min": 60, "h": 3600, "KiB": 1024, "MiB": 1024**2}


def values(node):
    """Return the numbers that a definition gives to a name, or contains."""
    if expression := getattr(node, "value", None):
        code = compile(ast.Expression(expression), "<knob>", "eval")
        with contextlib.suppress(NameError):  # more than a number
            value = eval(code, {"timedelta": timedelta})
            return {
                each.total_seconds() if isinstance(each, timedelta) else each
                for each in (value if isinstance(value, tuple) else [value])
            }
    return {
        each.value for each in ast.walk(node) if isinstance(each, ast.Constant)
    }


KNOBS = [*named_places(section("Knobs"))]


@pytest.mark.parametrize(("file", "name", "said"), KNOBS)
def test_a_knob_has_the_value_that_the_readme_says(file, name, said):
    """Who changes a number changes it on the page, too."""
    number, unit = re.match(r" ([\d.,]*\d) ?(\w*)", said).groups()
    value = float(number.replace(",", "")) * UNITS.get(unit, 1)
    kept = [values(node) for node in definitions(file)[name]]

    assert any(value in each for each in kept), kept


def test_the_glossary_has_the_words_of_the_code():
    """A word that the code no longer uses needs no explanation."""
    terms = re.findall(r"(?m)^- \*\*(.+?)\*\*: ", section("Glossary"))
    code = "".join(p.read_text() for p in (ROOT / "orders").glob("*.py"))
    words = re.sub(r"[-_\s]+", " ", code).lower()

    assert len(terms) == 10
    assert [term for term in terms if term not in words] == []


def test_every_guarantee_names_a_test():
    """A promise without a test is none."""
    tests = [
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    ]
    guarantees = section("Guarantees")
    rows = re.findall(r"^\| [A-Z].*\| (.*) \|$", guarantees, re.MULTILINE)

    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(\w+)`", row)
        assert named
        assert [n for n in named if not any(n in t for t in tests)] == []


def test_the_readme_states_the_size_of_the_package():
    """Who plans an afternoon can rely on it, to a tenth."""
    files = list((ROOT / "orders").glob("*.py"))
    lines = sum(len(file.read_text().splitlines()) for file in files)
    stated = re.search(r"(\d+) files with about ([\d,]+) lines", README)

    assert stated
    assert int(stated[1]) == len(files)
    assert abs(int(stated[2].replace(",", "")) - lines) <= lines / 10


def test_every_package_has_its_reason():
    """Who adds one says why."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
    ]
    names = {re.match(r"[\w-]+", package)[0] for package in needed}
    listed = section("Dependencies")

    assert [n for n in names if not re.search(rf"[ ]{n}\b", listed)] == []
