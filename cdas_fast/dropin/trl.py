"""Generalised knowledge distillation of trl without the logits, for a student whose head is frozen.

`GKDTrainer` stands for `trl.experimental.gkd.GKDTrainer`, `generalized_jsd_loss` for its method of that name, with
hidden states and heads in the place of logits. trl's beta weighs the teacher: 0 is KL(teacher || student), 1 is
KL(student || teacher).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cdas_fast.dropin.transformers import HeadArguments, counted_rows, divergence, hidden_and_head
from cdas_fast.errors import InvalidInputError, MissingDependencyError, expected_got
from cdas_fast.ops.implementation import Implementation
from cdas_fast.ops.linear_head import CHUNK_BYTES

try:
    from trl.experimental import gkd
except ModuleNotFoundError as error:
    raise MissingDependencyError(f"cdas_fast.dropin.trl needs trl: pip install trl ({error})") from error

IGNORED = -100


class GKDTrainer(gkd.GKDTrainer):
    """`trl.experimental.gkd.GKDTrainer` whose loss holds the logits of a chunk of rows at a time.

    Same arguments, same loss. The softcap and scale that the models apply to their logits are read off their
    configurations and checked by running them. The student's head must be frozen, as it is under LoRA. Only a loss
    that has to come with the outputs of the student, for `compute_metrics`, still goes through its logits.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; with `return_outputs` that of trl, and the outputs of the student."""
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        hidden, head = hidden_and_head(model, **tokens)
        self.teacher_model.eval()
        with torch.no_grad():
            target_hidden, target_head = hidden_and_head(self.teacher_model, **tokens)
        return generalized_jsd_loss(
            hidden[:, :-1],
            target_hidden[:, :-1],
            head,
            target_head,
            labels=inputs["labels"][:, 1:],
            beta=self.beta,  # trl leaves the temperature to sampling
            num_items_in_batch=num_items_in_batch,
        )


def generalized_jsd_loss(
    student_hidden: Tensor,  # (..., D)
    teacher_hidden: Tensor,  # (..., D_teacher)
    student_head: HeadArguments,
    teacher_head: HeadArguments,
    labels: Tensor | None = None,  # (...)
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    *,
    impl: Implementation = "auto",
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """What `GKDTrainer.generalized_jsd_loss` gives for the logits of these hidden states, in nats.

    Args:
        student_hidden: final hidden states of the student, which alone receive a gradient.
        teacher_hidden: those of the teacher.
        student_head: the head of the student, see `cdas_fast.dropin.transformers.hidden_and_head`.
        teacher_head: that of the teacher.
        labels: rows whose label is -100 do not count, and are not computed.
        beta: weight of the teacher in the mixture; 0 is forward KL, 1 is reverse KL.
        temperature: divisor of both logits.
        reduction: `batchmean` divides the sum by the number of rows that count, or without labels by the size of the
            first dimension; `sum`; `mean` divides it by the number of logits of the rows that count.
        num_items_in_batch: divisor of the sum in the place of all that.
        impl: `auto`, `reference`, `cpp` or `triton`.
        chunk_bytes: memory for the logits of one chunk of rows.

    Raises:
        InvalidInputError: another reduction (trl's `none` is one number for each logit), or what `linear_jsd` refuses.
        UnsupportedError: heads with different softcaps.
    """
    if reduction not in ("batchmean", "sum", "mean"):
        what = "generalized_jsd_loss: reduction"
        raise InvalidInputError(expected_got(what, "batchmean, sum or mean", repr(reduction)))
    batch = student_hidden.shape[0]
    student_hidden, teacher_hidden = counted_rows(labels, IGNORED, student_hidden, teacher_hidden.detach())
    total = divergence(
        student_hidden,
        teacher_hidden,
        student_head,
        teacher_head,
        beta=beta,
        temperature=temperature,
        reduction="sum",
        impl=impl,
        chunk_bytes=chunk_bytes,
    )
    rows = student_hidden[..., 0].numel()
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    match reduction:
        case "batchmean":
            return total / max(batch if labels is None else rows, 1)
        case "mean":
            return total / max(rows * student_head["weight"].shape[0], 1)
        case _:
            return total
