"""Attention operators, one folder each."""
