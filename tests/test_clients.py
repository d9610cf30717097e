"""Other people's clients work: generated, stock OAuth2, and a browser."""

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
from selenium.webdriver.support.ui import WebDriverWait
from test_journey import orders_command

# Run by an interpreter of its own, on the client that was generated.
JOURNEY = """
import sys
sys.path.insert(0, sys.argv[1])
from orders_client import AuthenticatedClient, Client
from orders_client.api.orders import (
    change_order_status, create_order, get_order, list_orders)
from orders_client.api.users import login, register
from orders_client.models import (
    BodyLogin, Order, OrderCreate, OrderItem, OrderStatus, Problem,
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
assert isinstance(order, Order)

again = change_order_status.sync(
    order.id, client=me, body=StatusChange(status=OrderStatus.PAID))
assert isinstance(again, Problem), again
assert again.type_ == "/docs#transition-forbidden"
assert again.status == 409 and again.title == "Conflict"
assert again["current"] == "PAID" and "SHIPPED" in again["allowed"]
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
assert wrong["error"] == "invalid_grant"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Run the service embedded, without a limit."""
    folder = tmp_path_factory.mktemp("clients")
    with servers.running(orders_command(folder)) as server:
        yield server


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


@pytest.mark.long
def test_the_docs_work_on_a_closed_network(server, http, browser, tmp_path):
    """A person authorises there and creates an order."""
    User(http(server), "bob@example.com")

    def find(selector):
        return WebDriverWait(browser, 20).until(
            lambda page: next(
                (e for e in page.find_elements(By.CSS_SELECTOR, selector)),
                None,
            )
        )

    def click(selector):
        browser.execute_script("arguments[0].click()", find(selector))

    browser.get(f"http://127.0.0.1:{server.port}/docs")
    click(".auth-wrapper .authorize")
    find("#oauth_username").send_keys("bob@example.com")
    find("#oauth_password").send_keys(PASSWORD)
    click(".auth-btn-wrapper .authorize")
    find(".auth-btn-wrapper .btn-done")
    WebDriverWait(browser, 20).until(
        lambda page: (
            "Logout" in page.find_element(By.CSS_SELECTOR, ".modal-ux").text
        )
    )
    click(".modal-ux .close-modal")
    click("#operations-orders-create_order .opblock-summary-control")
    click("#operations-orders-create_order .try-out__btn")
    click("#operations-orders-create_order .execute")
    status = find(".live-responses-table .response .response-col_status")
    browser.execute_script("arguments[0].scrollIntoView(false)", status)
    browser.save_screenshot(str(tmp_path / "docs.png"))

    assert status.text.startswith("201")
