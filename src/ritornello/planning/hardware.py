"""What devices can do, from their makers' data sheets, and what share of it a plan counts on."""

from dataclasses import dataclass

USABLE = 0.9  # of memory: the rest is for the driver, communication buffers and gaps between blocks
ATTAINABLE = 0.4  # of the peak rate of products, for a whole step but for what is sent
MEMORY_SHARE = 0.8  # of the peak rate of memory
LINK_SHARE = 0.7  # of the peak rate of links, for large messages


@dataclass(frozen=True)
class Gpu:
    """memory in bytes; bf16, fp32: dense FLOPs a second (fp32 without TF32, as PyTorch's default); bandwidth: bytes a
    second from memory; link, network: bytes a second that one device sends to its node and out of it, one way;
    per_node: devices that share links."""

    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    link: float
    network: float
    source: str
    per_node: int = 8

    @property
    def usable(self) -> float:
        return USABLE * self.memory


GPUS: dict[str, Gpu] = {
    "a100": Gpu(80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, "A100 80GB SXM data sheet; DGX A100: 8 × 200 Gb/s"),
    "h100": Gpu(80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9, "H100 SXM data sheet; DGX H100: 8 × 400 Gb/s"),
    "h200": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9, "H200 SXM data sheet; DGX H200: 8 × 400 Gb/s"),
    "b200": Gpu(180e9, 2250e12, 80e12, 8e12, 900e9, 50e9, "DGX B200 data sheet, an eighth of it; 8 × 400 Gb/s"),
}
