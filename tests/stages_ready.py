"""Once imported, Hydra has composed what stages are asked for most: the last that `tests.cli.ForkServer` imports."""

import stage_eval.config
import stage_harvest.config
import stage_inspect.config
import stage_trace.config
import stage_train.config
import stage_train.plan.memory
import stage_train.plan.pace
import stage_train.show.plan
from stage_train.plan.config import PlanSchema
from tests.composing import prepare

STAGES = (stage_harvest.config, stage_train.config, stage_eval.config, stage_inspect.config, stage_trace.config)
prepare([lambda: stage_train.config.register(PlanSchema)], ["train"])
prepare([stage.register for stage in STAGES])
