"""What a site sends, packed as the run asks: whole, or as a change that is rounded or cut to its largest numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from flwr.app import RecordDict

from ..core.adapter import AdapterSpec, AdapterState, TensorSpec
from ..core.config import RunConfig
from ..core.wire import encode_adapter, encode_change

_OWED, _NUMBERS = "site-owed", "owed"


def packed(
    shared: AdapterState,
    received: AdapterState,
    config: RunConfig,
    *,
    site: str,
    round: int,
    known: Mapping[str, AdapterState],
) -> tuple[RecordDict, dict[str, AdapterState]]:
    """``shared`` as ``server.upload`` says, and what a lossy form leaves owed, to be remembered by name.

    ``received``: what the site was sent; ``known``: what it remembers of the round before. Made of what would be sent
    anyway, and of chance that everybody may know, so it costs no privacy.
    """
    server = config.server
    if server.upload == "plain":
        return encode_adapter(shared, wire=server.wire_dtype, code=server.entropy_coding), {}
    seed = hashlib.sha256(f"{config.seed}|{site}|{round}|rounding".encode()).digest()
    upload, owed = encode_change(
        shared,
        received,
        server.upload,
        fraction=server.top_fraction,
        random=np.random.default_rng(list(seed)),
        owed=known[_OWED][_NUMBERS] if _OWED in known else None,
        code=server.entropy_coding,
    )
    if server.upload != "topk":
        return upload, {}
    spec = AdapterSpec(_NUMBERS, (TensorSpec(_NUMBERS, owed.shape, "float64"),))
    return upload, {_OWED: AdapterState(spec, {_NUMBERS: owed})}
