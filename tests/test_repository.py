"""The rules of the repository, beyond the package's own."""

import importlib.metadata
import re

from conftest import ROOT


def test_the_newest_release_is_the_version():
    """Who changes pyproject.toml's version says what is new."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[(\d\S*)\] - \d{4}", changelog, re.MULTILINE)

    assert releases[0] == importlib.metadata.version("orders")


def test_what_the_type_checker_overlooks_has_a_reason():
    """Each ignore names its code, and says why."""
    lines = [
        line
        for folder in ("orders", "migrations")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if "type: ignore" in line
    ]

    good = re.compile(r"# type: ignore\[[a-z, -]+\]  # \w")
    assert [line for line in lines if not good.search(line)] == []
