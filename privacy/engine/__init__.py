"""Who computes per-sample gradients: fedgraft's own engine, exact for every adapter, or Opacus where it is right."""
