"""What a secure sum costs a site and the server, beside the one that Flower has (SecAgg+), on the same vectors.

    python benchmarks/secure_sum.py            writes benchmarks/results/secure_sum.json and prints a table
    python benchmarks/secure_sum.py --short    a vector of 64 KiB, once each; writes nothing

A vector of 1 MiB of float32 at each of 3, 10 and 30 sites, all steps of the protocol in this process, without the
network: ours with 64 and with 32 bits, and the steps of a client as `flwr.client.mod.secure_aggregation` has them, with
the server's unmasking from the same primitives (its workflow cannot be called without a grid). All sites share
masks with all, the threshold is more than two thirds, nobody is lost or as many as may be; Flower's other settings are
its defaults, max_weight 1000 included. By turns, medians over the repetitions; a site's time is the mean over all.
Ours signs keys and survivors and checks the others' signatures, which Flower's does not.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from fedgraft.privacy.securesum import Roster, SecureServer, SecureSite, Terms
from fedgraft.privacy.securesum.terms import usual_threshold

#: The package offers a function under the module's name.
mod: Any = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

RESULTS = Path(__file__).parent / "results" / "secure_sum.json"
SITES, REPEAT = (3, 10, 30), {3: 9, 10: 5, 30: 3}
MIB = 1 << 20
MOST, LIMIT = 1000, 8.0
CLIP, TARGET, MODULUS = 8.0, 1 << 22, 1 << 32  # Flower's defaults


class Clock:
    """Seconds of the sites and of the server, and the bytes that each site sent."""

    def __init__(self) -> None:
        self.site = self.server = 0.0
        self.sent = 0

    def at_site(self, what: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = what()
        self.site += time.perf_counter() - began
        return result

    def at_server(self, what: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = what()
        self.server += time.perf_counter() - began
        return result


def ours(vectors: list[np.ndarray], weights: list[int], lost: int, bits: int) -> tuple[Clock, np.ndarray]:
    clock, count = Clock(), len(vectors)
    names = tuple(f"s{number:03d}" for number in range(count))
    keys = {name: Ed25519PrivateKey.generate() for name in names}
    roster = Roster({name: key.public_key() for name, key in keys.items()})
    terms = Terms("run", 1, names, usual_threshold(count), bits, LIMIT, MOST)  # type: ignore[arg-type]
    server = SecureServer(terms, vectors[0].size)
    sites = {name: SecureSite(terms, name, keys[name], roster) for name in names}

    def send(name: str, give: Callable[[], Any], take: Callable[[str, Any], None]) -> None:
        message = clock.at_site(give)
        clock.sent += message.nbytes if isinstance(message, np.ndarray) else len(message.encode())
        clock.at_server(lambda: take(name, message))

    for name in names:
        send(name, sites[name].advertise, server.advert)
    adverts = clock.at_server(lambda: server.adverts)
    for name in names:
        send(name, lambda name=name: sites[name].share(adverts), server.shared)
    envelopes = clock.at_server(lambda: server.envelopes)
    for name, vector, weight in list(zip(names, vectors, weights, strict=True))[lost:]:
        wide = vector.astype(np.float64)
        send(name, lambda n=name, v=wide, w=weight: sites[n].mask(envelopes[n], v, w, b""), server.masked)
    survivors = clock.at_server(lambda: server.survivors)
    for name in names[lost:]:
        send(name, lambda name=name: sites[name].agree(survivors), server.agreed)
    agreements = clock.at_server(lambda: server.agreements)
    for name in names[lost:]:
        send(name, lambda name=name: sites[name].reveal(agreements), server.revealed)
    return clock, clock.at_server(server.result).mean


def flowers(vectors: list[np.ndarray], weights: list[int], lost: int) -> tuple[Clock, np.ndarray]:
    clock, count = Clock(), len(vectors)
    nodes = list(range(1, count + 1))
    states = {node: mod.SecAggPlusState(nid=node) for node in nodes}
    setup = {
        Key.SAMPLE_NUMBER: count,
        Key.SHARE_NUMBER: count,
        Key.THRESHOLD: usual_threshold(count),
        Key.CLIPPING_RANGE: CLIP,
        Key.TARGET_RANGE: TARGET,
        Key.MOD_RANGE: MODULUS,
        Key.MAX_WEIGHT: float(MOST),
    }

    def size(value: Any) -> int:
        return sum(map(size, value)) if isinstance(value, list) else len(value) if isinstance(value, bytes) else 8

    def sent(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        answer = clock.at_site(step)
        clock.sent += sum(map(size, answer.values()))
        return answer

    def added(answer: dict[str, Any], total: Any) -> Any:
        found = [bytes_to_ndarray(text) for text in answer[Key.MASKED_PARAMETERS]]
        return found if total is None else arithmetic.parameters_addition(total, found)

    public = {}
    for node in nodes:
        answer = sent(lambda node=node: mod._setup(states[node], setup))
        public[node] = (answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2])
    shown = {str(node): both for node, both in public.items()}
    forward: dict[int, tuple[list[int], list[bytes]]] = {node: ([], []) for node in nodes}
    for node in nodes:
        answer = sent(lambda node=node: mod._share_keys(states[node], shown))
        for to, text in zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True):
            forward[to][0].append(node)
            forward[to][1].append(text)
    total: Any = None
    for node, vector, weight in list(zip(nodes, vectors, weights, strict=True))[lost:]:
        told = {Key.SOURCE_LIST: forward[node][0], Key.CIPHERTEXT_LIST: forward[node][1]}
        parameters = ndarrays_to_parameters([vector])
        answer = sent(lambda n=node, t=told, w=weight, p=parameters: mod._collect_masked_vectors(states[n], t, w, p))

        total = clock.at_server(lambda answer=answer, total=total: added(answer, total))
    active, dead = nodes[lost:], nodes[:lost]
    asked = {Key.ACTIVE_NODE_ID_LIST: active, Key.DEAD_NODE_ID_LIST: dead}
    shares: dict[int, list[bytes]] = {node: [] for node in nodes}
    for node in active:
        answer = sent(lambda node=node: mod._unmask(states[node], asked))
        for owner, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
            shares[owner].append(share)

    def unmask() -> np.ndarray:
        vector = arithmetic.parameters_mod(total, MODULUS)
        for node, held in shares.items():
            secret = combine_shares(held)
            shape = arithmetic.get_parameters_shape(vector)
            if node in active:
                mask = pseudo_rand_gen(secret, MODULUS, shape)
                vector = arithmetic.parameters_subtraction(vector, mask)
                continue
            for other in active:
                shared = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(public[other][0]))
                mask = pseudo_rand_gen(shared, MODULUS, shape)
                change = arithmetic.parameters_addition if node > other else arithmetic.parameters_subtraction
                vector = change(vector, mask)
        ratio, found = arithmetic.factor_extract(arithmetic.parameters_mod(vector, MODULUS))
        (mean,) = dequantize(found, CLIP, TARGET)
        return (mean - (len(active) - 1) * CLIP) * (TARGET / ratio)

    return clock, clock.at_server(unmask)


KINDS: dict[str, Callable[[list[np.ndarray], list[int], int], tuple[Clock, np.ndarray]]] = {
    "ours, 64 bits": lambda v, w, lost: ours(v, w, lost, 64),
    "ours, 32 bits": lambda v, w, lost: ours(v, w, lost, 32),
    "Flower SecAgg+": flowers,
}


def measured(sites: int, lost: int, size: int, repeat: int) -> dict[str, Any]:
    """Medians of every kind for one case."""
    rng = np.random.default_rng(sites)
    vectors = [rng.normal(scale=0.05, size=size).astype(np.float32) for _ in range(sites)]
    weights = [int(weight) for weight in rng.integers(100, MOST + 1, sites)]
    left = range(lost, sites)
    exact = sum(weights[i] * vectors[i].astype(np.float64) for i in left) / sum(weights[i] for i in left)
    rows: dict[str, list[tuple[float, float, int, float]]] = {kind: [] for kind in KINDS}
    for _ in range(repeat):
        for kind, run in KINDS.items():
            clock, mean = run(vectors, weights, lost)
            off = float(np.abs(mean - exact).max())
            if off > 1e-2:
                raise SystemExit(f"{kind}: the sum of {sites} sites is off by {off:g}: nothing to time")
            rows[kind].append((clock.site / sites, clock.server, clock.sent // sites, off))
    return {
        kind: {
            "site_ms": round(1000 * statistics.median(row[0] for row in found), 2),
            "server_ms": round(1000 * statistics.median(row[1] for row in found), 2),
            "bytes_a_site": found[0][2],
            "error": max(row[3] for row in found),
        }
        for kind, found in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="small vectors, once each; writes nothing")
    short = parser.parse_args().short
    size = (MIB >> 4 if short else MIB) // 4
    cases = []
    print(f"{'':>16} {'sites':>5} {'lost':>4} {'site ms':>9} {'server ms':>10} {'bytes a site':>13} {'error':>9}")
    for sites in SITES:
        for lost in (0, sites - usual_threshold(sites)):
            if lost == 0 and cases and cases[-1]["sites"] == sites:
                continue  # of three nobody may be lost
            found = measured(sites, lost, size, 1 if short else REPEAT[sites])
            cases.append({"sites": sites, "lost": lost, "kinds": found})
            for kind, row in found.items():
                print(
                    f"{kind:>16} {sites:5} {lost:4} {row['site_ms']:9.2f} {row['server_ms']:10.2f} "
                    f"{row['bytes_a_site']:13,} {row['error']:9.1e}",
                    flush=True,
                )
    if not short:
        told = {"mib": 1, "flwr": version("flwr"), "machine": platform.machine(), "cases": cases}
        RESULTS.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
