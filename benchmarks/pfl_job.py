"""One federated LoRA job on Apple's pfl; started by against_pfl.py inside the virtual environment that has pfl.

    python pfl_job.py FOLDER    reads FOLDER/job.json, records.safetensors, start.safetensors; prints one line of JSON

As pfl's documentation has it: PyTorchModel, FederatedAveraging, SimulatedBackend, NNTrainHyperParams, FederatedDataset
with a user sampler. Of its options the fastest: users' tensors are in memory and cut into batches once (pfl does not
shuffle them), the local optimiser sees the trainable parameters alone, no postprocessors, and no callback but one that
reads the clock. pfl always evaluates the users of its first round, which is why that round is not counted. Its
`use_torch_compile` compiles a module's `forward`, through which `loss` does not go, so it would change nothing.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification


class Classifier(torch.nn.Module):
    """What pfl asks of a module: ``loss`` and ``metrics``."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = self.network(input_ids=input_ids, attention_mask=attention_mask).logits
        return F.cross_entropy(logits, labels)

    @torch.no_grad()
    def metrics(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"loss": Weighted(self.loss(input_ids, attention_mask, labels).item() * len(labels), len(labels))}


class CountedSGD(torch.optim.SGD):
    """SGD that counts its steps, to be held against the other side's."""

    taken = 0

    def step(self, closure: Any = None) -> Any:
        CountedSGD.taken += 1
        return super().step(closure)


class Clock(TrainingProcessCallback):
    """The time, and the processor time, at which each round ended."""

    def __init__(self) -> None:
        self.ends = [(time.perf_counter(), time.process_time())]

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
        self.ends.append((time.perf_counter(), time.process_time()))
        return False, Metrics()


def network(job: dict[str, Any], start: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The base model with the same LoRA and head as the other side's, at the same values."""
    base = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=job["labels"])
    model = get_peft_model(base, LoraConfig(**job["lora"]))
    # No dropout on either side.
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if parameters.keys() != start.keys():
        raise SystemExit(f"other trainables: {sorted(parameters.keys() ^ start.keys())}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    return model


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    records = load_file(folder / "records.safetensors")
    model = Classifier(network(job, load_file(folder / "start.safetensors")))
    users = [
        PyTorchTensorDataset({name: tensor[number] for name, tensor in records.items()})
        for number in range(len(records["labels"]))
    ]
    turn = iter([user for cohort in job["cohorts"] for user in cohort])
    data = FederatedDataset(users.__getitem__, lambda: next(turn))
    wrapped = PyTorchModel(
        model,
        lambda parameters, lr: CountedSGD([p for p in parameters if p.requires_grad], lr=lr, momentum=job["momentum"]),
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0),
    )
    clock = Clock()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=len(job["cohorts"]),
            evaluation_frequency=10**9,
            train_cohort_size=len(job["cohorts"][0]),
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        wrapped,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=job["lr"], local_batch_size=job["batch_size"]),
        NNEvalHyperParams(local_batch_size=None),
        callbacks=[clock],
    )
    rounds, cpu = ([after - before for before, after in pairwise(times)] for times in zip(*clock.ends, strict=True))
    everything = {name: tensor.flatten(0, 1) for name, tensor in records.items()}
    found = {name: p.detach().clone() for name, p in model.network.named_parameters() if p.requires_grad}
    save_file(found, folder / "pfl.safetensors")
    with torch.no_grad():
        loss = float(model.loss(**everything))
    print(json.dumps({"rounds": rounds, "cpu": cpu, "steps": CountedSGD.taken, "loss": loss}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
