"""Whether the server can be reached over TLS as this federation means it, told apart by what is wrong."""

from __future__ import annotations

import http.client
import socket
import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from ..core.errors import UserError
from .certificates import now

#: Flower refuses a site whose clock is further off (TIMESTAMP_TOLERANCE).
CLOCK_TOLERANCE = 300.0
_TIMEOUT = 10.0
# X509_V_ERR_* of OpenSSL.
_NOT_YET, _EXPIRED, _HOST, _ADDRESS = 9, 10, 62, 64


def reach(host: str, port: int, authority: Path) -> float:
    """Seconds that the clock of the server at ``host`` and ``port`` is ahead of this machine's.

    The server must show a certificate that ``authority`` signed for ``host`` and that is valid by this clock, and must
    be a SuperLink. Raises :class:`UserError`: one line for each way in which that can fail.
    """
    where = f"{host}:{port}"
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT, context=context)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read(1 << 10)
    except ssl.SSLCertVerificationError as error:
        raise UserError(_distrust(where, error, authority)) from None
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            raise UserError(
                f"{where}: speaks no TLS, so nothing is sent there; start it by: fedgraft server start"
            ) from None
        raise UserError(f"{where}: TLS failed: {error.reason or error}") from None
    except socket.gaierror:
        raise UserError(f"{host}: no such host; check the name in the kit's settings and this machine's DNS") from None
    except TimeoutError:
        raise UserError(f"{where}: no answer in {_TIMEOUT:g} s; have the firewall let TCP {port} out to it") from None
    except ConnectionRefusedError:
        raise UserError(f"{where}: nobody listens there; is the server started?") from None
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{where}: cannot be reached: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise UserError(
            f"{where}: answered {answer.status} and is no SuperLink; check the address in the kit's settings"
        )
    return _ahead(answer.getheader("Date"))


def require_clock(ahead: float, where: str) -> None:
    """Raise :class:`UserError` where the clocks differ by more than Flower's authentication bears."""
    if abs(ahead) > CLOCK_TOLERANCE:
        way = "behind" if ahead > 0 else "ahead of"
        raise UserError(f"this machine's clock is {abs(ahead):.0f} s {way} that of {where}; set it (NTP)")


def _distrust(where: str, error: ssl.SSLCertVerificationError, authority: Path) -> str:
    here = f"here it is {now():%Y-%m-%d %H:%M} UTC"
    if error.verify_code == _EXPIRED:
        return (
            f"{where}: the server's certificate has expired ({here}); its side runs: fedgraft provision rotate server"
        )
    if error.verify_code == _NOT_YET:
        return f"{where}: the server's certificate is not valid yet ({here}); set this machine's clock"
    if error.verify_code in (_HOST, _ADDRESS):
        return f"{where}: the server's certificate is for other names; the coordinator adds this one to server.names"
    return f"{where}: its certificate is not signed by {authority}; this is another server, or one that sits in between"


def _ahead(date: str | None) -> float:
    try:
        there = parsedate_to_datetime(date or "")
    except ValueError:
        return 0.0
    return (there.replace(tzinfo=there.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
