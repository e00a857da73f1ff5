"""Running quantized models under transformers, on the CPU kernels.

    load(path)               a transformers model of any quantized folder that bitwright reads
    QuantLinear              its linear layer
    BitwrightConfig          quantization on the fly: from_pretrained(..., quantization_config=...)
    set_mode(model, "exact") how products are made
    set_fused(model, False)  whether decoder layers run in one call; fusion(model): which are ready

Importing it registers the method with transformers: from then on `from_pretrained` and `pipeline`
take folders in format `bitwright`.
"""

from bitwright.hf.fused import fusion as fusion
from bitwright.hf.fused import set_fused as set_fused
from bitwright.hf.linear import QuantLinear as QuantLinear
from bitwright.hf.load import load as load
from bitwright.hf.quantizer import BitwrightConfig as BitwrightConfig
from bitwright.hf.quantizer import BitwrightQuantizer as BitwrightQuantizer
from bitwright.hf.quantizer import register as _register
from bitwright.hf.quantizer import set_mode as set_mode

_register()
