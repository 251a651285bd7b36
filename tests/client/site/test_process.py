"""How a site's SuperNode waits: soon after a message, rarely when none has come for long, and while nobody answers."""

from __future__ import annotations

import inspect
import time

import httpx
import pytest
from flwr.supernode import fleet_http_connection, start_client_internal

from fedgraft.client.site.process import PART, SOON, Waiting, patient

_IDLE, _ANSWER = 3.0, 0.5


class Clock:
    """A clock that waiting moves on."""

    def __init__(self) -> None:
        self.time = 100.0
        self.waits: list[float] = []

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.time += seconds
        self.waits.append(seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_an_idle_site_looks_as_rarely_as_flower_s_own(clock: Clock) -> None:
    waiting = Waiting(clock.now, clock.wait)
    while clock.time < 200:
        waiting.sleep(_IDLE)
    assert clock.waits[0] == SOON and clock.waits[-1] == _IDLE
    assert clock.waits == sorted(clock.waits)
    assert sum(wait < _IDLE for wait in clock.waits) < 40


def test_a_message_makes_the_next_looks_soon_again(clock: Clock) -> None:
    waiting = Waiting(clock.now, clock.wait)
    while clock.waits[-1:] != [_IDLE]:
        waiting.sleep(_IDLE)
    waiting.sleep(_ANSWER)  # the worker is at it
    assert clock.waits[-1] == SOON
    clock.time += 50  # a long training, and more looks for its answer
    waiting.sleep(_ANSWER)
    waiting.sleep(_IDLE)
    assert clock.waits[-2:] == [SOON, SOON]
    clock.time += 10
    waiting.sleep(_IDLE)
    assert clock.waits[-1] == pytest.approx(PART * (10 + 2 * SOON))


def test_the_rest_of_the_clock_is_the_usual_one() -> None:
    assert Waiting().monotonic is time.monotonic


def test_flower_s_loop_waits_by_the_name_that_is_replaced() -> None:
    assert start_client_internal.time is time
    source = inspect.getsource(start_client_internal)
    assert "time.sleep(3)" in source and "time.sleep(0.5)" in source


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol"), True),
        (httpx.ConnectError("[Errno 111] Connection refused"), True),
        (httpx.ReadError("[SSL] record layer failure"), True),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed"), False),
    ],
)
def test_what_breaks_is_tried_again_and_a_strange_certificate_is_not(error: Exception, again: bool) -> None:
    invoker = patient()
    invoker.wait_function = lambda seconds: None
    tries: list[int] = []

    def send() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise error
        return "sent"

    if again:
        assert invoker.invoke(send) == "sent"
    else:
        with pytest.raises(httpx.ConnectError):
            invoker.invoke(send)
    assert len(tries) == 1 + again


def test_flower_connects_by_the_name_that_is_replaced() -> None:
    assert "make_simple_http_retry_invoker()" in inspect.getsource(fleet_http_connection)
