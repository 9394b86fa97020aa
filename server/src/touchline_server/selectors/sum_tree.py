"""A sum tree: weights of which one is drawn in proportion, and changed, in O(log n), vectorised over many at a time.

The proportional tree of prioritised experience replay (Schaul et al. 2016, appendix B.2.1), with 16 children a node, not 2: numpy then
needs few calls for many draws, and a node is two cache lines. The top is one node of up to 4,096 children, searched by bisection.
"""

from __future__ import annotations

import numpy as np

FAN_OUT = 16
"""Children of a node, 2 ** SHIFT."""

SHIFT = 4

MAX_TOP = 4096
"""Most children of the top node."""

BLOCK = 512
"""Nodes in a matrix product. OpenBLAS would start threads for larger ones, which costs more than they gain."""

_ONES = np.ones(FAN_OUT)
_PREFIX = np.triu(np.ones((FAN_OUT, FAN_OUT)))
"""A row of weights times this matrix is the row of their running sums."""
_BELOW_ONE = 1.0 - 2.0**-48
"""Factor that keeps a position below the sum of a node, however that was rounded: 16 additions err by 2**-49 at most."""
_EACH_BYTE, _TOP_BYTE = np.uint64(0x0101010101010101), np.uint64(56)
"""A word of 8 bytes times the first, shifted right by the second, is the sum of its bytes, if that is below 256."""


