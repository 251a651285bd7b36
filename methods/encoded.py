"""Prompts that a network makes: PEFT saves the finished prompt alone, and the network lies beside it."""

from __future__ import annotations

from pathlib import Path

from ..core.adapter import AdapterState
from ..core.errors import UserError
from .attach import AttachedAdapter

FILE = "prompt_encoder.safetensors"


class EncodedPrompt(AttachedAdapter):
    """An adapter whose folder is PEFT's, with the raw trainables in a file of their own beside it."""

    def save_peft(self, folder: str | Path, state: AdapterState) -> Path:
        """Write ``state`` as a PEFT folder of the finished prompt; a training can go on from what lies beside it."""
        super().save_peft(folder, state)
        AdapterState(state.spec.bare, {name: state[name] for name in state.spec.bare.names}).save(Path(folder) / FILE)
        return Path(folder)

    def load_peft(self, folder: str | Path) -> AdapterState:
        """Read what :meth:`save_peft` wrote. Raises :class:`UserError` for a folder that has the prompt alone."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise UserError(
                f"{folder}: has no {FILE}, so only the finished prompt; choose method prompt to train it on"
            )
        state = AdapterState.load(file).require_finite()
        if state.spec.bare.digest != self.spec.bare.digest:
            odd = sorted(set(state.spec.bare.names) ^ set(self.spec.bare.names))
            raise UserError(f"{folder}: is not of this adapter: {odd[0] if odd else 'its shapes or settings differ'}")
        self.write(state)
        return self.read()
