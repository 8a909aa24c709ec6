"""Rows, sums and gradients of a batch shared by three processes, against a single process with all of it."""

import torch
from distributed_helpers import in_processes

from model.distributed import Share, gathered, own_rows, sharing, summed, whole_size

SIZES = (3, 1, 2)


def batch() -> torch.Tensor:
    return torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def of_the_whole(x: torch.Tensor) -> torch.Tensor:
    """A loss that does not decompose into rows."""
    return (x.logsumexp(dim=0).exp() * torch.arange(4)).sum().sqrt()


def normalised(x: torch.Tensor, count: int) -> torch.Tensor:
    """Rows minus their mean over the whole batch."""
    return x - summed(x.sum(dim=0)) / count


def work(world):
    share = Share(world.rank, SIZES)
    x = share.own(batch().flatten(0, 1)).clone().requires_grad_()
    with sharing(share):
        assert whole_size(len(x)) == 12
        rows = gathered(x)
        flags = gathered(x[:, 0] > 0)
        assert torch.equal(own_rows(rows), x)
        ((normalised(x, 12) ** 3).sum() * share.part).backward()
        local = x.grad.clone()
        x.grad = None
        of_the_whole(gathered(x)).backward()
    assert gathered(x) is x  # outside
    return {"rows": rows.detach(), "flags": flags, "gradient": x.grad, "normalised": local, "mean": share.part}


def test_rows_sums_and_gradients_are_those_of_the_whole_batch():
    found = in_processes(3, work)
    whole = batch().flatten(0, 1).requires_grad_()
    of_the_whole(whole).backward()
    for each in found:
        assert torch.equal(each["rows"], whole)
        assert torch.equal(each["flags"], whole[:, 0] > 0)
    assert torch.allclose(torch.cat([each["gradient"] for each in found]), whole.grad)
    assert [each["mean"] for each in found] == [3 / 6, 1 / 6, 2 / 6]
    whole.grad = None
    parts = torch.tensor(SIZES).repeat_interleave(2 * torch.tensor(SIZES)) / 6
    ((whole - whole.mean(dim=0)) ** 3 * parts[:, None]).sum().backward()
    assert torch.allclose(torch.cat([each["normalised"] for each in found]), whole.grad)


def test_a_single_process_has_the_whole_batch():
    x, share = batch(), Share(0, (6,))
    with sharing(share):
        assert gathered(x) is x and own_rows(x) is x and summed(x) is x and whole_size(6) == 6
    assert share.part == 1.0
