"""FlopCounterMode counts the layer as it counts the same layer in PyTorch's own operations."""

import pytest
import torch
import torch.nn.functional as F
from cases import tensors
from torch.utils.flop_counter import FlopCounterMode

import fastlora

# Which of x, A and B want a gradient.
WANTED = [(x, A, B) for x in (True, False) for A in (True, False) for B in (True, False)]


def flops(function, *arguments, wanted):
    """Of the forward pass and, where something wants a gradient, the backward pass."""
    with FlopCounterMode(display=False) as counter:
        y = function(*arguments)
        if any(wanted):
            torch.autograd.backward(y, [torch.ones_like(part) for part in y])
    return counter.get_total_flops()


def eager(x, weight, A, B):
    return (F.linear(x, weight) + F.linear(F.linear(x, B), A),)


def fused(x, weight, A, B):
    return (fastlora.lora_linear(x, weight, A, B),)


def leaves(wanted, *sizes):
    case = tensors(*sizes, bias=False)
    for tensor, want in zip((case.x, case.A, case.B), wanted, strict=True):
        tensor.requires_grad_(want)
    return case.x, case.weight, case.A, case.B


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("lead", [7, (2, 5), 0])
def test_one_layer(wanted, lead):
    operands = leaves(wanted, lead, 24, 40, 3)
    assert flops(fused, *operands, wanted=wanted) == flops(eager, *operands, wanted=wanted)


def test_the_first_call_of_a_process(monkeypatch):
    """What is counted is registered by it, whatever path it takes."""
    calls = []
    monkeypatch.setattr(fastlora.ops.flops, "register_where_counted", lambda: calls.append(1))
    operands = leaves((True, True, True), 7, 24, 40, 3)
    for path in ("auto", "addmm", "reference"):
        with fastlora.use_path(path):
            flops(fused, *operands, wanted=(True,))
    assert len(calls) == 6
    monkeypatch.setattr(fastlora.ops, "_forward_operator", lambda *arguments: calls.append(arguments[-1]))
    with FlopCounterMode(display=False):
        fastlora.ops.lora_forward(operands[0].detach(), "triton")
    assert calls[6:] == [1, "triton"]


@pytest.mark.parametrize("wanted", WANTED)
def test_a_group(wanted):
    branches = [leaves(wanted, (2, 5), N, 40, R) for N, R in ((24, 3), (8, 5), (8, 2))]
    x = branches[0][0]
    weights, As, Bs = ([branch[i] for branch in branches] for i in (1, 2, 3))

    def grouped(x):
        return fastlora.lora_linear_group(x, weights, As, Bs, [1.0] * 3)

    def apart(x):
        return tuple(eager(x, *branch)[0] for branch in zip(weights, As, Bs, strict=True))

    assert flops(grouped, x, wanted=wanted) == flops(apart, x, wanted=wanted)


def test_a_group_of_which_one_result_is_used():
    branches = [leaves((True, True, True), 6, N, 40, R) for N, R in ((24, 3), (8, 5))]
    x = branches[0][0]
    weights, As, Bs = ([branch[i] for branch in branches] for i in (1, 2, 3))

    def second(x):
        return fastlora.lora_linear_group(x, weights, As, Bs, [1.0] * 2)[1:]

    both = sum(flops(eager, x, *operands[1:], wanted=(False,)) for operands in branches)
    expected = flops(eager, x, *branches[1][1:], wanted=(True,)) - flops(
        eager, x, *branches[1][1:], wanted=(False,)
    )
    assert flops(second, x, wanted=(True,)) == both + expected
