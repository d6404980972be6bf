"""The dynamic loss scale of fp16 (https://arxiv.org/abs/1710.03740)."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.training import GradScaler


@dataclass
class LossScaler:
    """The loss scale. It grows after steps without overflow and shrinks after overflows. In other dtypes it is always 1."""

    config: GradScaler
    enabled: bool
    scale: float = 1.0
    clean: int = 0
    """Number of steps since the last overflow."""
    overflows: int = 0
    """Number of consecutive overflows until now."""

    @classmethod
    def from_config(cls, config: GradScaler, dtype: str) -> LossScaler:
        """Makes the scaler of a model whose ``model.dtype`` is ``dtype``."""
        enabled = dtype == "float16"
        return cls(config, enabled, config.fp16.initial_scale if enabled else 1.0)

    @property
    def smallest(self) -> bool:
        """Whether the scale is so small that an overflow has another reason."""
        return self.scale <= max(1.0, self.config.fp16.min_scale or 0.0)

    def update(self, overflow: bool) -> None:
        """Updates the scale after a step. ``overflow``: whether the gradients of the step were not finite."""
        if not self.enabled:
            return
        if overflow:
            self.clean, self.overflows = 0, self.overflows + 1
            if self.overflows >= self.config.hysteresis:
                floor = self.config.fp16.min_scale or 0.0
                self.scale = max(self.scale * self.config.backoff_factor, floor)
            return
        self.clean, self.overflows = self.clean + 1, 0
        if self.clean % self.config.fp16.growth_interval == 0:
            ceiling = self.config.max_scale or float("inf")
            self.scale = min(self.scale * self.config.growth_factor, ceiling)

    def state(self) -> dict[str, float]:
        """Returns the state for a checkpoint."""
        return {"enabled": self.enabled, "scale": self.scale, "clean": self.clean, "overflows": self.overflows}

    def load(self, state: dict[str, float]) -> None:
        """Restores the state from a checkpoint. If the checkpoint's model has another dtype, nothing is restored."""
        if self.enabled and state.get("enabled", state["scale"] != 1.0):  # older checkpoints do not have "enabled"
            self.scale, self.clean, self.overflows = state["scale"], int(state["clean"]), int(state["overflows"])
