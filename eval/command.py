"""`duo eval`: measurements of what a pattern costs and buys, each a file beside this one."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from eval.ablation import Ablation
from eval.context import ContextTask
from eval.efficiency import Efficiency
from eval.harness.bench import HarnessBench
from eval.harness.command import Harness
from eval.kernels import Kernels
from eval.longbench.command import LongBenchTask
from eval.memory import MemoryTask
from eval.merge import Merge
from eval.meshes import MeshesTask
from eval.needle.command import NeedleTask
from eval.plot import PlotTask
from eval.precision import Precision
from eval.recall import Recall
from eval.ruler.command import RulerTask
from eval.short.command import HumanEval, Mmlu
from eval.short.mtbench import MtBench
from eval.training import Training
from eval.tune import Tune


@dataclass(frozen=True)
class Eval:
    """Measure what a head pattern costs and what it buys."""

    task: Annotated[
        Annotated[Recall, tyro.conf.subcommand("recall", prefix_name=False)]
        | Annotated[Ablation, tyro.conf.subcommand("ablation", prefix_name=False)]
        | Annotated[Efficiency, tyro.conf.subcommand("efficiency", prefix_name=False)]
        | Annotated[NeedleTask, tyro.conf.subcommand("needle", prefix_name=False)]
        | Annotated[RulerTask, tyro.conf.subcommand("ruler", prefix_name=False)]
        | Annotated[LongBenchTask, tyro.conf.subcommand("longbench", prefix_name=False)]
        | Annotated[Precision, tyro.conf.subcommand("precision", prefix_name=False)]
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
        | Annotated[Training, tyro.conf.subcommand("training", prefix_name=False)]
        | Annotated[Tune, tyro.conf.subcommand("tune", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        """Run the task."""
        self.task.run()
