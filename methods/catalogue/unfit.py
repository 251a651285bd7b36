"""Methods of PEFT and of the surveys with which nothing can be trained rightly here, each with its reason."""

from __future__ import annotations

from typing import NoReturn

from ...core.basemodel import BaseModel
from ...core.config import MethodConfig
from ...core.errors import UserError
from ...core.tasks import Task
from ..registry import Kind, Meaning, Method, register


def _configure(config: MethodConfig, task: Task, base: BaseModel) -> NoReturn:
    raise UserError(f"method {config.name} cannot be trained here")


def _meaning(name: str) -> Meaning:
    return "head", "nonlinear"


def _refuse(name: str, summary: str, source: str, why: str, kind: Kind = "low-rank") -> None:
    register(
        Method(
            name=name,
            summary=summary,
            source=source,
            configure=_configure,
            meaning=_meaning,
            kind=kind,
            refused=why,
        )
    )


_refuse(
    "lily",
    "LoRA whose layers share low-rank experts, which a router picks",
    "Zhong et al. 2024, arXiv 2407.09946",
    "its router averages over the batch, so one person's gradient hangs on who else is in it; choose moelora or lora",
)
_refuse(
    "osf",
    "full fine-tuning kept off the principal subspace of each weight",
    "Nayak et al. 2025, arXiv 2504.07097",
    "it rewrites gradients in hooks, behind the clipping, and trains nothing on Conv1D; choose pissa or full",
)
_refuse(
    "eva",
    "LoRA from the principal directions of the activations",
    "Paischer et al. 2024, arXiv 2410.07170",
    "its first values are made of the records' activations, which no noise covers; choose lora with init = svd",
)
_refuse(
    "corda",
    "LoRA from the weight's decomposition by the covariance of its inputs",
    "Yang et al. 2024, arXiv 2406.05223",
    "its first values are made of the records' activations, which no noise covers; choose pissa",
)
_refuse(
    "lora-ga",
    "LoRA from the gradient of the whole weight",
    "Wang et al. 2024, arXiv 2407.05000",
    "its first values are made of the records' gradients, which no noise covers; choose pissa",
)
_refuse(
    "loftq",
    "LoRA from what quantisation takes from the base weight",
    "Li et al. 2023, arXiv 2310.08659",
    "it replaces the base weights by quantised ones, and here they are the same bytes at every site; choose pissa",
)
_refuse(
    "qlora",
    "LoRA beside base weights of four bits",
    "Dettmers et al. 2023, arXiv 2305.14314",
    "it needs a base model quantised by bitsandbytes on CUDA, and base models are loaded whole here; choose lora",
)
_refuse(
    "cpt",
    "virtual tokens around a context, kept near their first values",
    "Blau et al. 2024, arXiv 2410.17222",
    "it rewrites gradients in a hook, behind the clipping; choose prompt",
    "prompt",
)
_refuse(
    "poly",
    "LoRA mixed of skills by the number of a task",
    "Ponti et al. 2022, arXiv 2202.13914",
    "its router asks for the task of each record, and a job has one; choose lora",
)
_refuse(
    "xlora",
    "frozen LoRA experts mixed by a router over their own outputs",
    "Buehler and Buehler 2024, arXiv 2402.07148",
    "it runs the model twice, and asks for experts in PEFT's own format beside it; choose adapterfusion",
)
_refuse(
    "alora",
    "LoRA from the last invocation in a text on",
    "Greenewald et al. 2025, arXiv 2504.12397",
    "its layers ask where the invocations of a whole batch are, so no record's gradient can be had alone; choose lora",
)
_refuse(
    "shadow",
    "a small copy of the model beside it, which corrects every layer",
    "PEFT's ShadowPEFT, 0.21",
    "its second loss lies within the model, a mean over the batch that no clipping of records sees; choose lora",
    "other additive",
)
_refuse(
    "warp",
    "prompt embeddings around a text, and a word for each class",
    "Hambardzumyan et al. 2021, arXiv 2101.00121",
    "its classes are words for a mask, and a classifier is loaded here without the head that predicts words; choose "
    "prompt",
    "prompt",
)
