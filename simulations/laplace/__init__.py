"""Calibrated predictions of a trained LoRA adapter."""
