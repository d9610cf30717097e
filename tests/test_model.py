"""The API against a dict: whatever is called in whatever order, they agree."""

import shutil
import tempfile
from pathlib import Path

from conftest import User, migrate
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from orders.api import create_app
from orders.models import ORDER_FORM, TRANSITIONS, OrderStatus
from orders.settings import Settings

quantities = st.integers(1, 10_000)
cents = st.integers(0, 100_000_000)


class OrdersAgainstADict(RuleBasedStateMachine):
    """Two users, their orders, and what a dict says of them."""

    orders = Bundle("orders")

    @initialize()
    def start(self):
        """Start the embedded service on an empty database."""
        self.folder = tempfile.mkdtemp()
        url = f"sqlite:///{self.folder}/orders.db"
        migrate(url)
        self.client = TestClient(
            create_app(
                Settings(
                    jwt_secret_key="0123456789abcdef" * 4,
                    database_url=url,
                    rate_limit="",
                )
            )
        )
        self.client.__enter__()
        self.users = [
            User(self.client, f"user{number}@example.com")
            for number in range(2)
        ]
        self.model = {}  # order id: (owner's index, status, cents)

    def teardown(self):
        """Stop the service."""
        if hasattr(self, "client"):
            self.client.__exit__(None, None, None)
            shutil.rmtree(Path(self.folder))

    @rule(
        target=orders, who=st.integers(0, 1), quantity=quantities, price=cents
    )
    def create(self, who, quantity, price):
        """Create an order: its total is exact."""
        items = [{"name": "x", "quantity": quantity, "price": price / 100}]
        order = self.users[who].create(items).json()
        assert round(order["total_price"] * 100) == quantity * price
        self.model[order["id"]] = (who, OrderStatus.PENDING, quantity * price)
        return order["id"]

    @rule(order=orders, who=st.integers(0, 1))
    def read(self, order, who):
        """Read: an owner sees what the dict says, nobody else anything."""
        owner, status, total = self.model[order]
        answer = self.users[who].get(order)
        if who != owner:
            assert answer.status_code == 404
        else:
            head = self.users[who].call("HEAD", f"/orders/{order}")
            assert head.headers["etag"] == f'"{status}.{ORDER_FORM}"'
            assert head.headers["content-length"] == str(len(answer.content))
            assert answer.json()["status"] == status
            assert round(answer.json()["total_price"] * 100) == total

    @rule(
        order=orders,
        who=st.integers(0, 1),
        new=st.sampled_from(OrderStatus),
        expected=st.none() | st.sampled_from(OrderStatus),
        weak=st.just("") | st.sampled_from(["", "W/"]),
    )
    def change(self, order, who, new, expected, weak):
        """Change a status: it works exactly when the dict allows it."""
        owner, status, total = self.model[order]
        headers = (
            {"If-Match": f'{weak}"{expected}.{ORDER_FORM}"'}
            if expected
            else {}
        )
        answer = self.users[who].change(order, new, headers=headers)
        if who != owner:
            assert answer.status_code == 404
        elif expected not in (None, status) or (expected and weak):
            assert answer.status_code == 412
        elif new not in TRANSITIONS[status]:
            assert answer.status_code == 409
            assert answer.json()["current"] == status
            assert {*answer.json()["allowed"]} == TRANSITIONS[status]
        else:
            assert answer.status_code == 200
            self.model[order] = (owner, new, total)

    @rule(
        who=st.integers(0, 1), status=st.none() | st.sampled_from(OrderStatus)
    )
    def list_all(self, who, status):
        """List: the orders are the own ones, newest first."""
        query = {"status": status} if status else {}
        path = f"/orders/user/{self.users[who].id}"
        listed = self.users[who].call("GET", path, params=query).json()
        assert [order["id"] for order in listed] == [
            order
            for order, (owner, state, _) in reversed(self.model.items())
            if owner == who and status in (None, state)
        ]


TestOrdersAgainstADict = OrdersAgainstADict.TestCase
TestOrdersAgainstADict.settings = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
