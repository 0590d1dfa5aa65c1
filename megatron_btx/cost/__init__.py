"""Formulas, each once: parameters, FLOPs, bytes, and which layouts fit."""
