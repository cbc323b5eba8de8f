"""`duo eval`: every measurement, and the commands that work on results."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from duo_eval.aot.context import ContextTask, MeshesTask
from duo_eval.aot.kernels import Kernels
from duo_eval.aot.memory import MemoryTask
from duo_eval.aot.paper import PaperTask
from duo_eval.aot.tune import Tune
from duo_eval.runner.merge import Merge
from duo_eval.show.families import Families
from duo_eval.show.plot import PlotTask
from duo_eval.speed.adapter import HarnessBench
from duo_eval.speed.efficiency import Efficiency
from duo_eval.speed.startup import Startup
from duo_eval.speed.training import Training
from duo_eval.tasks.ablation import Ablation
from duo_eval.tasks.humaneval import HumanEval
from duo_eval.tasks.keys import Keys
from duo_eval.tasks.lm_eval.command import Harness
from duo_eval.tasks.longbench import LongBenchTask
from duo_eval.tasks.mmlu import Mmlu
from duo_eval.tasks.mtbench import MtBench
from duo_eval.tasks.needle.command import NeedleTask
from duo_eval.tasks.needle.heads import HeadsTask
from duo_eval.tasks.precision import Precision
from duo_eval.tasks.recall import Recall
from duo_eval.tasks.ruler.command import RulerTask
from duo_jax.extras import EXTRAS


@dataclass(frozen=True)
class Eval:
    """Measure the accuracy, memory and speed of a head pattern."""

    packages = EXTRAS["eval"]
    task: Annotated[
        Annotated[Recall, tyro.conf.subcommand("recall", prefix_name=False)]
        | Annotated[Ablation, tyro.conf.subcommand("ablation", prefix_name=False)]
        | Annotated[Efficiency, tyro.conf.subcommand("efficiency", prefix_name=False)]
        | Annotated[NeedleTask, tyro.conf.subcommand("needle", prefix_name=False)]
        | Annotated[HeadsTask, tyro.conf.subcommand("heads", prefix_name=False)]
        | Annotated[RulerTask, tyro.conf.subcommand("ruler", prefix_name=False)]
        | Annotated[LongBenchTask, tyro.conf.subcommand("longbench", prefix_name=False)]
        | Annotated[Precision, tyro.conf.subcommand("precision", prefix_name=False)]
        | Annotated[Keys, tyro.conf.subcommand("keys", prefix_name=False)]
        | Annotated[Merge, tyro.conf.subcommand("merge", prefix_name=False)]
        | Annotated[PlotTask, tyro.conf.subcommand("plot", prefix_name=False)]
        | Annotated[Harness, tyro.conf.subcommand("harness", prefix_name=False)]
        | Annotated[HarnessBench, tyro.conf.subcommand("harness-bench", prefix_name=False)]
        | Annotated[HumanEval, tyro.conf.subcommand("humaneval", prefix_name=False)]
        | Annotated[Mmlu, tyro.conf.subcommand("mmlu", prefix_name=False)]
        | Annotated[MtBench, tyro.conf.subcommand("mtbench", prefix_name=False)]
        | Annotated[Kernels, tyro.conf.subcommand("kernels", prefix_name=False)]
        | Annotated[ContextTask, tyro.conf.subcommand("context", prefix_name=False)]
        | Annotated[MeshesTask, tyro.conf.subcommand("meshes", prefix_name=False)]
        | Annotated[MemoryTask, tyro.conf.subcommand("memory", prefix_name=False)]
        | Annotated[PaperTask, tyro.conf.subcommand("paper", prefix_name=False)]
        | Annotated[Startup, tyro.conf.subcommand("startup", prefix_name=False)]
        | Annotated[Families, tyro.conf.subcommand("families", prefix_name=False)]
        | Annotated[Training, tyro.conf.subcommand("training", prefix_name=False)]
        | Annotated[Tune, tyro.conf.subcommand("tune", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        """Run the task."""
        self.task.run()
