"""Differentiable functions, one file an op: validation, plain-PyTorch reference, choice of implementation."""

from cdas_fast.ops.interchange import clamp, interchange
from cdas_fast.ops.linear_jsd import linear_jsd
from cdas_fast.ops.linear_kl import linear_kl
from cdas_fast.ops.linear_logprob import linear_cross_entropy, linear_logprob

__all__ = ["clamp", "interchange", "linear_cross_entropy", "linear_jsd", "linear_kl", "linear_logprob"]
