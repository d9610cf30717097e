"""Other people's clients work: generated, stock OAuth2, and a browser."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import servers
from conftest import PASSWORD, User
from oauthlib.oauth2 import InvalidGrantError, LegacyApplicationClient
from requests_oauthlib import OAuth2Session
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

# Run by an interpreter of its own, on the client that was generated.
JOURNEY = """
import sys
sys.path.insert(0, sys.argv[1])
from orders_client import AuthenticatedClient, Client
from orders_client.api.orders import (
    change_order_status, create_order, get_order, list_orders)
from orders_client.api.users import login, register
from orders_client.models import (
    BodyLogin, OrderCreate, OrderItem, OrderPublic, OrderStatus, Problem,
    StatusChange, Token, UserCreate, UserPublic)

api = Client(base_url=sys.argv[2])
user = register.sync(
    client=api,
    body=UserCreate(email="eve@example.com", password="correct horse"))
token = login.sync(
    client=api,
    body=BodyLogin(username="eve@example.com", password="correct horse"))
me = AuthenticatedClient(base_url=sys.argv[2], token=token.access_token)
item = OrderItem(name="tea", quantity=2, price=1.5)
order = create_order.sync(client=me, body=OrderCreate(items=[item]))
assert order.total_price == 3.0, order
change_order_status.sync(
    order.id, client=me, body=StatusChange(status=OrderStatus.PAID))
assert get_order.sync(order.id, client=me).status is OrderStatus.PAID
assert [o.id for o in list_orders.sync(token.user_id, client=me)] == [order.id]
assert isinstance(user, UserPublic) and isinstance(token, Token)
assert isinstance(order, OrderPublic)

again = change_order_status.sync(
    order.id, client=me, body=StatusChange(status=OrderStatus.PAID))
assert isinstance(again, Problem), again
assert again.type_ == "/docs#transition-forbidden"
assert again.status == 409 and again.title == "Conflict"
assert again.current == "PAID" and "SHIPPED" in again.allowed
taken = register.sync(
    client=api,
    body=UserCreate(email="eve@example.com", password="correct horse"))
wrong = login.sync(
    client=api, body=BodyLogin(username="eve@example.com", password="x"))
invalid = create_order.sync(client=me, body=OrderCreate(items=[]))
missing = get_order.sync("00000000-0000-4000-8000-000000000000", client=me)
other = list_orders.sync(77, client=me)
problems = taken, wrong, invalid, missing, other
assert all(isinstance(p, Problem) for p in problems), problems
assert [p.status for p in problems] == [409, 401, 422, 404, 403], problems
assert isinstance(taken.detail, str)
assert isinstance(invalid.detail, list)
assert wrong.error == "invalid_grant"
"""


@pytest.mark.long
def test_a_generated_client_drives_the_journey(server, tmp_path):
    """openapi-python-client makes one from the schema alone."""
    url = f"http://127.0.0.1:{server.port}"
    config = tmp_path / "config.yaml"
    config.write_text(
        "project_name_override: orders-client\n"
        "package_name_override: orders_client\n"
        "post_hooks: []\n"
    )
    generated = subprocess.run(
        [
            servers.PYTHON / "openapi-python-client",
            *("generate", "--url", f"{url}/openapi.json", "--meta", "none"),
            *("--config", config, "--output-path", tmp_path / "orders_client"),
        ],
        env=servers.without_coverage(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = generated.stdout + generated.stderr
    assert generated.returncode == 0, said
    assert "warning" not in said.lower()

    driven = subprocess.run(
        [sys.executable, "-c", JOURNEY, tmp_path, url],
        env=servers.without_coverage(),
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert driven.returncode == 0, driven.stderr


def test_a_stock_oauth2_client_gets_a_token(server, http, monkeypatch):
    """The password flow is the standard's."""
    User(http(server), "ada@example.com")
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")  # no TLS here
    url = f"http://127.0.0.1:{server.port}"

    with OAuth2Session(client=LegacyApplicationClient("any")) as session:
        token = session.fetch_token(
            f"{url}/token", username="ada@example.com", password=PASSWORD
        )
        answer = session.get(f"{url}/orders/user/{token['user_id']}")
        with pytest.raises(InvalidGrantError):
            session.fetch_token(
                f"{url}/token/", username="ada@example.com", password="wrong"
            )

    assert answer.json() == []


