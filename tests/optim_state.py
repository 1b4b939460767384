"""What a step may change, for the tests of the optimizer."""

import torch


def bits(optimizer, param):
    """Copies of the parameter and of all its state."""
    return [param.detach().clone(), *(torch.as_tensor(x).clone() for x in optimizer.state[param].values())]
