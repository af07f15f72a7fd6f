"""ECO: training quantized networks without master weights, as Optax transforms."""

from eco_optax.formats import FP8 as FP8
from eco_optax.formats import FP8_BLOCK128 as FP8_BLOCK128
from eco_optax.formats import FP8_E5M2 as FP8_E5M2
from eco_optax.formats import FP8_TOKEN as FP8_TOKEN
from eco_optax.formats import INT4 as INT4
from eco_optax.formats import INT8 as INT8
from eco_optax.formats import MXFP4 as MXFP4
from eco_optax.formats import MXFP8 as MXFP8
from eco_optax.formats import NVFP4 as NVFP4
from eco_optax.formats import Format as Format
from eco_optax.quantized_array import QuantizedArray as QuantizedArray
from eco_optax.quantized_array import dequantize as dequantize
from eco_optax.quantized_array import quantize as quantize
