"""The jobs: preparing, training, evaluating. Its doors are named here."""

from lorafit.pipeline.evaluating import run_evaluation as run_evaluation
from lorafit.pipeline.listener import Listener as Listener
from lorafit.pipeline.listener import Silent as Silent
from lorafit.pipeline.planning import run_planning as run_planning
from lorafit.pipeline.preparing import open_all as open_all
from lorafit.pipeline.preparing import rendered as rendered
from lorafit.pipeline.refining import run_refining as run_refining
from lorafit.pipeline.training import run_training as run_training
