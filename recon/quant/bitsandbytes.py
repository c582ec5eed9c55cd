"""bitsandbytes: weight-only INT8, and 4-bit codebooks (NF4, FP4)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, cast

from recon.errors import ReconError
from recon.formats import LayerFormat, LayerInfo, QuantizedWeight
from recon.quant import QuantMode

if TYPE_CHECKING:
    import torch

FORMATS = ("int8", "nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what the library's kernels take
SMALLEST_BLOCK = 8  # below it the scales of the exact form need more room than FP16 weights would


@dataclass
class BitsAndBytes(QuantMode):
    """Linear weights stored in bitsandbytes' own formats; activations untouched.

    INT8 is the weight half of LLM.int8 (Dettmers et al. 2022, row-wise absmax): the product is computed in the rest's
    format, so there are no outlier columns to split off. NF4 and FP4 are those of QLoRA (Dettmers et al. 2023): codes
    into a 16-entry codebook, one absmax per `block_size` weights of the flattened matrix.
    """

    tool: ClassVar[str] = "bitsandbytes"
    install: ClassVar[str] = "pip install bitsandbytes (43 MB; --no-deps where torch is there already)"

    format: str = "nf4"
    """int8, nf4 or fp4."""
    block_size: int = 64
    """Weights that share one scale (4-bit formats)."""
    double_quant: bool = False
    """Quantise the scales too (4-bit formats)."""
    exact: bool = True
    """Keep 4-bit weights at 4 bits in the graph, as codes gathered from the codebook. False: `folded`, stored
    dequantised in the rest's format, with the tool's rounding: faster, and as large as an unquantised network."""

    def check(self) -> None:
        if self.format not in FORMATS:
            raise ReconError(f"quant_mode.format={self.format}: no such format", f"choose from {', '.join(FORMATS)}")
        if self.block_size not in BLOCKS:
            rule = f"must be one of {', '.join(map(str, BLOCKS))}"
            raise ReconError(f"quant_mode.block_size={self.block_size}: {rule}", "64 is bitsandbytes' default")
        super().check()

    def layer_format(self) -> LayerFormat:
        if self.format == "int8":
            return LayerFormat("int8")
        return LayerFormat("nf4" if self.format == "nf4" else "fp4", block=self.block_size, exact=self.exact)

    def layer_format_of(self, layer: LayerInfo) -> LayerFormat:
        """Blocks run along the flattened weight. In a row whose length they do not divide they are cut at its ends;
        pieces of one block then repeat its scale, which is the same numbers in smaller blocks."""
        whole = self.layer_format()
        if not whole.block:
            return whole
        block = math.gcd(whole.block, layer.in_features)
        return replace(whole, block=block, exact=whole.exact and block >= SMALLEST_BLOCK)

    def quantise(self, weight: torch.Tensor, layer: LayerInfo) -> QuantizedWeight:
        from bitsandbytes import functional

        made = self.layer_format_of(layer)
        if made.weight == "int8":
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())  # as Linear8bitLt does
            empty = absmax == 0  # rows of zeros: the library divides by zero, and engines want positive scales
            return QuantizedWeight(made, codes * ~empty[:, None], (absmax.float() / 127).masked_fill(empty, 1.0))
        packed, state = functional.quantize_4bit(
            weight, blocksize=self.block_size, quant_type=made.weight, compress_statistics=self.double_quant
        )
        absmax = state.absmax
        if state.nested:  # as the library does before it uses them
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        codes, scale = _rows(packed, absmax.float(), layer, self.block_size, made.block)
        return QuantizedWeight(made, codes, scale, codebook=cast("torch.Tensor", state.code).float())


def _rows(
    packed: torch.Tensor, absmax: torch.Tensor, layer: LayerInfo, block_size: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] uint8 and scales [out, in / block] from the flat bytes (high half first) and their absmax."""
    import torch

    count = layer.out_features * layer.in_features
    flat = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=1).flatten()[:count]
    scale = absmax.repeat_interleave(block_size // block)[: count // block]
    return flat.view(layer.out_features, layer.in_features), scale.view(layer.out_features, -1)
