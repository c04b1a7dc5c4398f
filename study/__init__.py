"""Matched training of consistency models: study file in, run folders out."""
