"""The recipe for DeepXDE, with the real package. In processes of their own: importing it sets torch's defaults."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "deepxde_burgers.py"
# DeepXDE's own training on the sum, and the recipe with a surgery that is the sum, from the same start.
SAME_AS_DEEPXDE = """
import copy
import deepxde_burgers as recipe
import deepxde as dde, torch, gradsurg

dde.config.set_random_seed(0)
net = dde.nn.FNN([2, 20, 20, 1], "tanh", "Glorot normal")
data, ends = recipe.burgers(100), []
for wrapped in (False, True):
    mine = copy.deepcopy(net)
    optimizer = torch.optim.Adam(mine.parameters(), lr=1e-3)
    if wrapped:
        optimizer = gradsurg.wrap(optimizer, surgery="sum", normalize="none", guarantee="none")
    model = dde.Model(data, mine)
    model.compile(optimizer)
    assert callable(model.train_step)  # what the recipe replaces
    if wrapped:
        recipe.losses_apart(model, optimizer, recipe.NAMES)
    model.train(iterations=10)
    ends.append(torch.cat([p.detach().reshape(-1) for p in mine.parameters()]))
start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
moved = (ends[0] - start).norm()
assert moved > 0.01, moved
assert (ends[0] - ends[1]).norm() <= 1e-4 * moved, (ends[0] - ends[1]).norm() / moved
"""


def run(*command):
    path = os.pathsep.join([str(ROOT), str(EXAMPLE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "DDE_BACKEND": "pytorch", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_recipe_runs_and_its_report_names_the_losses():
    printed = run(str(EXAMPLE), "--iterations", "20", "--points", "100")
    for name in ("equation", "boundary", "start"):
        row = re.search(rf"^ *{name} .*?([+-][\d.]+)$", printed, flags=re.MULTILINE)
        assert float(row[1]) >= 0, printed


def test_with_the_sum_the_recipe_trains_as_deepxde_does():
    run("-c", SAME_AS_DEEPXDE)


def test_the_recipe_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 80
