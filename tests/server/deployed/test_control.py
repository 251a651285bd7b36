"""What the coordinator is shown of a job's log."""

from __future__ import annotations

import pytest

from fedgraft.server.deployed.control import job_lines

LOG = (
    "\x1b[92mINFO\x1b[0m :      Starting Flower ServerApp\nround 0 evaluate: 4.7 s\n"
    "\x1b[92mINFO \x1b[0m:      \nSuccessfully installed fedgraft-job to /srv/kits\nINFO:flwr: no colour\n"
    "\x1b[93mWARNING\x1b[0m :   the disk is nearly full\nfedgraft: INFO is a word too\nthe end"
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_flower_s_info_is_left_out_wherever_the_text_was_cut(size: int) -> None:
    cut = [LOG[at : at + size] for at in range(0, len(LOG), size)]
    assert list(job_lines(cut)) == [
        "round 0 evaluate: 4.7 s\n",
        "\x1b[93mWARNING\x1b[0m :   the disk is nearly full\n",
        "fedgraft: INFO is a word too\n",
        "the end",
    ]
