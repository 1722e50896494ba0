"""Ways to even loads: a loss on the scores, a bias that follows the loads, and a bias that would have evened them."""

import torch
from torch import Tensor

from farspan.models.ffns.router import RowSums


def even(scores: Tensor, given: Tensor, over: RowSums, active: int) -> Tensor:
    """E · Σ f_e · P_e times labels: this rank's part of Switch's loss (Fedus et al., 2022), which is 1 a label where
    loads are even.

    scores: R E, sums over this rank's tokens; given: R E or 1 E, tokens that chose each expert among those of `over`.
    f has no gradient and counts all ranks' tokens, scores only this one's: so the parts sum to the whole.
    """
    share = given / (over.tokens * active).clamp(min=1).unsqueeze(1)
    return given.shape[1] * (over.weight.unsqueeze(1) * share * scores).sum()


def shifted(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """bias + rate · sign(mean load − load) (Wang et al., 2024): E.

    The mean of the change is taken off: adding the same to all experts changes no choice, and where more of them are
    above the mean than below it the biases would wander off until scores are lost in their rounding.
    """
    change = rate * (load.mean() - load).sign()
    return (bias + (change - change.mean()).to(bias.dtype)).to(bias.dtype)


def quantiles(scores: Tensor, bias: Tensor, active: int, places: Tensor | None) -> Tensor:
    """The bias that would have made the loads of these tokens even, times their number: E.

    One round of alternating thresholds: a token's is the first score, with its bias, that it does not choose; an
    expert's new bias is what lifts its T·k/E best scores over those. scores: N E; places: as `Documents` has them,
    below 0 for padding.
    """
    count, experts = scores.shape
    rival = (scores + bias).topk(active + 1, dim=-1).values[:, -1:]
    ahead = scores - rival
    if places is None:
        tokens = torch.full((), count, device=scores.device)
    else:
        there = places.view(-1, 1) >= 0
        ahead = torch.where(there, ahead, -torch.inf)
        tokens = there.sum()
    last = (tokens * active).div(experts, rounding_mode="floor").clamp(max=tokens - 1).clamp(min=0)
    line = ahead.sort(dim=0, descending=True).values.index_select(0, last.view(1)).squeeze(0)
    return torch.where(tokens > 0, -line * tokens, 0.0)
