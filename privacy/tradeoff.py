"""What a site's size buys: epsilon against noise, batch and rounds, as numbers and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.config import RunConfig
from ..core.errors import UserError
from .accounting import MAX_NOISE, MIN_NOISE, epsilon
from .plan import PrivacyPlan
from .turns import Turns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _LINE, _BAD = "#1f2933", "#7b8794", "#2b6cb0", "#b03a2e"
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
_NOISES = (0.5, 0.7, 1.0, 1.4, 2.0)


@dataclass(frozen=True)
class Choice:
    """One setting beside the planned one: what the planned noise costs there, and the least that keeps the budget.

    None where the setting is refused, or no noise does. ``on_the_mean``: std over clip of the needed noise on each
    coordinate of the mean gradient. ``planned``: this is the plan itself.
    """

    value: float
    epsilon: float | None
    needed: float | None
    on_the_mean: float | None
    planned: bool = False


@dataclass(frozen=True)
class Tradeoff:
    """The plan of a whole run at a site, and what its neighbours on three axes would cost."""

    plan: PrivacyPlan
    noise: tuple[Choice, ...]
    batch: tuple[Choice, ...]
    rounds: tuple[Choice, ...]

    @property
    def on_the_mean(self) -> float:
        """Std over clip of the noise on each coordinate of the mean gradient, in the planned run."""
        return self.plan.gradient_noise / self.plan.expected_batch


def tradeoff(config: RunConfig, units: int) -> Tradeoff:
    """Plan ``config`` for a site of so many units, and look around. Raises :class:`UserError` as the plan does."""
    plan = PrivacyPlan.for_run(config, units, config.total_steps)
    batch, rounds = config.train.batch_size, config.rounds
    return Tradeoff(
        plan,
        noise=tuple(_with_noise(config, plan, factor) for factor in _NOISES if _useful(plan, factor)),
        batch=tuple(_choice(_with_batch(config, n), n, plan, n == batch) for n in _around(batch, most=units)),
        rounds=tuple(
            _choice(config.model_copy(update={"rounds": n}), n, plan, n == rounds)
            for n in _around(rounds, most=4 * rounds)
        ),
    )


def _useful(plan: PrivacyPlan, factor: float) -> bool:
    return factor == 1 or MIN_NOISE <= plan.noise_multiplier * factor <= MAX_NOISE


def _with_noise(config: RunConfig, plan: PrivacyPlan, factor: float) -> Choice:
    noise = plan.noise_multiplier * factor
    on_the_mean = factor * plan.gradient_noise / plan.expected_batch
    return Choice(noise, _spent(config, plan.units, noise), noise, on_the_mean, factor == 1)


def _around(value: int, most: int) -> list[int]:
    return sorted({min(most, max(1, round(value * factor))) for factor in _FACTORS})


def _with_batch(config: RunConfig, batch: int) -> RunConfig:
    privacy = config.privacy
    if privacy.max_batch:
        # In proportion, so that a sample is cut down about as often as in the planned run.
        most = max(batch, round(privacy.max_batch * batch / config.train.batch_size))
        privacy = privacy.model_copy(update={"max_batch": most})
    train = config.train.model_copy(update={"batch_size": batch})
    return config.model_copy(update={"train": train, "privacy": privacy})


def _choice(config: RunConfig, value: float, plan: PrivacyPlan, planned: bool) -> Choice:
    """What ``config`` costs under the noise of ``plan``, and the noise that it needs."""
    if planned and not config.privacy.noise_multiplier:
        return Choice(value, plan.final_epsilon, plan.noise_multiplier, plan.gradient_noise / plan.expected_batch, True)
    try:
        spent = _spent(config, plan.units, plan.noise_multiplier)
    except UserError:
        return Choice(value, None, None, None)
    free = config.privacy.model_copy(update={"noise_multiplier": 0.0})
    try:
        other = PrivacyPlan.for_run(config.model_copy(update={"privacy": free}), plan.units, config.total_steps)
    except UserError:
        return Choice(value, spent, None, None, planned)
    return Choice(value, spent, other.noise_multiplier, other.gradient_noise / other.expected_batch, planned)


def _spent(config: RunConfig, units: int, noise: float) -> float:
    """Epsilon of the whole run under ``noise``."""
    privacy = config.privacy
    turns = Turns(privacy.sampler, units, config.train.batch_size, privacy.max_batch, privacy.bands)
    event = turns.event(noise, turns.begun(noise, 0, config.total_steps, ()))
    return epsilon((event,), privacy.delta, privacy.neighbours, privacy.accountant)


def draw(found: Tradeoff, path: Path) -> None:
    """Write the three curves to ``path`` as a PNG. Raises :class:`UserError` where it cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plan = found.plan
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "text.color": _INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained", dpi=150)
        panels = figure.subplots(1, 3, sharey=True)
        _panel(panels[0], found.noise, plan, "noise over clip")
        _panel(panels[1], found.batch, plan, f"{plan.unit}s a step (batch)")
        _panel(panels[2], found.rounds, plan, "rounds")
        panels[0].set_ylabel(f"epsilon at delta {plan.delta:g}")
        panels[0].annotate(
            "planned",
            (plan.noise_multiplier, plan.final_epsilon),
            (6, 6),
            textcoords="offset points",
            fontweight="bold",
        )
        panels[0].annotate(
            f"budget {plan.epsilon:g}",
            (1, plan.epsilon),
            (-2, 4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color=_BAD,
        )
        figure.suptitle(
            f"What a site of {plan.units:,} {plan.unit}s can promise ({plan.neighbours.replace('_', ' ')}, "
            f"{plan.sampler.replace('_', ' ')}; each panel moves one setting)",
            fontsize=10,
        )
        try:
            FigureCanvasAgg(figure).print_png(str(path))
        except OSError as error:
            raise UserError(f"{path}: the plot cannot be written: {error.strerror or error}") from None


def _panel(axes: Axes, choices: tuple[Choice, ...], plan: PrivacyPlan, label: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    points = [(one.value, one.epsilon) for one in choices if one.epsilon is not None]
    planned = next(one for one in choices if one.planned)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(*zip(*points, strict=True), color=_LINE, linewidth=1.6, marker="o", markersize=3.5)
    axes.plot([planned.value], [plan.final_epsilon], color=_INK, marker="o", markersize=7, zorder=4)
    axes.axhline(plan.epsilon, color=_BAD, linewidth=1.0, linestyle=(0, (5, 3)), zorder=1)
    axes.xaxis.set_major_locator(FixedLocator([value for value, _ in points]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if value < 100 else f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.7)
    axes.set_xlabel(label)
