"""What holds for any network and budget: counts, outputs, training, files and other processes."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from planned_models import trained
from torch import Tensor, nn

from spin_kernels import search
from spin_kernels.search import BoundModels, Plan

BUDGETS = (1.5, "50%", 0.1, 0.03, 1)  # the last is too small for all, and names the least
PROGRAM = """
import sys
from pathlib import Path

import torch
from {module} import {function}

from spin_kernels import search

for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    given = torch.load(file)
    net = search.apply({function}(), search.Plan.load(file.with_suffix(".json")))
    net.load_state_dict(given["state"])
    with torch.no_grad():
        found = [model(given["x"]) for model in (net.eval() if isinstance(net, search.BoundModels) else [net.eval()])]
    for y, expected in zip(found, given["y"], strict=True):
        torch.testing.assert_close(y, expected)
    print(file.stem, sum(p.numel() for p in net.parameters()))
"""


def outputs(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [model(x) for model in (net if isinstance(net, BoundModels) else [net])]


def check_budgets(build: Callable[[], nn.Module | list[nn.Module]], size: int, folder: Path) -> None:
    """Plans, applies, trains a step, saves and loads at five budgets, the least among them, and in a new process.

    Args:
        build: a function of a module in tests, that makes one or several models for images of this size.
    """
    models = build()
    listed = models if isinstance(models, list) else [models]
    own, counts = sum(map(trained, listed)), {}
    for n, budget in enumerate(BUDGETS):
        try:
            plan = search.plan(models, budget)
        except ValueError as error:
            (least,) = re.findall(r"^budget: expected at least ([\d,]+) parameters ", str(error))
            least = int(least.replace(",", ""))
            assert least > (budget * own if isinstance(budget, float) else budget)
            with pytest.raises(ValueError, match=f"at least {least:,} "):
                search.plan(models, least - 1)
            plan = search.plan(models, least)
        net = search.apply(models, plan)
        assert trained(net) == plan.parameters <= plan.budget
        if plan.budget <= own:  # what no further template can be bought with is left, while blocks are cut to fit
            assert plan.spent >= (0.99 if plan.blocks else 0.8) * plan.budget
        x, optimizer = torch.randn(4, 3, size, size), torch.optim.SGD(net.parameters(), lr=1e-3)
        loss = sum(nn.functional.cross_entropy(y, torch.arange(4)) for y in outputs(net.train(), x))
        loss.backward()
        assert torch.isfinite(loss)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        before = net.bank.templates.detach().clone()
        optimizer.step()
        assert not torch.equal(before, net.bank.templates)
        plan.save(folder / f"{n}.json")
        assert Plan.load(folder / f"{n}.json") == plan
        with torch.no_grad():
            y = outputs(net.eval(), x)
            assert all(torch.isfinite(found).all() for found in y)
            other = search.apply(models, plan).eval()
            assert not torch.equal(outputs(other, x)[0], y[0])
            other.load_state_dict(net.state_dict())
            assert all(map(torch.equal, outputs(other, x), y))
        torch.save({"state": net.state_dict(), "x": x, "y": y}, folder / f"{n}.pt")
        counts[str(n)] = sum(p.numel() for p in net.parameters())
    tests = Path(__file__).parent
    program = f"import sys; sys.path.insert(0, {str(tests)!r})\n" + PROGRAM.format(
        module=build.__module__, function=build.__qualname__
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert dict(line.split() for line in done.stdout.splitlines()) == {n: str(count) for n, count in counts.items()}
