"""Stated rates of processors and links, and the fractions of them that the cost model expects.

Assumptions, not results: memory, tensor and exponentials as in bench/roofline.py, which has the
reasoning, a link as large messages usually reach. There are no measured rates of kernels or links
yet; when there are, they replace these.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY, TENSOR, EXP, LINK = 0.80, 0.80, 0.55, 0.80
# Seconds of one host thread. An exchange, a posted step and a launch are measured on 2 cores of an
# AMD EPYC (bench/results/host/host_time.csv); what NCCL and the driver need is assumed: 40 us for a
# non-blocking group, 2 us for each of its transfers, 5 us for a launch. A product is one of several
# that an op asks torch for in a row: 15 us measured on 2 cores of an Intel Xeon, and the launch.
EXCHANGE, GROUP, TRANSFER, LAUNCH, PRODUCT = 30e-6, 60e-6, 3e-6, 60e-6, 20e-6


@dataclass(frozen=True)
class Chip:
    """The processor of one rank.

    Args:
        name: of the chip.
        tflops: bf16 products.
        float32_tflops: without tensor cores.
        gexps: 10^9 exponentials per second.
        tbs: memory, TB/s.
        source: of what is stated.
        host: how slow its host is, 1 as measured.
        asynchronous: it works beside the host, which launches what it is to do.
    """

    name: str
    tflops: float
    float32_tflops: float
    gexps: float
    tbs: float
    source: str
    host: float = 1.0
    asynchronous: bool = True

    def seconds(self, itemsize: int, flops: float, moved: float, exps: float = 0) -> float:
        """Time of a kernel, bound by the slowest of the three.

        Args:
            itemsize: of the operands.
            flops: of products.
            moved: bytes.
            exps: exponentials.
        """
        # float32 products are three TF32 passes where that is faster.
        wide = max(self.float32_tflops, self.tflops / 6)
        rate = {1: 2 * self.tflops, 2: self.tflops}.get(itemsize, wide)  # FP8: by data sheets
        tensor = flops / (TENSOR * 1e12 * rate)
        return max(tensor, moved / self.memory(), exps / (EXP * 1e9 * self.gexps))

    def host_seconds(
        self, exchanges: int, groups: int, transfers: int, launches: int, products: int = 0
    ) -> float:
        """Return the seconds that the host takes to launch work.

        Args:
            exchanges: begun and ended.
            groups: of messages posted at once.
            transfers: of the groups.
            launches: of kernels.
            products: of torch, beside the launches.
        """
        done = exchanges * EXCHANGE + groups * GROUP + transfers * TRANSFER + launches * LAUNCH
        return self.host * (done + products * PRODUCT)

    def memory(self) -> float:
        """Return the expected bytes per second."""
        return MEMORY * 1e12 * self.tbs


@dataclass(frozen=True)
class Link:
    """Link between two ranks: stated GB/s per rank and direction, assumed seconds per message."""

    name: str
    gbs: float
    latency: float

    def rate(self) -> float:
        """Return the expected bytes per second."""
        return LINK * 1e9 * self.gbs


@dataclass(frozen=True)
class Links:
    """Links between the ranks of a node, those of equal rank // node, and between nodes."""

    near: Link
    far: Link
    node: int = 8

    def name(self, size: int) -> str:
        """Name the links that a mesh of so many ranks uses."""
        return self.near.name + (f", {self.far.name}" if size > self.node else "")


def _gpu(
    name: str, sms: int, clock: float, tflops: float, fp32: float, tbs: float, of: str
) -> Chip:
    # 16 ex2.approx per SM and clock on sm_80 to sm_100 (CUDA programming guide).
    return Chip(name, tflops, fp32, 16 * sms * clock, tbs, of)


_ONCE = "products and copies measured once (bench/roofline.py), rest from NVIDIA's datasheet"
H100 = _gpu("H100", 132, 1.755, 798, 67, 3.0, _ONCE)
H200 = _gpu("H200", 132, 1.755, 790, 67, 4.3, _ONCE)
B200 = _gpu("B200", 148, 1.965, 2250, 80, 8.0, "NVIDIA DGX B200 datasheet, per GPU")
SM80 = _gpu("sm_80, 24 GB", 64, 1.695, 111, 27.8, 0.768, "NVIDIA RTX A5000 datasheet, dense")
CPU = Chip("CPU core", 0.1, 0.1, 0.5, 0.01, "order of magnitude, assumed", asynchronous=False)
CHIPS = (H100, H200, B200, SM80, CPU)

NVLINK4, NVLINK5 = Link("NVLink 4", 450, 5e-6), Link("NVLink 5", 900, 5e-6)
PCIE4, PCIE5 = Link("PCIe 4 x16", 31.5, 1e-5), Link("PCIe 5 x16", 63, 1e-5)
NDR = Link("InfiniBand NDR", 50, 1e-5)  # 400 Gb/s, an adapter for each GPU
SHARED = Link("shared memory", 4, 5e-5)  # order of magnitude, assumed
HOPPER, BLACKWELL = Links(NVLINK4, NDR), Links(NVLINK5, NDR)
ONE_MACHINE = Links(SHARED, SHARED)
