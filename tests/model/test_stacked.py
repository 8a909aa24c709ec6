"""Parameters that are trained as one tensor: views of it, gradients of it, and their own memory afterwards."""

import copy

import torch
from torch import nn

from model.stacked import Stack, release, whole_of


def test_a_stack_has_the_values_and_gradients_of_its_parts():
    first, second = nn.Parameter(torch.tensor([[1.0, 2.0]])), nn.Parameter(torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    stack = Stack([first, second])
    assert stack.whole.tolist() == [[1, 2], [3, 4], [5, 6]]
    whole = whole_of([first, second])
    assert whole is stack.whole and whole_of([first]) is None
    (2 * whole).sum().backward()
    (3 * second).sum().backward()
    stack.collect()
    assert stack.whole.grad is not None and first.grad is second.grad is None
    assert stack.whole.grad.tolist() == [[2, 2], [5, 5], [5, 5]]
    with torch.no_grad():
        stack.whole -= stack.whole.grad
    assert first.tolist() == [[-1, 0]] and second.tolist() == [[-2, -1], [0, 1]]
    assert whole_of(copy.deepcopy([first, second])) is None


def test_a_parameter_that_leaves_its_stack_keeps_its_values_and_no_memory_of_the_others():
    stayed, left = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.zeros(4, 3))
    Stack([stayed, left])
    assert stayed.untyped_storage().nbytes() == 6 * 3 * 4
    release(stayed)
    assert stayed.untyped_storage().nbytes() == 2 * 3 * 4 and torch.equal(stayed, torch.ones(2, 3))
    assert whole_of([stayed, left]) is None
    release(stayed)  # of one that is in no stack
