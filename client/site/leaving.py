"""How the server hears that a SuperNode goes: after it has had time to take the last answer."""

from __future__ import annotations

import time
from typing import cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import DeactivateNodeRequest, DeactivateNodeResponse
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from ...deployment.kits import SiteKit
from ...privacy.securesum.identity import load_signing_key

#: Seconds after its last word for which a server takes a SuperNode for connected, and refuses the next one of its key.
PATIENCE = 60.0
#: Seconds for which a server goes on to look for answers before it hears that there will be no more.
LAST_LOOK = 1.0


class LastWords(FleetHttpClient):
    """A SuperNode's connection that is not closed on the heels of an answer.

    Flower's server hands out no answer of a node that it knows to be gone, not even one that has come: the round
    would be lost that was paid for.
    """

    def DeactivateNode(self, request: DeactivateNodeRequest) -> DeactivateNodeResponse:
        time.sleep(LAST_LOOK)
        return super().DeactivateNode(request)


def leave(kit: SiteKit, node: int) -> bool:
    """Tell the server that SuperNode number ``node`` of ``kit`` is gone; False where the server cannot be reached.

    It then waits for no answer of it, and takes the next one at once.
    """
    key = cast(ec.EllipticCurvePrivateKey, load_signing_key(kit.key))
    interceptors: list[ProtobufClientInterceptor] = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    address, authority = kit.settings.server.address, str(kit.folder / "ca.crt")
    try:
        with LastWords.from_server_address(address, False, authority, interceptors) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    except httpx.HTTPStatusError as error:
        # That it was taken for gone already, or is not known: the next one will hear which.
        return not error.response.is_server_error
    except httpx.HTTPError:
        return False
    return True