@pytest.fixture
def browser():
    """Return a headless Chromium that reaches this machine only."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("apt-get install chromium chromium-driver to run this")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (
        *("headless", "no-sandbox", "disable-gpu", "no-first-run"),
        *("disable-background-networking", "disable-component-update"),
        *("disable-sync", "window-size=1200,1600"),
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(f"--{option}")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


class Docs:
    """The page /docs, as a person uses it."""

    def __init__(self, browser, url):
        """Open the page."""
        self.browser = browser
        browser.get(f"{url}/docs")

    def find(self, selector):
        """Return the first such element, when it is there."""
        return WebDriverWait(self.browser, 30).until(
            lambda page: next(
                iter(page.find_elements(By.CSS_SELECTOR, selector)), None
            )
        )

    def click(self, selector):
        """Click on an element, wherever the page is scrolled to."""
        self.browser.execute_script(
            "arguments[0].click()", self.find(selector)
        )

    def write(self, selector, text):
        """Replace the text of a field, and leave the field."""
        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def authorize(self, email, password):
        """Log in by the dialog of the button `Authorize`."""
        self.click(".auth-wrapper .authorize")
        self.write("#oauth_username", email)
        self.write("#oauth_password", password)
        self.click(".auth-btn-wrapper .authorize")
        WebDriverWait(self.browser, 30).until(
            lambda page: "Logout" in self.find(".modal-ux").text
        )
        self.click(".modal-ux .close-modal")

    def execute(self, operation, **fields):
        """Try a call out; return (status, what the page shows of it)."""
        call = f"#operations-{operation}"
        self.click(f"{call} .opblock-summary-control")
        self.click(f"{call} .try-out__btn")
        for selector, text in fields.items():
            path = {"body": "textarea", "order_id": "input[type=text]"}
            self.write(f"{call} {path[selector]}", text)
        self.click(f"{call} .execute")
        answer = f"{call} .live-responses-table .response"
        status = self.find(f"{answer} .response-col_status").text
        return status[:3], self.find(f"{answer} .highlight-code").text


@pytest.mark.long
def test_a_newcomer_finds_the_way_through_the_docs(server, browser, tmp_path):
    """They register, authorise, create, read and change, in that order.

    The network is closed: the page brings all that it needs.
    """
    docs = Docs(browser, f"http://127.0.0.1:{server.port}")
    docs.find("#operations-orders-create_order")
    # Its top is the picture in the README.
    browser.save_screenshot(str(tmp_path / "docs.png"))
    steps = docs.find(".renderedMarkdown ol").text
    names = [
        call.get_attribute("id").rpartition("-")[2]
        for call in browser.find_elements(By.CSS_SELECTOR, ".opblock")
    ]
    account = {"email": "newcomer@example.com", "password": PASSWORD}

    registered = docs.execute("users-register", body=json.dumps(account))
    docs.authorize(account["email"], PASSWORD)
    created, order = docs.execute("orders-create_order")
    order_id = re.search('"id": "([0-9a-f-]{36})"', order)[1]
    read = docs.execute("orders-get_order", order_id=order_id)
    changed = docs.execute("orders-change_order_status", order_id=order_id)

    assert re.findall("Register|Authorize|Create", steps) == [
        *("Register", "Authorize", "Create")
    ]
    assert names[:5] == [
        *("register", "login", "create_order", "get_order"),
        "change_order_status",
    ]
    assert registered[0] == created == "201"
    assert read[0] == "200"
    assert '"status": "PENDING"' in read[1]
    assert changed[0] == "200"
    assert '"status": "PAID"' in changed[1]
