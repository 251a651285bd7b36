"""What a SuperNode and its worker are told, so that they know each other and nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from fedgraft.client.warm.command import fresh_secret, supernode_options, worker_command
from fedgraft.core.errors import UserError


def test_the_secret_is_the_owner_s_alone_and_another_each_time(tmp_path: Path) -> None:
    first = fresh_secret(tmp_path).read_bytes()
    path = fresh_secret(tmp_path)
    assert len(first) == 32 and path.read_bytes() != first
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_secret_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"worker.secret: cannot be written"):
        fresh_secret(tmp_path / "nowhere")


def test_flower_takes_the_supernode_s_options(tmp_path: Path) -> None:
    options = _parse_args_run_supernode().parse_args(supernode_options(tmp_path / "s"))
    assert (options.isolation, options.superexec_auth_secret_file) == ("process", str(tmp_path / "s"))


def test_the_worker_is_told_where_all_is(tmp_path: Path) -> None:
    command = worker_command(tmp_path, "127.0.0.1:9", tmp_path / "s", tmp_path / "ca.crt")
    assert command[1:4] == ["-P", "-m", "fedgraft.client.warm"]
    assert command[4:] == [
        *("--folder", str(tmp_path), "--runtime-api-address", "127.0.0.1:9"),
        *("--superexec-auth-secret-file", str(tmp_path / "s"), "--root-certificates", str(tmp_path / "ca.crt")),
    ]
