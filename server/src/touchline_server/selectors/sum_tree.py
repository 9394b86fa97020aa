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
"""Nodes looked at together. OpenBLAS would start threads for larger products, which costs more than they gain."""

_ONES = np.ones(FAN_OUT)
_PREFIX = np.triu(np.ones((FAN_OUT, FAN_OUT)))
"""A row of weights times this matrix is the row of their running sums."""
_BELOW_ONE = 1.0 - 2.0**-48
"""Factor that keeps a position below the sum of a node, however that was rounded: 16 additions err by 2**-49 at most."""


class SumTree:
    """Weights of at least 0, [size] float64. Not thread-safe.

    Changes of weights are cheap. The nodes above them follow when a sum is next needed, for all changes together. A weight takes
    8.6 bytes.

    Args:
        size: number of weights, at least 1; all of them are 0 at first.
    """

    def __init__(self, size: int) -> None:
        self._levels: list[np.ndarray] = []
        """Levels from the weights to the children of the top, [nodes, FAN_OUT] each; a node's sum is an element of the next level."""
        count = size
        while True:
            nodes = -(-count // FAN_OUT)
            # calloc: pages of the ring that were never written take no memory.
            self._levels.append(np.zeros((nodes, FAN_OUT)))
            if nodes * FAN_OUT <= MAX_TOP:
                break
            count = nodes
        self.weights = self._levels[0].reshape(-1)
        """The weights, and zeros up to a multiple of FAN_OUT: a view, to be changed only by this class."""
        self._top = np.zeros(self._levels[-1].size)
        """Running sums of the children of the top."""
        self._changed: list[np.ndarray] = []
        """Nodes of the lowest level whose weights have changed, with repetitions."""
        self._changes = 0
        self._marks = np.zeros(len(self._levels[0]), dtype=bool)

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

    def assign(self, index: np.ndarray, weights: np.ndarray) -> None:
        """Sets the weights of any number of places, [n] int64, in any order; if one is repeated, the last counts."""
        self.weights[index] = weights
        self._note(index >> SHIFT)

    def load(self, weights: np.ndarray) -> None:
        """Sets all weights, [size] float64."""
        self.weights[: len(weights)] = weights
        self._rebuild()

    def find(self, fractions: np.ndarray) -> np.ndarray:
        """Returns where fractions of the total lie: the place i of the first weight such that weights 0 to i sum to more.

        Args:
            fractions: [n] float64, in [0, 1). The total must be above 0.

        Returns:
            [n] int64: places with a weight above 0.
        """
        self._settle()
        position = fractions * self._top[-1]
        np.minimum(position, self._top[-1] * _BELOW_ONE, out=position)
        # The top's sums rise strictly exactly at children above 0, so the first sum above the position is that of such a child.
        found = np.searchsorted(self._top, position, side="right")
        position -= np.where(found, self._top[found - 1], 0.0)
        for begin in range(0, len(found), BLOCK):
            block = slice(begin, begin + BLOCK)
            for level in self._levels[-2::-1]:
                found[block] = _descend(level, found[block], position[block])
        return found

    def _note(self, nodes: np.ndarray) -> None:
        self._changed.append(nodes)
        self._changes += len(nodes)
        if self._changes > len(self._levels[0]):
            self._rebuild()

    def _rebuild(self) -> None:
        """Sums up every node."""
        for level, above in zip(self._levels, self._levels[1:], strict=False):
            above.reshape(-1)[: len(level)] = level.sum(axis=1)
        self._finish()

    def _settle(self) -> None:
        """Sums up the nodes above changed weights."""
        if not self._changed:
            return
        nodes = self._distinct(np.concatenate(self._changed))
        for level, above in zip(self._levels, self._levels[1:], strict=False):
            flat = above.reshape(-1)
            for begin in range(0, len(nodes), BLOCK):
                block = nodes[begin : begin + BLOCK]
                flat[block] = level.take(block, axis=0) @ _ONES
            nodes = self._distinct(nodes >> SHIFT)
        self._finish()

    def _distinct(self, nodes: np.ndarray) -> np.ndarray:
        """Returns each number once, ascending."""
        if len(nodes) < len(self._marks) >> 8:
            return np.unique(nodes)
        # Marks are looked through at 16 bytes a cycle; a sort of many numbers takes longer.
        self._marks[nodes] = True
        found = np.flatnonzero(self._marks)
        self._marks[found] = False
        return found

    def _finish(self) -> None:
        self._changed.clear()
        self._changes = 0
        np.cumsum(self._levels[-1].reshape(-1), out=self._top)


def _descend(level: np.ndarray, nodes: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Returns the children in which positions lie, and makes each position one within its child.

    Args:
        level: [nodes of the level, FAN_OUT] float64.
        nodes: [n] int64: the node of each position.
        position: [n] float64, in [0, sum of the node); changed in place.

    Returns:
        [n] int64: elements of the level.
    """
    rows = np.arange(len(nodes))
    weights = level.take(nodes, axis=0)
    sums = weights @ _PREFIX
    np.minimum(position, sums[:, -1] * _BELOW_ONE, out=position)
    # The number of running sums up to the position is the number of the child. As floats: a product counts faster than a reduction.
    child = (np.less_equal(sums, position[:, None], out=np.empty_like(sums)) @ _ONES).astype(np.int64)
    chosen = weights[rows, child]
    if not chosen.all():
        # Rounding that differs between two running sums has hit a child of weight 0: take the heaviest instead.
        empty = np.flatnonzero(chosen == 0)
        child[empty] = weights[empty].argmax(axis=1)
        chosen = weights[rows, child]
    # The sum of the children before: rounded, so that the rest may be a little below 0.
    position -= sums[rows, child] - chosen
    np.maximum(position, 0.0, out=position)
    return (nodes << SHIFT) + child
