"""A scenario's records as files: each site reads what the simulation would have it train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedgraft.client.data import Records, read_records
from fedgraft.client.policy import Policy
from fedgraft.core.config import RunConfig
from fedgraft.core.errors import UserError
from fedgraft.core.tasks import create_task
from fedgraft.simulations.loopback.dealing import with_files
from fedgraft.simulations.loopback.policies import policy_for
from fedgraft.simulations.scenario import load_scenario, site_data

pytest.importorskip("sklearn")


def _pixels(image: object) -> np.ndarray:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(str(image)))


def test_the_files_hold_what_the_sites_were_dealt(tmp_path: Path) -> None:
    pytest.importorskip("simple_icd_10_cm")
    config = load_scenario("hospitals-icd10", ["data.max_per_class=20", "data.sites=3"])
    job = with_files(config, tmp_path / "data")
    assert job.task.labels == config.task.labels and job.simulated == () and job.data.source == "files"
    for name, dealt in site_data(config).items():
        read = read_records(job.site(name).path, job)
        assert list(read.inputs) == list(dealt.train.inputs)
        assert np.array_equal(read.labels, dealt.train.labels)
        assert list(read.patients or ()) == [str(key) for key in dealt.train.patients or ()]
        assert (tmp_path / "data" / name / "records.jsonl").stat().st_mode & 0o777 == 0o600
        assert f'path = "{job.site(name).path}"' in policy_for(job, name)


def test_a_development_site_opens_the_files_of_its_job_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("simple_icd_10_cm")
    settings = ["data.max_per_class=20", "data.sites=3", "method.name=fish", "method.mask=/tmp/[a]/mask"]
    job = with_files(load_scenario("hospitals-icd10", settings), tmp_path / "data")
    name = job.site_names[0]
    policy = Policy(policy_for(job, name), "policy.toml")
    dataset = policy.dataset_of(job, name)
    assert list(policy.objections(job, "ab" * 32, dataset)) == []
    other = job.model_copy(update={"method": job.method.model_copy(update={"mask": "/tmp/a/mask"})})
    (objection,) = policy.objections(other, "ab" * 32, dataset)
    assert "/tmp/a/mask" in str(objection)


def test_images_are_written_as_they_are(tmp_path: Path) -> None:
    config = load_scenario("digits-dirichlet", ["data.sites=2", "data.sizes.minimum=5"])
    assert create_task(config.task).input_kind == "image"
    job, name = with_files(config, tmp_path), config.site_names[0]
    dealt: Records = site_data(config)[name].train
    read = read_records(job.site(name).path, job)
    assert len(read) == len(dealt)
    assert all(np.array_equal(_pixels(one), _pixels(two)) for one, two in zip(read.inputs, dealt.inputs, strict=True))


def test_sites_with_files_of_their_own_keep_them(job: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = job()
    assert with_files(config, tmp_path / "data") is config
    assert not (tmp_path / "data").exists()


def test_what_only_a_simulation_obeys_is_refused(tmp_path: Path) -> None:
    config = load_scenario("hospitals-icd10", ["data.max_per_class=20", "simulation.dropout=0.5", "server.quorum=1"])
    with pytest.raises(UserError, match=r"simulation.dropout is for simulations; .* leave it out"):
        with_files(config, tmp_path)
