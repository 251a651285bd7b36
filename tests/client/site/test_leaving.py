"""What the server is told of a SuperNode that died, and what its answers mean."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient

from fedgraft.client.site import leaving
from fedgraft.client.site.keys import make_key
from fedgraft.client.site.leaving import LAST_LOOK, PATIENCE, leave
from fedgraft.deployment.authority import Authority
from fedgraft.deployment.kits import SiteKit
from fedgraft.server.prompt import LOOK

TEXT = 'name = "x"\n[server]\naddress = "127.0.0.1:9"\n[[site]]\nname = "east"\n'


@pytest.fixture
def kit(tmp_path: Path) -> SiteKit:
    (tmp_path / "federation.toml").write_text(TEXT)
    authority = Authority.create(tmp_path / "federation.toml", tmp_path / "kits")
    make_key(authority.kits / "sites" / "east")
    return SiteKit.open(authority.kits / "sites" / "east")


@pytest.mark.parametrize(("status", "gone"), [(None, True), (412, True), (401, True), (503, False)])
def test_the_server_is_told_which_node_is_gone_unless_it_has_trouble_of_its_own(
    kit: SiteKit, monkeypatch: pytest.MonkeyPatch, status: int | None, gone: bool
) -> None:
    told: list[int] = []
    waited: list[float] = []

    def deactivate(client: Any, request: Any) -> None:
        assert waited == [LAST_LOOK] and LAST_LOOK >= 5 * LOOK, "an answer that has just come may still be taken"
        told.append(request.node_id)
        if status is not None:
            asked = httpx.Request("POST", "https://127.0.0.1:9")
            raise httpx.HTTPStatusError("no", request=asked, response=httpx.Response(status, request=asked))

    monkeypatch.setattr(FleetHttpClient, "DeactivateNode", deactivate)
    monkeypatch.setattr(leaving.time, "sleep", waited.append)
    assert leave(kit, 2**63 + 7) is gone
    assert told == [2**63 + 7]


def test_a_server_that_cannot_be_reached_was_not_told(kit: SiteKit) -> None:
    assert leave(kit, 7) is False


def test_the_patience_is_that_of_flower_s_server() -> None:
    assert PATIENCE == HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL


def test_flower_s_supernode_says_so_by_the_name_that_is_replaced() -> None:
    assert fleet_http_connection.FleetHttpClient is FleetHttpClient
    assert "FleetHttpClient.from_server_address" in inspect.getsource(fleet_http_connection)
    assert "DeactivateNode" in inspect.getsource(fleet_http_connection)
