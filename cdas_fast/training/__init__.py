"""Training a direction: activation cache, objective, loop, checkpoints."""

from cdas_fast.training.concept import StepInfo
from cdas_fast.training.concept_run import ConceptResult
from cdas_fast.training.config import TrainingConfig
from cdas_fast.training.loop import TrainingResult, train
from cdas_fast.training.run_folder import StepRecord

__all__ = ["ConceptResult", "StepInfo", "StepRecord", "TrainingConfig", "TrainingResult", "train"]
