"""Layer taps: what a head reads of the states between the target's layers, collected while a pass computes them.

A head joins the states of several layers by one matrix. The matrix is applied layer by layer, so a long prompt needs
one buffer of the head's width instead of one for each layer.
"""

from collections.abc import Callable, Sequence

from torch import Tensor


class LayerTaps:
    """Adds up projections of the states that enter chosen layers.

    Args:
        layers: index of the layer that each part of the sum enters; the number of layers means the last layer's
            output, before the last norm. Ascending.
        width: numbers of the sum for each row.
        project: function from the index of a part and states [n, hidden] to the part of the sum, [n, width].
        chunk_rows: rows that are projected at a time.
    """

    def __init__(
        self, layers: Sequence[int], width: int, project: Callable[[int, Tensor], Tensor], chunk_rows: int
    ) -> None:
        self.layers = tuple(layers)
        self._width = width
        self._project = project
        self._chunk_rows = chunk_rows
        self._sums: Tensor | None = None
        self._num_parts = 0

    def begin(self) -> None:
        """Drop what an earlier pass has left: a pass begins, or has failed."""
        self._sums, self._num_parts = None, 0

    def enter(self, layer: int, states: Tensor) -> None:
        """Add the parts of one layer.

        Args:
            layer: index of the layer.
            states: states that enter the layer, [1, rows, hidden]; only read, because a pass may overwrite them.
        """
        for part, chosen in enumerate(self.layers):
            if chosen != layer:
                continue
            (rows,) = states
            if self._sums is None:
                self._sums = states.new_zeros(len(rows), self._width)
            for sums, chunk in zip(self._sums.split(self._chunk_rows), rows.split(self._chunk_rows), strict=True):
                sums.add_(self._project(part, chunk))
            self._num_parts += 1

    def take(self) -> Tensor:
        """Return the sums of the last pass, [rows, width], and let go of them."""
        assert self._sums is not None and self._num_parts == len(self.layers), "a whole pass"
        sums = self._sums
        self.begin()
        return sums
