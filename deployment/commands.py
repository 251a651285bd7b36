"""`fedgraft provision`: found a federation, sign its sites' keys, replace and withdraw them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from . import certificates
from .authority import Authority


class _OrFile(TyperGroup):
    """A group whose first word may also be a file: `provision federation.toml` is `provision kits federation.toml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["kits", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_OrFile,
    help="Found a federation and manage its keys: fedgraft provision federation.toml --output kits",
    no_args_is_help=True,
)
_Kits = Annotated[Path, typer.Option("--output", help="The folder of the kits.")]
_KITS = Path("kits")


@app.command()
def kits(
    federation: Annotated[Path, typer.Argument(help="federation.toml.", show_default=False)],
    output: _Kits = _KITS,
) -> None:
    """Make the authority, the server's certificate and a kit for each role; again, after a change of the file."""
    authority = Authority.create(federation, output)
    console = _console()
    anchor = authority.signer.certificate
    console.print(f"{output}: federation {authority.federation.name}")
    console.print(f"  authority: {_fingerprint(authority)}")
    console.print(f"  authority expires {certificates.day(anchor.not_valid_after_utc)}")
    for role in ("server", *(f"sites/{name}" for name in authority.federation.sites)):
        console.print(f"  {output / role}")
    console.print("Hand each kit to whom it is for, and tell them the authority's fingerprint by another way.")
    status(output)


@app.command()
def sign(
    request: Annotated[Path, typer.Argument(help="The site.csr that a site sent.", show_default=False)],
    fingerprint: Annotated[str, typer.Option(help="The key's fingerprint as the site told it by another way.")] = "",
    output: _Kits = _KITS,
) -> None:
    """Sign a site's key, and put the site on the roster."""
    authority = Authority(output)
    name, entry = authority.sign(request, fingerprint)
    console = _console()
    console.print(f"{name}: signed; the certificate expires {certificates.day(entry.ends)}")
    if not fingerprint:
        shown = certificates.key_fingerprint(certificates.load_public(entry.public_key))
        console.print(f"  NOT COMPARED: have the site read its key's fingerprint to you; it must be {shown}")
    console.print(f"  to the site:   {output / 'sites' / name / 'site.crt'} and roster.json beside it")
    console.print(f"  to the server: {output / 'server' / 'roster.json'}")


@app.command()
def rotate(
    who: Annotated[str, typer.Argument(help="server, authority, or the name of a site.", show_default=False)],
    output: _Kits = _KITS,
) -> None:
    """Replace the key of the server or the authority, or let a site have a new key signed."""
    authority = Authority(output)
    if who == "authority":
        signed = authority.rotate_authority()
        console = _console()
        console.print(f"authority: {_fingerprint(authority)}")
        console.print(f"  signed anew: the server's new key; the keys of {', '.join(signed) or 'no site'}")
        console.print("  stop all; hand out what is new in the kits: ca.crt, roster.json, server.key, server.crt,")
        console.print("  site.crt; tell the authority's fingerprint by another way; start again")
        return
    if who == "server":
        ends = authority.rotate_server()
        _console().print(f"server: a new key; the certificate expires {certificates.day(ends)}; restart the server")
        return
    authority.rotate(who)
    _console().print(f"{who}: the site runs `fedgraft site init --new-key` and sends site.csr, which you sign")


@app.command()
def revoke(
    site: Annotated[str, typer.Argument(help="The name of a site.", show_default=False)],
    output: _Kits = _KITS,
) -> None:
    """Take a site off the roster. Its key never stands for it again."""
    Authority(output).revoke(site)
    _console().print(f"{site}: revoked; to the server: {output / 'server' / 'roster.json'}")


@app.command()
def status(output: _Kits = _KITS) -> None:
    """Say whose keys are signed, and when certificates end."""
    authority = Authority(output)
    table = Table("who", "state", "expires")
    crt = output / "server" / "server.crt"
    found = certificates.read_certificate(crt, "run: fedgraft provision rotate server")
    table.add_row("server", "", _end(found.not_valid_after_utc))
    for name in authority.federation.sites:
        entry = authority.sites.get(name)
        table.add_row(name, entry.state if entry else "has sent no key", _end(entry.ends) if entry else "")
    _console().print(table)


def _fingerprint(authority: Authority) -> str:
    return certificates.key_fingerprint(certificates.public_of(authority.signer.certificate))


def _end(at: Any) -> str:
    left = at - certificates.now()
    hint = "EXPIRED" if left.total_seconds() < 0 else "soon" if left < certificates.SOON else ""
    return f"{certificates.day(at)} {hint}".strip()


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False, markup=False)
