"""Pass times when layers arrive over a link while others are computed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LinkQueue:
    """Pass times when layers arrive over a link, as the average of many steps.

    Attributes:
        num_layers: number of the target's layers.
        num_linked: number of layers that cross the link.
        arrival_s: seconds of the link for one layer.
        slots: number of staging buffers.
    """

    num_layers: int
    num_linked: int
    arrival_s: float
    slots: int

    def computed_s(self, layer_s: float, outside_s: float) -> float:
        """Return the pass time if compute-bound: all layers plus the exposed wait for the first streamed one.

        Resident layers come before streamed ones, so some are computed before the first streamed one is needed.

        Args:
            layer_s: seconds to compute one layer.
            outside_s: seconds of a step without its pass; slots fill during this time.
        """
        if not self.num_linked:
            return self.num_layers * layer_s
        front_s = layer_s * max(self.num_layers / self.num_linked - 1, 0.0)
        waiting_s = max(self.arrival_s - min(outside_s, self.arrival_s) - front_s, 0.0)
        return self.num_layers * layer_s + waiting_s

    def linked_s(self, layer_s: float, outside_s: float) -> float:
        """Return the pass time if link-bound: all arrivals without a pause, then computing the last layer.

        Args:
            layer_s: seconds to compute one layer.
            outside_s: seconds of a step without its pass; slots fill during this time.
        """
        if not self.num_linked:
            return 0.0
        ahead_s = min(outside_s, min(self.slots, self.num_linked) * self.arrival_s)
        return self.num_linked * self.arrival_s - ahead_s + layer_s
