"""Taking and giving back pages: kernels against the specification; see kernel_cases_merge.py.

Dimension letters as in `ops.paged.pages`.
"""

import pytest
import torch
from kernel_cases_decode import BACKEND, DEVICE  # patches Triton

from megatron_dmc.ops.paged import pages
from megatron_dmc.ops.paged.pages import FreePages


def held_pages(num_pages, num_held, seed):
    """A stack with `num_held` allocated pages, each with one to three owners."""
    generator = torch.Generator().manual_seed(seed)
    free = FreePages.of(torch.randperm(num_pages, generator=generator))
    free.state[0] = num_held
    extra = torch.zeros(num_pages, dtype=torch.int32)
    held = free.page_ids[:num_held]
    extra[held] = torch.randint(0, 3, (num_held,), generator=generator, dtype=torch.int32)
    return free, extra, held, generator


@pytest.mark.parametrize("shape", [(1, 5), (3, 300), (4, 64), (2, 0)])
def test_release_equals_the_specification(shape):
    free, extra, held, generator = held_pages(900, 700, seed=shape[1])
    named = held.repeat_interleave(extra[held] + 1)  # once for each owner
    named = named[torch.randperm(len(named), generator=generator)][: shape[0] * shape[1] * 3 // 4]
    wide = torch.full((shape[0], shape[1] + 7), 5, dtype=torch.int32)  # rows of a larger table
    ids = torch.full((shape[0] * shape[1],), -1, dtype=torch.int32)
    ids[torch.randperm(ids.numel(), generator=generator)[: len(named)]] = named
    wide[:, : shape[1]] = ids.view(shape)
    results = []
    for backend in (BACKEND, "torch"):
        stack, state, owners, table = (
            x.clone().to(DEVICE) for x in (free.page_ids, free.state, extra, wide)
        )
        pages.release_pages(table[:, : shape[1]], FreePages(stack, state), owners, backend=backend)
        assert (table[:, : shape[1]] == -1).all() and (table[:, shape[1] :] == 5).all()
        taken, failed = state.tolist()
        assert not failed and taken == 700 - sum(
            int((named == page).sum()) > int(extra[page]) for page in held
        )
        results.append((owners.cpu(), stack[taken:].sort().values.cpu()))
        # what is under the top of the stack stays where it was
        assert torch.equal(stack[700:].cpu(), free.page_ids[700:])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_taken_pages_come_back_and_are_taken_again():
    free = FreePages.of(torch.randperm(40).to(DEVICE))
    extra = torch.zeros(40, dtype=torch.int32, device=DEVICE)
    table = torch.full((3, 2, 8), -1, dtype=torch.int32, device=DEVICE)
    pages.take_for_entries(table, torch.tensor([[9, 0], [16, 4], [1, 20]]).to(DEVICE), 4, free)
    assert (table >= 0).sum(-1).tolist() == [[3, 0], [4, 1], [1, 5]]
    assert table[table >= 0].unique().numel() == 14 == int(free.state[0])
    pages.add_owner(table[1], extra)
    for row, left in ((1, 14), (2, 8)):
        pages.release_pages(table[row][None].flatten(1), free, extra, backend=BACKEND)
        assert free.state.tolist() == [left, 0]
    pages.take_for_entries(table, torch.tensor([[12, 4], [0, 0], [32, 32]]).to(DEVICE), 4, free)
    assert free.state.tolist() == [25, 0]
    assert table[table >= 0].unique().numel() == int((table >= 0).sum()) == 20
