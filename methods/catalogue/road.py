"""RoAd: pairs of a frozen layer's outputs are turned and scaled."""

from __future__ import annotations

from typing import Literal

from peft import RoadConfig
from pydantic import Field

from ..registry import Method, MethodOptions, meaning_by, register
from ..wrapping import on_layers


class RoadOptions(MethodOptions):
    variant: Literal["road_1", "road_2", "road_4"] = Field("road_1", description="one, two or four numbers a pair")
    group_size: int = Field(64, ge=2, description="outputs that are paired among themselves; divides the output")


register(
    Method(
        name="road",
        summary="pairs of outputs turned by an angle and scaled",
        source="Liao and Monz 2024, arXiv 2409.00119",
        configure=lambda config, task, base: on_layers(RoadConfig, config, task, base),
        meaning=meaning_by((".road_theta.", "angle", "nonlinear"), (".road_alpha.", "scale", "nonlinear")),
        Options=RoadOptions,
        accepts=frozenset({"target_modules"}),
        equation="y <- R y, R of blocks a [cos t, -sin t; sin t, cos t]; W = R W0",
        federates="averaged angle by angle; off the mean of the effects by the square of their difference",
        privacy="exact clipping; m numbers a layer (road_1)",
        kind="other reparameterised",
        contract={"unfit": {"gpt2": "choose lora"}, "settings": {"options": {"group_size": 8}}},
    )
)
