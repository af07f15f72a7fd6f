"""Gradient exchange over slow links: compressed, with error feedback."""

from eco_optax.wire.adam import OneBitAdamState as OneBitAdamState
from eco_optax.wire.adam import scale_by_one_bit_adam as scale_by_one_bit_adam
from eco_optax.wire.compressors import COMPRESSORS as COMPRESSORS
from eco_optax.wire.compressors import Compressor as Compressor
from eco_optax.wire.compressors import fp8 as fp8
from eco_optax.wire.compressors import int4 as int4
from eco_optax.wire.compressors import integers as integers
from eco_optax.wire.compressors import integers_omega as integers_omega
from eco_optax.wire.compressors import pack as pack
from eco_optax.wire.compressors import random_k as random_k
from eco_optax.wire.compressors import sign as sign
from eco_optax.wire.compressors import top_k as top_k
from eco_optax.wire.compressors import unpack as unpack
from eco_optax.wire.cost import Cost as Cost
from eco_optax.wire.cost import cost as cost
from eco_optax.wire.feedback import compressed as compressed
from eco_optax.wire.feedback import econtrol as econtrol
from eco_optax.wire.feedback import econtrol_eta as econtrol_eta
from eco_optax.wire.feedback import ef21 as ef21
from eco_optax.wire.feedback import error_feedback as error_feedback
from eco_optax.wire.outer import outer_step as outer_step
from eco_optax.wire.state import WireState as WireState
from eco_optax.wire.state import on_workers as on_workers
from eco_optax.wire.state import specs as specs
