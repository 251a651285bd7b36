"""Files that others must not read, also where somebody laid a link in their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft.core.errors import UserError
from fedgraft.deployment.files import PRIVATE_FILE, private_folder, require_private, write


@pytest.mark.parametrize("place", ["site.key", ".site.key.new"])
def test_a_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path, place: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("another's")
    (tmp_path / place).symlink_to(elsewhere)
    write(tmp_path / "site.key", "secret", PRIVATE_FILE)
    assert elsewhere.read_text() == "another's"
    assert not (tmp_path / "site.key").is_symlink() and (tmp_path / "site.key").read_text() == "secret"
    assert (tmp_path / "site.key").stat().st_mode & 0o777 == PRIVATE_FILE


def test_a_wider_mode_is_refused_also_behind_a_link(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")
    key.chmod(0o640)
    (tmp_path / "link").symlink_to(key)
    with pytest.raises(UserError, match="others may use it"):
        require_private(tmp_path / "link")


def test_a_folder_that_is_there_is_closed(tmp_path: Path) -> None:
    (tmp_path / "kit").mkdir(mode=0o755)
    assert private_folder(tmp_path / "kit").stat().st_mode & 0o777 == 0o700
