"""ECO: training quantized networks without master weights, as Optax transforms."""

from eco_optax import contraction as contraction
from eco_optax import diagnostics as diagnostics
from eco_optax import theory as theory
from eco_optax import wire as wire
from eco_optax.formats import FP8 as FP8
from eco_optax.formats import FP8_BLOCK128 as FP8_BLOCK128
from eco_optax.formats import FP8_E5M2 as FP8_E5M2
from eco_optax.formats import FP8_E5M2_TOKEN as FP8_E5M2_TOKEN
from eco_optax.formats import FP8_TOKEN as FP8_TOKEN
from eco_optax.formats import INT4 as INT4
from eco_optax.formats import INT8 as INT8
from eco_optax.formats import MXFP4 as MXFP4
from eco_optax.formats import MXFP8 as MXFP8
from eco_optax.formats import NVFP4 as NVFP4
from eco_optax.formats import Format as Format
from eco_optax.matmul import matmul as matmul
from eco_optax.optimizers.adamw import adamw as adamw
from eco_optax.optimizers.muon import muon as muon
from eco_optax.optimizers.sgd import sgd as sgd
from eco_optax.optimizers.shampoo import scale_by_shampoo as scale_by_shampoo
from eco_optax.optimizers.shampoo import shampoo as shampoo
from eco_optax.optimizers.soap import scale_by_soap as scale_by_soap
from eco_optax.optimizers.soap import soap as soap
from eco_optax.quantized_array import QuantizedArray as QuantizedArray
from eco_optax.quantized_array import dequantize as dequantize
from eco_optax.quantized_array import quantize as quantize
from eco_optax.release import value_and_step as value_and_step
from eco_optax.transforms.error_feedback import (
  error_feedback_to_momentum as error_feedback_to_momentum,
)
from eco_optax.transforms.layer_by_layer import layer_by_layer as layer_by_layer
from eco_optax.transforms.low_bit_moments import low_bit_moments as low_bit_moments
from eco_optax.transforms.master_weights import master_weights as master_weights
from eco_optax.transforms.quantize_params import chain as chain
from eco_optax.transforms.quantize_params import quantize_params as quantize_params
from eco_optax.updates import apply_updates as apply_updates
from eco_optax.updates import value_and_grad as value_and_grad
