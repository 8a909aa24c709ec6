"""The time of a step on N devices, from a few measured inputs: the formulas of docs/scaling.md.

A head with E experts on groups of M devices, R rows with k assignments per device, D features, C outputs:

    compute     base + expert * E / M + row * R           all three from steps of one process on one device
    all-to-all  2 * R * k * (D + C) * 2 bytes             there and back, forward and backward, in 16 bits;
                * (1 - 1 / M) / bandwidth + 5 * latency   one of M parts stays on the device
    gates       R * (N - 1) * E * 4 bytes / bandwidth     every process needs the gate of the whole batch
    gradients   2 * 4 bytes * common * (N - 1) / N / bandwidth + 4 * latency, and of the experts over N / M groups

Compute includes what a process does to distribute its experts, such as sorting rows again: the process that is measured
sends its rows to itself.

The default recipe, data parallel, has compute (without the experts' part), gates and gradients, three exchanges in
total. Extraction processes whole batches, and each device receives the features of all devices.

If N exceeds the devices of a node, data between nodes is sent at the bandwidth between nodes. The model assumes no
overlap and even loads; measurements show both effects.
"""

import math
from dataclasses import dataclass

ALL_TO_ALLS = 5  # of a mixture in a step: row counts, rows and outputs, and their gradients
OTHERS = 4  # gates, their sums, gradients, the norm of the experts' gradients
OF_A_RECIPE = 3  # gates, their sums, gradients


@dataclass(frozen=True)
class Network:
    """within, between: bytes per second of a device to others of its node, and to other nodes. latency: seconds of an
    almost empty exchange. node: devices per node."""

    within: float
    between: float
    latency: float
    node: int = 8

    def bandwidth(self, span: int) -> float:
        """The bandwidth of a device in a group of consecutive devices; between nodes it is the slower one."""
        outside = max(0, span - self.node) / max(1, span - 1)
        return 1 / ((1 - outside) / self.within + outside / self.between)

    def summed(self, parameters: float, devices: int, span: int) -> float:
        """Seconds for summing the gradients of this number of parameters over `devices` in a group of `span`."""
        return 2 * 4 * parameters * (devices - 1) / devices / self.bandwidth(span)


@dataclass(frozen=True)
class Step:
    """Seconds of the parts of a step."""

    compute: float
    all_to_all: float = 0.0
    gates: float = 0.0
    gradients: float = 0.0

    @property
    def whole(self) -> float:
        return self.compute + self.all_to_all + self.gates + self.gradients


@dataclass(frozen=True)
class Head:
    """A head with many experts. Seconds: base per step, expert per stored expert, row per row.

    common: number of parameters that every process has; each: number per expert.
    """

    base: float
    expert: float
    row: float
    experts: int
    top_k: int
    features: int
    outputs: int
    common: int
    each: int

    @classmethod
    def fitted(cls, half: float, half_experts: float, quarter: float, rows: int, experts: int, **others) -> "Head":
        """From the seconds of three steps of one process: half of the experts with half of the rows and with all rows,
        and a quarter of the experts with half of the rows.

        Solves base + expert * E / 2 + row * R / 2 = half, and so on. Values that are negative because of noise become
        0.
        """
        row = max(0.0, (half_experts - half) / (rows / 2))
        expert = max(0.0, (half - quarter) / (experts / 4))
        base = max(0.0, half - expert * experts / 2 - row * rows / 2)
        return cls(base, expert, row, experts=experts, **others)

    def step(self, network: Network, devices: int, members: int, rows: int) -> Step:
        """The step on this number of devices, with experts on groups of `members`, and `rows` per device."""
        sent = 2 * rows * self.top_k * (self.features + self.outputs) * 2 * (1 - 1 / members)
        here = self.experts / members
        several = devices > 1
        summed = network.summed(self.common, devices, devices)
        summed += network.summed(self.each * here, devices // members, devices)
        return Step(
            compute=self.base + self.expert * here + self.row * rows,
            all_to_all=sent / network.bandwidth(members) + ALL_TO_ALLS * network.latency * (members > 1),
            gates=rows * (devices - 1) * self.experts * 4 / network.bandwidth(devices),
            gradients=summed + OTHERS * network.latency * several,
        )


@dataclass(frozen=True)
class Recipe:
    """The default recipe. Seconds: base per step, row per image. gates: number of gate outputs per image."""

    base: float
    row: float
    trained: int
    gates: float

    @classmethod
    def fitted(cls, whole: float, half: float, batch: int, **others) -> "Recipe":
        """From the seconds of two steps on one device: a full batch, and half of it."""
        row = max(0.0, (whole - half) / (batch - batch // 2))
        return cls(base=max(0.0, whole - row * batch), row=row, **others)

    def step(self, network: Network, devices: int, images: int) -> Step:
        """The step on this number of devices, with `images` per device."""
        return Step(
            compute=self.base + self.row * images,
            gates=images * (devices - 1) * self.gates * 4 / network.bandwidth(devices),
            gradients=network.summed(self.trained, devices, devices) + OF_A_RECIPE * network.latency * (devices > 1),
        )


@dataclass(frozen=True)
class View:
    """Extraction of a view. seconds: per batch of `batch` images; bytes: of the features of an image."""

    seconds: float
    batch: int
    bytes: int

    def step(self, network: Network, devices: int, images: int) -> Step:
        """All images of a view: whole batches, then all features to every device, one device after another."""
        batches = math.ceil(math.ceil(images / self.batch) / devices)
        told = images * self.bytes / network.bandwidth(devices) if devices > 1 else 0.0
        return Step(compute=batches * self.seconds, gradients=told)