class SumTree:
    """Weights of at least 0, [size] float32; sums are float64. Not thread-safe.

    Changes of weights are cheap. The nodes above them follow when a sum is next needed, for all changes together. A weight takes
    4.6 bytes.

    Args:
        size: number of weights, at least 1; all of them are 0 at first.
    """

    def __init__(self, size: int) -> None:
        self._levels: list[np.ndarray] = []
        """Levels from the weights, float32, to the children of the top, float64, [nodes, FAN_OUT] each. A node's sum is an element of the
        next level."""
        count = size
        while True:
            nodes = -(-count // FAN_OUT)
            # calloc: pages of the ring that were never written take no memory.
            self._levels.append(np.zeros((nodes, FAN_OUT), dtype=np.float64 if self._levels else np.float32))
            if nodes * FAN_OUT <= MAX_TOP:
                break
            count = nodes
        self.weights = self._levels[0].reshape(-1)
        """The weights, and zeros up to a multiple of FAN_OUT: a view, to be changed only by this class."""
        self._top = np.zeros(self._levels[-1].size + 1)
        """Sum of the children of the top before each one, and of all of them."""
        self._changed: list[np.ndarray] = []
        """Nodes of the lowest level whose weights have changed, with repetitions."""
        self._changes = 0

    @property
    def total(self) -> float:
        """Sum of all weights."""
        self._settle()
        return float(self._top[-1])

    def fill(self, begin: int, end: int, weight: float) -> None:
        """Sets the weights ``begin`` to ``end`` - 1 to one value."""
        if begin < end:
            self.weights[begin:end] = weight
            self._note(np.arange(begin >> SHIFT, ((end - 1) >> SHIFT) + 1))

    def assign(self, places: np.ndarray, weights: np.ndarray) -> None:
        """Sets weights, [n] each, in any order; of a place that is repeated, all weights must be the same."""
        self.weights[places] = weights
        self._note(places >> SHIFT)

    def assign_runs(self, places: np.ndarray, weights: np.ndarray) -> None:
        """Sets runs of weights, in any order; of a place that is in several, all weights must be the same.

        Args:
            places: [length, n] int64: each run along the first axis. A run may go on at place 0 behind the last place.
            weights: [length, n], their weights.
        """
        self.weights[places] = weights
        first, last = places[0], places[-1]
        if len(places) > FAN_OUT or (last < first).any():
            self._note((places >> SHIFT).reshape(-1))
            return
        # All of a run lies in the nodes of its ends, which are mostly the same.
        first, last = first >> SHIFT, last >> SHIFT
        self._note(first)
        self._note(last[last != first])

    def load(self, weights: np.ndarray) -> None:
        """Sets all weights, [size]."""
        self.weights[: len(weights)] = weights
        self._rebuild()

    def find(self, fractions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns where fractions of the total lie: the place i of the first weight such that weights 0 to i sum to more.

        Args:
            fractions: [n] float64, in [0, 1). The total must be above 0.

        Returns:
            [n] int64: places with a weight above 0, and [n] float64: their weights.
        """
        self._settle()
        # In ascending order of 1/65536: bisection by unsorted numbers is four times as slow, as no branch of it can be predicted. Sorting
        # 16 bits takes a tenth of the time of sorting the fractions.
        order = (fractions * 65536.0).astype(np.uint16).argsort(kind="stable")
        position = fractions.take(order)
        position *= self._top[-1]
        np.minimum(position, self._top[-1] * _BELOW_ONE, out=position)
        # The top's sums rise strictly exactly at children above 0, so the first sum above the position is that of such a child.
        node = np.searchsorted(self._top[1:], position, side="right")
        position -= self._top.take(node)
        weight = self._levels[-1].reshape(-1).take(node)
        for level in self._levels[-2::-1]:
            node, weight = _descend(level, node, position)
        found, weights = np.empty_like(node), np.empty_like(position)
        found[order], weights[order] = node, weight
        return found, weights

    def _note(self, nodes: np.ndarray) -> None:
        self._changed.append(nodes)
        self._changes += len(nodes)
        if self._changes > len(self._levels[0]):
            self._rebuild()

    def _rebuild(self) -> None:
        """Sums up every node."""
        for level, above in zip(self._levels, self._levels[1:], strict=False):
            above.reshape(-1)[: len(level)] = _sums(level)
        self._finish()

    def _settle(self) -> None:
        """Sums up the nodes above changed weights."""
        if not self._changed:
            return
        nodes = np.concatenate(self._changed)
        for level, above in zip(self._levels, self._levels[1:], strict=False):
            sums = above.reshape(-1)
            if len(nodes) < len(level):
                # A node that is repeated is summed up again: that costs less than to find out.
                sums[nodes] = _sums(level.take(nodes, axis=0))
            else:
                sums[: len(level)] = _sums(level)
            nodes >>= SHIFT
        self._finish()

    def _finish(self) -> None:
        self._changed.clear()
        self._changes = 0
        np.cumsum(self._levels[-1].reshape(-1), dtype=np.float64, out=self._top[1:])


def _sums(nodes: np.ndarray) -> np.ndarray:
    """Returns the sum of each node: [n, FAN_OUT] to [n] float64."""
    sums = np.empty(len(nodes))
    for begin in range(0, len(nodes), BLOCK):
        np.dot(nodes[begin : begin + BLOCK].astype(np.float64, copy=False), _ONES, out=sums[begin : begin + BLOCK])
    return sums


def _descend(level: np.ndarray, nodes: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the children in which positions lie, and makes each position one within its child.

    Args:
        level: [nodes of the level, FAN_OUT].
        nodes: [n] int64: the node of each position.
        position: [n] float64, in [0, sum of the node); changed in place.

    Returns:
        [n] int64: elements of the level, and [n] float64: their values.
    """
    weights = level.take(nodes, axis=0).astype(np.float64, copy=False)
    sums = np.empty_like(weights)
    for begin in range(0, len(nodes), BLOCK):
        np.matmul(weights[begin : begin + BLOCK], _PREFIX, out=sums[begin : begin + BLOCK])
    np.minimum(position, sums[:, -1] * _BELOW_ONE, out=position)
    # The number of running sums up to the position is the number of the child.
    below = (sums <= position[:, None]).view(np.uint64)
    child = ((below[:, 0] + below[:, 1]) * _EACH_BYTE >> _TOP_BYTE).view(np.int64)
    places = np.arange(0, weights.size, FAN_OUT) + child
    chosen = weights.reshape(-1).take(places)
    if not chosen.all():
        # Rounding that differs between two running sums has hit a child of weight 0: take the heaviest instead.
        empty = np.flatnonzero(chosen == 0)
        child[empty] = weights[empty].argmax(axis=1)
        places = np.arange(0, weights.size, FAN_OUT) + child
        chosen = weights.reshape(-1).take(places)
    # The sum of the children before: rounded, so that the rest may be a little below 0.
    position -= sums.reshape(-1).take(places) - chosen
    np.maximum(position, 0.0, out=position)
    return (nodes << SHIFT) + child, chosen
