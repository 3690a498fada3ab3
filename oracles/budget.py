"""A budget: each kept entry has a price (FLOPs, bytes, seconds), and the sum of prices is limited."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array
from torch import Tensor

from maskopt.checks import matrix, real, shown
from maskopt.errors import MaskoptError
from maskopt.exact import integers, summable
from maskopt.oracles.base import Index, MaskSet, Shape

__all__ = ["Budget"]

_SMALL = 20  # candidates up to which the oracle is exact: at most 2^20 subsets, in practice a few hundred
_ROUNDS = 64  # passes that fill the rest of the budget


class Budget(MaskSet):
    """Masks whose kept entries cost at most a budget in total: sum_ij price_ij m_ij <= budget.

    Minimising a cost over it is a knapsack problem. With up to 20 priced entries, or with equal prices, `lmo` is exact.
    Otherwise it fills the budget in the order of cost per price; its error is at most the cost of one entry, the first
    that exceeds the budget. `lmo_bound` is the bound of the linear relaxation, so the difference from it bounds the
    error of each call. The faces of the hull are not known: the set has no `inface`.

    Parameters
    ----------
    price : Tensor
        What keeping an entry costs, finite, >= 0, shape (rows, d) of the weights this set is for.
    budget : float
        Finite, >= 0. Entries costlier than the budget are never kept.

    Raises
    ------
    MaskoptError
        If prices or the budget are negative, infinite or NaN, or if prices are no matrix.

    References
    ----------
    Greedy rule and linear relaxation: Dantzig, Discrete-variable extremum problems, Operations Research 5, 1957.
    Exact for few entries: Nemhauser and Ullmann, Discrete dynamic programming and capital allocation, Management
    Science 15, 1969.

    Examples
    --------
    A budget of 4 affords either the entry of price 3 or the two of price 2, which are better together:

    >>> import torch
    >>> from maskopt.oracles import Budget
    >>> masks = Budget(torch.tensor([[3.0, 2.0, 2.0]]), 4.0)
    >>> masks.lmo_mask(torch.tensor([[-4.0, -3.0, -2.0]])).tolist()
    [[False, True, True]]
    """

    def __init__(self, price: Tensor, budget: float) -> None:
        price = matrix("matrix of prices", price)
        if not real(0).fits(budget):
            raise MaskoptError(f"The budget must be finite and not negative; got {shown(budget)}.")
        if price.ndim != 2 or price.numel() == 0:
            raise MaskoptError(f"Prices are a matrix with one entry per weight; got shape {tuple(price.shape)}.")
        self.price = price.double()
        self.budget = float(budget)
        if not bool((self.price >= 0).all()) or bool(self.price.isinf().any()):
            raise MaskoptError("Prices must be finite and not negative.")
        able = self.price[(self.price > 0) & (self.price <= self.budget)]
        self.exact = len(able) <= _SMALL or float(able.min()) == float(able.max())

    def __repr__(self) -> str:
        rows, columns = self.price.shape
        return f"Budget({self.budget:g} of {float(self.price.sum()):g}, weight {rows} x {columns})"

    def check(self, shape: Shape) -> None:
        if tuple(shape) != tuple(self.price.shape):
            raise MaskoptError(
                f"{self} has prices for a weight of shape {tuple(self.price.shape)}; got {tuple(shape)}."
            )

    def rows(self, index: Index, shape: Shape) -> Budget:
        return self  # one row block: all rows

    def contains(self, mask: Tensor) -> bool:
        self.check(mask.shape)
        return mask.dtype == torch.bool and self._affordable(self.price[mask.to(self.price.device)].tolist())

    def _affordable(self, prices: list[float]) -> bool:
        # The sum of floats is rounded once, so its sign is exact.
        try:
            return math.fsum([*prices, -self.budget]) <= 0.0
        except OverflowError:
            return sum(map(Fraction, prices)) <= Fraction(self.budget)

    def lmo(self, cost: Tensor) -> Tensor:
        self.check(cost.shape)
        flat, price = cost.flatten().double(), self.price.flatten().to(cost.device)
        chosen = ((flat < 0) & (price == 0)).double()
        wanted = ((flat < 0) & (price > 0) & (price <= self.budget)).nonzero().flatten()
        # Powers of two keep quotients inside the float range; a cost of minus infinity outweighs all others.
        worth, price = -flat[wanted], price[wanted]
        worth = torch.where(worth.isinf(), 2.0**200, _scaled(torch.where(worth.isinf(), 0.0, worth)))
        # By worth per price, then by worth: exact where all prices are equal.
        order = (-worth).argsort(stable=True)
        order = order[(-worth[order] / _scaled(price[order])).argsort(stable=True)]
        wanted, worth, price = wanted[order], worth[order], price[order]
        take = self._filled(price)
        if 0 < len(wanted) <= _SMALL:
            whole = torch.cat((price, price.new_tensor([self.budget])))
            sure = bool(summable(worth.unsqueeze(0)) & summable(whole.unsqueeze(0)))
            take = self._best(worth, price, float(worth[take].sum())) if sure else self._exactly(worth, price, take)
        chosen[wanted[take]] = 1.0
        return chosen.to(cost.dtype).view(cost.shape)

    def _filled(self, price: Tensor) -> Tensor:
        """Take entries in the given order until the budget runs out, then smaller ones that still fit."""
        if len(price) == 0:
            return torch.zeros_like(price, dtype=torch.bool)
        budget = self.budget
        if budget > 2.0**900:  # sums of prices must not overflow; tiny ones are rounded up
            price, budget = (price * 2.0**-140).clamp_min(2.0**-1000), budget * 2.0**-140
        whole_price, highest = float(price.sum()), float(price.max())
        budget = min(budget, 2.0 * whole_price)
        # Multiples of this unit add up exactly; others may not use the last bits of the budget.
        unit = math.ldexp(1.0, math.frexp(whole_price)[1] - 52)
        if float(price.min()) == highest:
            left = highest * (Fraction(budget) // Fraction(highest) + 0.5)
        elif bool((price.remainder(unit) == 0).all()):
            left = math.floor(budget / unit) * unit
        else:
            left = budget * (1.0 - len(price) * 2.0**-51)
        taken = torch.zeros_like(price, dtype=torch.bool)
        for _ in range(_ROUNDS):
            rest = (~taken & (price <= left)).nonzero().flatten()
            if len(rest) == 0:
                break
            total = price[rest].cumsum(0)
            fits = int((total <= left).sum())
            taken[rest[:fits]] = True
            left -= float(total[fits - 1]) if fits else 0.0
        return taken

    def _best(self, worth: Tensor, price: Tensor, known: float) -> Tensor:
        """Return the subset of a few entries of largest total worth within the budget, as a boolean vector.

        The method of Nemhauser and Ullmann (1969): all undominated pairs of price and worth are kept, except those that
        the linear relaxation shows to stay below the known worth. Of equal worth the lower price wins. Entries come in
        falling order of worth per price; sums of worths and of prices have to be exact in float64.
        """
        values, prices = worth.cpu().numpy(), price.cpu().numpy()
        rates = np.append(values / prices, 0.0)
        slack = 1e-12 * self.budget  # for the rounding of sums; the subset found is tested exactly
        total, value, bits = np.zeros(1), np.zeros(1), np.zeros(1, dtype=np.int64)
        for i in range(len(values)):
            fits = total + prices[i] <= self.budget + slack
            total = np.concatenate((total, total[fits] + prices[i]))
            value = np.concatenate((value, value[fits] + values[i]))
            bits = np.concatenate((bits, bits[fits] | 1 << i))
            hopeful = value + (self.budget + slack - total) * rates[i + 1] >= known * (1.0 - 1e-12)
            total, value, bits = total[hopeful], value[hopeful], bits[hopeful]
            order = np.lexsort((bits, -value, total))
            total, value, bits = total[order], value[order], bits[order]
            better = np.append(True, value[1:] > np.maximum.accumulate(value)[:-1])
            total, value, bits = total[better], value[better], bits[better]
        for subset in bits[::-1].tolist():  # worth falls
            taken = [bool(subset >> i & 1) for i in range(len(values))]
            if self._affordable(prices[taken].tolist()):
                break
        return torch.tensor(taken, dtype=torch.bool, device=worth.device)

    def _exactly(self, worth: Tensor, price: Tensor, known: Tensor) -> Tensor:
        """Return what `_best` returns, computed in integers: for costs or prices of very different sizes."""
        values = integers(worth.cpu().numpy())[0].tolist()
        pair, _ = integers(torch.cat((price.cpu(), torch.tensor([self.budget], dtype=torch.float64))).numpy())
        *prices, budget = pair.tolist()
        bar = sum(value for value, taken in zip(values, known.tolist(), strict=True) if taken)
        # Entries with equal quotients in float64 may be out of order.
        order = sorted(range(len(values)), key=lambda i: Fraction(-values[i], prices[i]))
        kept = [(0, 0, 0)]  # price, negative worth, entries
        for place, i in enumerate(order):
            more = [(p + prices[i], w - values[i], b | 1 << i) for p, w, b in kept if p + prices[i] <= budget]
            rate = (values[order[place + 1]], prices[order[place + 1]]) if place + 1 < len(order) else (0, 1)
            best, hopeful = 1, []
            for p, w, b in sorted(kept + more):
                if w < best and (-w - bar) * rate[1] + (budget - p) * rate[0] >= 0:
                    hopeful.append((p, w, b))
                    best = w
            kept = hopeful
        taken = min(kept, key=lambda one: (one[1], one[0]))[2]
        return torch.tensor([bool(taken >> i & 1) for i in range(len(values))], dtype=torch.bool, device=worth.device)

    def lmo_bound(self, cost: Tensor) -> Tensor:
        """Return a proven lower bound on the cost of any mask, float64, shape (1,); tight for exact sets.

        Parameters
        ----------
        cost : Tensor
            Finite, shape (rows, d).
        """
        if self.exact:
            return super().lmo_bound(cost)
        flat, price = cost.flatten().double(), self.price.flatten().to(cost.device)
        flat = torch.where(price <= self.budget, flat, 0.0)
        # The multiplier of the budget in the linear relaxation; any nonnegative one gives a bound (weak duality).
        wanted = ((flat < 0) & (price > 0)).nonzero().flatten()
        rates, order = (-flat[wanted] / price[wanted]).sort(descending=True)
        over = (price[wanted[order]].cumsum(0) > self.budget).nonzero().flatten()
        rate = float(rates[over[0]]) if len(over) else 0.0
        rate = rate if rate * float(price.max()) < math.inf else 0.0
        reduced = (flat + rate * price).clamp_max(0.0)
        bound = float(reduced.sum()) - rate * self.budget
        size = float(((flat.abs() + rate * price) * (reduced < 0)).sum()) + rate * self.budget
        return torch.tensor([bound - size * (len(flat) + 8) * 2.0**-53], dtype=torch.float64, device=cost.device)

    def center(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a point in the relative interior of the hull.

        Where the budget binds, the affordable entries fit into at most 1 + 2 total / budget bags of one budget each,
        because first fit leaves at most one bag less than half full. The mean of these bags is in the hull, and every
        point strictly between the mean and zero is in its relative interior.
        """
        self.check(shape)
        able = self.price <= self.budget
        total = float(self.price[able].sum())
        fraction = 0.5 if total <= self.budget else 1.0 / (2.0 + 2.0 * total / self.budget)
        free = self.price == 0
        return (0.5 * free.double() + fraction * (able & ~free).double()).to(device=device, dtype=dtype)

    def milp_constraints(self, shape: Shape) -> LinearConstraint:
        self.check(shape)
        return LinearConstraint(csr_array(self.price.flatten().cpu().numpy()[None]), -np.inf, self.budget)


def _scaled(values: Tensor) -> Tensor:
    """Multiply positive finite numbers by the power of two that brings the largest near one."""
    if not len(values):
        return values
    by = -torch.frexp(values.amax()).exponent
    return torch.ldexp(torch.ldexp(values, by // 2), by - by // 2)
