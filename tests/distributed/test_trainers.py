"""Lightning's and the Hugging Face Trainer, and Accelerate, in two processes: what a plain loop does in one.

All accumulate, clip and shuffle as they would for anybody; they run one after the other in the same two processes,
because importing them is most of the time that it takes.
"""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

from tests.distributed import jobs_trainers, nets

ROOT = Path(__file__).parents[2]
RANKS = 2

pytestmark = pytest.mark.slow  # 25 s of CPU


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the ranks left."""
    folder = tmp_path_factory.mktemp("trainers")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run(
        [*command, jobs_trainers.__file__, str(folder)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=jobs_trainers.TIMEOUT + 20,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("trainer", jobs_trainers.TRAINERS)
def test_two_processes_are_one_loop(folder, trainer):
    results = [torch.load(folder / f"{trainer}-{rank}.pt") for rank in range(RANKS)]
    nets.equal_everywhere([result["state"] for result in results])
    seen = [list(chain(*parts)) for parts in zip(*(result["seen"] for result in results), strict=True)]
    assert len(seen) == nets.STEPS * jobs_trainers.ACCUMULATED
    assert sorted(chain(*seen)) == list(range(len(jobs_trainers.Rows()))), "the ranks did not share the rows"
    nets.assert_close(results[0]["state"], jobs_trainers.alone(seen))
    for report in (result["report"] for result in results):
        assert report["step"] == nets.STEPS - 1
        assert report["tasks"] == ["task0", "task1", "task2"]
        assert torch.equal(report["cosines"], results[0]["report"]["cosines"])
