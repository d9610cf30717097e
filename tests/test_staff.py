"""Staff: the users who may mark orders paid and shipped, in both modes."""

import pytest
from conftest import User, replace
from fastapi.testclient import TestClient

from orders.api import create_app

STAFF, OWNER, OTHER = "staff@example.com", "ada@example.com", "bob@a.com"


@pytest.fixture
def shop(settings):
    """Drive an app whose first user is staff."""
    settings = replace(settings, staff_user_ids="1")
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def people(shop):
    """Return a member of staff, the owner of orders, and another user."""
    return [User(shop, email) for email in (STAFF, OWNER, OTHER)]


@pytest.mark.parametrize("status", ["PAID", "SHIPPED"])
def test_only_staff_may_mark_an_order(people, status):
    """The owner is told that it is not a matter of the order."""
    staff, owner, _ = people
    order_id = owner.order()
    if status == "SHIPPED":
        staff.change(order_id, "PAID")

    refused = owner.change(order_id, status)
    changed = staff.change(order_id, status)

    assert refused.status_code == 403
    assert refused.json()["type"] == "/docs#staff-only"
    assert "staff" in refused.json()["detail"]
    assert changed.status_code == 200
    assert changed.json()["user_id"] == owner.id
    assert owner.get(order_id).json()["status"] == status


def test_an_owner_may_still_cancel(people):
    """Before it is shipped, an order is its owner's."""
    staff, owner, other = people
    pending, paid, shipped = (owner.order() for _ in range(3))
    staff.change(paid, "PAID")
    for status in ("PAID", "SHIPPED"):
        staff.change(shipped, status)

    assert owner.change(pending, "CANCELED").status_code == 200
    assert owner.change(paid, "CANCELED").status_code == 200
    assert owner.change(shipped, "CANCELED").status_code == 409
    assert other.change(owner.order(), "CANCELED").status_code == 404


def test_staff_may_read_the_orders_of_any_user(people):
    """The order, its history, and the list with its pages."""
    staff, owner, other = people
    ids = [owner.order() for _ in range(3)]
    path = f"/orders/user/{owner.id}?limit=2"

    page = staff.call("GET", path)
    rest = staff.call("GET", f"{path}&cursor={page.json()[-1]['id']}")

    listed = [order["id"] for order in page.json() + rest.json()]
    assert listed == ids[::-1]
    # Twice: from the database, and from the cache.
    for _ in range(2):
        assert staff.get(ids[0]).json()["user_id"] == owner.id
        assert other.get(ids[0]).status_code == 404
    assert staff.call("GET", f"/orders/{ids[0]}/events").status_code == 200
    assert other.call("GET", f"/orders/{ids[0]}/events").status_code == 404
    assert other.call("GET", path).status_code == 403


@pytest.mark.parametrize("user_id", [0, -1, 2**31, -(2**31) - 1, 2**63])
def test_staff_find_no_orders_of_an_id_that_nobody_can_have(people, user_id):
    """The database would refuse the number."""
    staff, owner, _ = people

    assert staff.call("GET", f"/orders/user/{user_id}").json() == []
    assert owner.call("GET", f"/orders/user/{user_id}").status_code == 403


def test_a_stale_version_is_refused_to_staff_too(people):
    """A member of staff has the rules of every change, but for the owner."""
    staff, owner, _ = people
    order_id = owner.order()
    old = owner.get(order_id).headers["ETag"]
    staff.change(order_id, "PAID")

    late = staff.change(order_id, "SHIPPED", headers={"If-Match": old})

    assert late.status_code == 412


def test_without_staff_anyone_may_mark_their_own_order(ada, bob, caplog):
    """As ever; nobody may touch the order of another user."""
    order_id = ada.order()

    assert bob.change(order_id, "PAID").status_code == 404
    assert ada.change(order_id, "PAID").status_code == 200


@pytest.mark.parametrize(("ids", "lines"), [("", 1), ("1,7", 0)])
def test_the_start_says_that_there_is_no_staff(embedded, caplog, ids, lines):
    """In one line, which names the variable."""
    create_app(replace(embedded, staff_user_ids=ids))

    said = [text for text in caplog.messages if "STAFF_USER_IDS" in text]
    assert len(said) == lines


def test_docs_describe_staff(shop):
    """What they may do, and the kind of the refusal."""
    schema = shop.get("/openapi.json").json()

    change = schema["paths"]["/orders/{order_id}"]["patch"]
    assert "staff" in change["description"].lower()
    assert "403" in change["responses"]
    tags = {tag["name"]: tag["description"] for tag in schema["tags"]}
    assert "staff-only" in tags["service"]
