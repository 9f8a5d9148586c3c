"""The catalog: one family of parametrizations per file; importing it registers all of them by name."""

from __future__ import annotations

from rewriter.catalog._arithmetic import Affine as Affine
from rewriter.catalog._arithmetic import Scale as Scale
from rewriter.catalog._arithmetic import Shift as Shift
from rewriter.catalog._describe import Entry as Entry
from rewriter.catalog._describe import describe as describe
from rewriter.catalog._fake_quantize import FakeQuantize as FakeQuantize
from rewriter.catalog._kronecker import Kronecker as Kronecker
from rewriter.catalog._lora import Dora as Dora
from rewriter.catalog._lora import Lora as Lora
from rewriter.catalog._low_bit import Binary as Binary
from rewriter.catalog._low_bit import Ternary as Ternary
from rewriter.catalog._low_rank import FixedRank as FixedRank
from rewriter.catalog._low_rank import LowRank as LowRank
from rewriter.catalog._lycoris import LoHa as LoHa
from rewriter.catalog._lycoris import LoKr as LoKr
from rewriter.catalog._mask import Mask as Mask
from rewriter.catalog._orthogonal import Orthogonal as Orthogonal
from rewriter.catalog._plumbing import Cast as Cast
from rewriter.catalog._plumbing import Detach as Detach
from rewriter.catalog._plumbing import Identity as Identity
from rewriter.catalog._plumbing import Transpose as Transpose
from rewriter.catalog._plumbing import WeightDropout as WeightDropout
from rewriter.catalog._pruning import GlobalL1 as GlobalL1
from rewriter.catalog._pruning import GlobalRandom as GlobalRandom
from rewriter.catalog._pruning import L1Unstructured as L1Unstructured
from rewriter.catalog._pruning import LnStructured as LnStructured
from rewriter.catalog._pruning import RandomStructured as RandomStructured
from rewriter.catalog._pruning import RandomUnstructured as RandomUnstructured
from rewriter.catalog._quantized_storage import QuantizedStorage as QuantizedStorage
from rewriter.catalog._rotation_adapters import HRA as HRA
from rewriter.catalog._rotation_adapters import OFT as OFT
from rewriter.catalog._skew import Skew as Skew
from rewriter.catalog._sparse_adapters import FourierFT as FourierFT
from rewriter.catalog._sparse_adapters import Shira as Shira
from rewriter.catalog._sparse_adapters import TrainableTokens as TrainableTokens
from rewriter.catalog._sparse_patterns import NM as NM
from rewriter.catalog._sparse_patterns import BlockSparse as BlockSparse
from rewriter.catalog._spectral_norm import SpectralNorm as SpectralNorm
from rewriter.catalog._symmetric import Symmetric as Symmetric
from rewriter.catalog._vector_adapters import IA3 as IA3
from rewriter.catalog._vector_adapters import AdaLora as AdaLora
from rewriter.catalog._vector_adapters import Vera as Vera
from rewriter.catalog._weight_norm import WeightNorm as WeightNorm
