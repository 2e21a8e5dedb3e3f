"""The fused linear Jensen-Shannon losses of liger_kernel, for a student whose head is frozen.

`FusedLinearJSD` and `fused_linear_jsd` stand for `LigerFusedLinearJSD` and `liger_fused_linear_jsd` of
`liger_kernel.transformers`, `FusedLinearJSDLoss` for `LigerFusedLinearJSDLoss` of `liger_kernel.chunked_loss`: same
arguments, same meaning, same value and gradient. Liger's P is the teacher and its Q the student; beta weighs the
teacher, 0 is KL(teacher || student) and 1 is KL(student || teacher). liger_kernel itself is not needed.

A student head that requires a gradient is refused. Rows whose label is ignored are not computed at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdas_fast.dropin.transformers import HeadArguments, counted_rows, divergence
from cdas_fast.errors import InvalidInputError, expected_got
from cdas_fast.ops import linear_cross_entropy
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.linear_head import CHUNK_BYTES


class FusedLinearJSD(nn.Module):
    """`LigerFusedLinearJSD`: mean over the rows that are not ignored of the divergence of student and teacher.

    Args:
        jsd_beta: weight of the teacher in the mixture; 0 is forward KL, 1 is reverse KL.
        ignore_index: rows of this label do not count.
        temperature: divisor of both logits.
        accum_dtype: of the gradient of the student's head in Liger; it has none here.
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
        *,
        impl: Implementation = "auto",
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__()
        self.jsd_beta = jsd_beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.accum_dtype = accum_dtype
        self.impl: Implementation = impl
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        student_input: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (N, D_teacher)
        teacher_weight: Tensor,  # (V, D_teacher)
        shift_labels: Tensor | None = None,  # (N,)
    ) -> Tensor:
        """The loss, a float32 scalar (float64 for float64 input); 0 if every row is ignored.

        Raises:
            InvalidInputError: a student head that requires a gradient, or what `linear_jsd` refuses.
        """
        return fused_linear_jsd(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            self.jsd_beta,
            self.ignore_index,
            self.temperature,
            self.accum_dtype,
            impl=self.impl,
            chunk_bytes=self.chunk_bytes,
        )


class FusedLinearJSDLoss(nn.Module):
    """`LigerFusedLinearJSDLoss`: weight_hard_loss x cross-entropy + weight_soft_loss x divergence from the teacher.

    Both are means over the rows that are not ignored. The temperature divides the logits of the divergence alone. A
    student of fewer vocabulary entries than its teacher gets logits of 0 for those it lacks, in the divergence alone;
    for that its head is copied at every call, which a head padded with zeros once and for all spares.

    Args:
        weight_hard_loss: weight of the cross-entropy with the labels.
        weight_soft_loss: weight of the divergence from the teacher.
        beta: weight of the teacher in the mixture; 0 is forward KL, 1 is reverse KL.
        ignore_index: rows of this label do not count.
        temperature: divisor of both logits in the divergence.
        compiled: whether Liger compiles its chunks; no matter here.
        chunk_size: rows of a chunk in Liger; here `chunk_bytes` decides.
        return_soft_hard_loss: also return both losses before they are weighted, detached.
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
        *,
        impl: Implementation = "auto",
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.beta = beta
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss
        self.impl: Implementation = impl
        self.chunk_bytes = chunk_bytes

    def forward(
        self,
        student_input: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (N, D_teacher)
        teacher_weight: Tensor,  # (V_teacher, D_teacher)
        true_labels: Tensor,  # (N,)
        student_bias: Tensor | None = None,  # (V,)
        teacher_bias: Tensor | None = None,  # (V_teacher,)
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss, or loss, divergence and cross-entropy; float32 scalars (float64 for float64 input).

        Raises:
            InvalidInputError: a student head that requires a gradient, or what `linear_jsd` and
                `linear_cross_entropy` refuse.
        """
        soft = _soft_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            true_labels,
            student_bias,
            teacher_bias,
            beta=self.beta,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            impl=self.impl,
            chunk_bytes=self.chunk_bytes,
        )
        if not self.weight_hard_loss and not self.return_soft_hard_loss:
            return self.weight_soft_loss * soft
        hard = linear_cross_entropy(
            student_input,
            true_labels,
            student_weight,
            bias=student_bias,
            ignore_index=self.ignore_index,
            impl=self.impl,
            chunk_bytes=self.chunk_bytes,
        )
        loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
        return (loss, soft.detach(), hard.detach()) if self.return_soft_hard_loss else loss


def fused_linear_jsd(
    student_input: Tensor,  # (N, D)
    student_weight: Tensor,  # (V, D)
    teacher_input: Tensor,  # (N, D_teacher)
    teacher_weight: Tensor,  # (V, D_teacher)
    shift_labels: Tensor | None = None,  # (N,)
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
    *,
    impl: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """`liger_fused_linear_jsd`; see `FusedLinearJSD`, which has the same arguments."""
    if teacher_weight.shape[0] != student_weight.shape[0]:
        wanted = f"{student_weight.shape[0]} vocabulary entries, as student_weight has"
        raise InvalidInputError(expected_got("teacher_weight", wanted, teacher_weight.shape[0]))
    return _soft_loss(
        student_input,
        student_weight,
        teacher_input,
        teacher_weight,
        shift_labels,
        None,
        None,
        beta=jsd_beta,
        ignore_index=ignore_index,
        temperature=temperature,
        impl=impl,
        chunk_bytes=chunk_bytes,
    )


def _soft_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    *,
    beta: float,
    ignore_index: int,
    temperature: float,
    impl: Implementation,
    chunk_bytes: int,
) -> Tensor:
    for name, tensor in (("student_weight", student_weight), ("student_bias", student_bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            remedy = f"A head that is trained needs Liger's own loss; for one that is not, pass {name}.detach()."
            raise InvalidInputError(expected_got(name, "a frozen tensor", "one that requires grad", remedy))
    student_input, teacher_input = counted_rows(labels, ignore_index, student_input, teacher_input.detach())
    missing = teacher_weight.shape[0] - student_weight.shape[0]
    if missing > 0:
        student_weight = F.pad(student_weight, (0, 0, 0, missing))
        student_bias = None if student_bias is None else F.pad(student_bias, (0, missing))
    return divergence(
        student_input,
        teacher_input,
        _head(student_weight, student_bias),
        _head(teacher_weight, teacher_bias),
        beta=beta,
        temperature=temperature,
        impl=impl,
        chunk_bytes=chunk_bytes,
    )


def _head(weight: Tensor, bias: Tensor | None) -> HeadArguments:
    bias = None if bias is None else bias.detach()
    return HeadArguments(weight=weight.detach(), bias=bias, logit_softcap=None, logit_scale=1.0)
