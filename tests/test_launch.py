"""`jaxrl_llm launch`: which GPUs its processes see, and what it refuses, with stand-ins for the driver and the trainer."""

import sys

import pytest

from jaxrl_llm import cli, launch


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with four GPUs, on which a process writes down which of them it sees."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: NVIDIA (UUID: GPU-$i)"; echo "  MIG 1g: (UUID: MIG-$i)"; done\n'
    )
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word; do last=$word; done\necho "$CUDA_VISIBLE_DEVICES" > $(dirname $0)/$last\n')
    for stand_in in (driver, python):
        stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(python))
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def seen(n):
        assert launch.run(["run"], n, 0) == 0
        return [(tmp_path / f"distributed.process={i}").read_text().strip() for i in range(n)]

    return seen


@pytest.mark.parametrize(("n", "parts"), [(1, ["0,1,2,3"]), (2, ["0,1", "2,3"]), (4, ["0", "1", "2", "3"])])
def test_every_process_sees_its_share_of_the_gpus(host, n, parts):
    assert host(n) == parts


def test_only_gpus_that_are_visible_are_shared(host, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert host(2) == ["3", "1"]


def test_on_a_cpu_nothing_is_shared(host, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert host(3) == ["", "", ""]


def test_gpus_that_do_not_divide_are_one_line(host, capsys):
    assert cli.main(["launch", "-n", "3", "run"]) == 2
    line = "jaxrl_llm launch: -n 3: 4 GPUs (0,1,2,3), expected a number that divides them, or JAX_PLATFORMS=cpu\n"
    assert capsys.readouterr().err == line
