"""What stands in a kit for people and for their service managers: settings, README, Docker Compose, systemd."""

from __future__ import annotations

from .. import __version__
from .federation import FederationFile

_WHEEL = f"fedgraft-{__version__}-py3-none-any.whl"


def settings(federation: FederationFile, site: str) -> str:
    """The text of site.toml, or of server.toml where ``site`` is empty."""
    who = f'site = "{site}"\n' if site else ""
    listen = "" if site else f'listen = "{federation.server.listen}"\n'
    return f'federation = "{federation.name}"\n{who}\n[server]\naddress = "{federation.server.address}"\n{listen}'


def readme(federation: FederationFile, site: str, fingerprint: str) -> str:
    """The kit's README: three commands, what to compare, what to keep."""
    if not site:
        return f"""# {federation.name}: the server

In this folder, on the machine that sites reach as {federation.server.address}:

    fedgraft server start            # until Ctrl-C; a service file lies beside
    fedgraft job submit job.toml     # in a second terminal, on the same machine
    fedgraft job fetch NAME          # the adapter and the report, once `fedgraft job status` says completed

Sites need TCP {federation.server.port} open to this machine, and nothing else. Only processes on this machine may
submit jobs.
`server.key` is private: its mode is 0600, and it leaves this machine for no one.
The list of sites, roster.json, is read anew while the server runs: copy it here whenever the coordinator changes it.
"""
    return f"""# {federation.name}: site {site}

In this folder, at the site:

    fedgraft site init     # makes site.key, which stays here, and site.csr, which you send to the coordinator
    fedgraft site check    # once site.crt and roster.json came back and lie here, and policy.toml is filled in
    fedgraft site start    # until Ctrl-C; a service file lies beside

Compare by another way than the one this kit came by, such as the telephone:
- the authority's fingerprint, which the coordinator reads to you: {fingerprint}
- the fingerprint of your key, which `fedgraft site init` prints and you read to the coordinator.

The site opens connections to {federation.server.address} and needs no open port of its own.
`site.key` is private: its mode is 0600, and it leaves this folder for no one.
`state/` holds the ledger and the audit log: back it up.
"""


def compose_file(federation: FederationFile, site: str) -> str:
    """A Docker Compose file that runs the kit's folder, with the wheel that is put beside it."""
    role = "site" if site else "server"
    port = f'\n    ports: ["{federation.server.port}:{federation.server.port}"]' if not site else ""
    return f"""# Put {_WHEEL} into this folder, then: UID=$(id -u) GID=$(id -g) docker compose up --build
services:
  fedgraft-{role}:
    build:
      context: .
      dockerfile_inline: |
        FROM python:3.11-slim
        COPY {_WHEEL} /tmp/
        RUN pip install --no-cache-dir /tmp/{_WHEEL}
    user: "${{UID:?}}:${{GID:?}}"
    environment: {{HOME: /kit, HF_HUB_OFFLINE: "1"}}
    volumes: [".:/kit"]
    working_dir: /kit
    command: ["fedgraft", "{role}", "start"]{port}
    init: true
    restart: on-failure
    stop_grace_period: 30s
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
"""


def systemd_unit(federation: FederationFile, site: str) -> str:
    """A systemd unit for a kit in /etc/fedgraft that the user `fedgraft` owns."""
    role = "site" if site else "server"
    return f"""# For /etc/systemd/system. The kit lies in /etc/fedgraft and belongs to the user fedgraft.
[Unit]
Description=fedgraft {role} of {federation.name}
After=network-online.target
Wants=network-online.target

[Service]
User=fedgraft
WorkingDirectory=/etc/fedgraft
ExecStart=/opt/fedgraft/bin/fedgraft {role} start
Environment=HF_HUB_OFFLINE=1
Restart=on-failure
RestartSec=30
TimeoutStopSec=30
UMask=0077
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
ReadWritePaths=/etc/fedgraft

[Install]
WantedBy=multi-user.target
"""
