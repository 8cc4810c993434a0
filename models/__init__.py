"""Flowformer architectures, configurations, trained weights and evaluation sets."""
